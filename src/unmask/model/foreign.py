"""Causal language models of families that our decoder does not cover, run by transformers (extra `hf`).

They are read, not trained: the same hidden states, head and logits as a Decoder. Families keep what they have read
in many ways, so a step of generation reads its whole text again: right for all of them, and slow for long answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.model.config import FAMILIES
from unmask.model.decoder import Decoder
from unmask.model.precision import linear


class TokenCache:
    """The ids that were read, in a Cache's place: `rows` sequences of up to `length`, at that class's terms."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.ids_BT = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def advance(self, n_B: Tensor | int) -> None:
        self.lengths_B = self.lengths_B + n_B

    def select(self, rows: Tensor) -> None:
        self.ids_BT, self.lengths_B = self.ids_BT[rows], self.lengths_B[rows]

    def put(self, rows: Tensor, source: "TokenCache") -> None:
        n = min(self.ids_BT.shape[1], source.ids_BT.shape[1])
        self.ids_BT[rows, :n] = source.ids_BT[:, :n]
        self.lengths_B[rows] = source.lengths_B


class Foreign(nn.Module):
    """A transformers causal LM behind a Decoder's interface; `config` is transformers' own of the text model.

    Families that do something to their logits are covered where the config says what: a soft cap
    (`final_logit_softcapping`) or a scale (`logit_scale`, `logits_scaling`). `open` checks the result.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config.get_text_config()
        settings = self.config.to_dict()
        self.cap: float | None = settings.get("final_logit_softcapping")
        self.scale = float(settings.get("logit_scale") or 1.0) / float(settings.get("logits_scaling") or 1.0)

    @property
    def head(self) -> Tensor:
        weight: Tensor = self.inner.get_output_embeddings().weight
        return weight

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: TokenCache | None = None,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """Decoder.hidden, without packed documents; with a cache, positions follow it."""
        assert documents_BT is None
        if at_N is not None:
            return self.hidden(ids_BT, positions_BT=positions_BT, cache=cache).flatten(0, 1)[at_N]
        if cache is None:
            places = {} if positions_BT is None else {"position_ids": positions_BT}
            states: Tensor = self.inner.base_model(
                input_ids=ids_BT, use_cache=False, **places
            ).last_hidden_state
            return states
        at_BT = cache.lengths_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        cache.ids_BT.scatter_(1, at_BT, ids_BT)
        whole_BTD = self.hidden(cache.ids_BT[:, : int(at_BT.max()) + 1])
        return whole_BTD.gather(1, at_BT[..., None].expand(-1, -1, whole_BTD.shape[-1]))

    def new_cache(self, rows: int, length: int) -> TokenCache:
        return TokenCache(rows, length, self.head.device)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.head, self.inner.get_output_embeddings().bias) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V), as transformers itself gives them."""
        logits: Tensor = self.inner(input_ids=ids_BT, use_cache=False).logits
        return logits


LanguageModel: TypeAlias = Decoder | Foreign


def open(
    source: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Foreign:
    """A model directory or hub id, through transformers; safetensors only, never code that comes with it.

    UserError if it cannot be opened, if a weight is missing, of another shape or not finite (transformers draws the
    first two at random), or if its logits come from its last hidden states in an unknown way.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"{source} opens through transformers: pip install 'unmask[hf]'") from None
    try:
        with _quiet(transformers.utils.logging):
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # of a dozen kinds, for what a stranger may have written into config.json
        raise UserError(f"{source}: transformers cannot open it: {error}") from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{source}: missing {len(missing)} of the weights, as {missing[0]}; make the model anew"
        )
    # Other families may carry more than they use; of ours, a config that describes less than is there is a wrong one.
    if model.config.model_type in FAMILIES and (more := sorted(found["unexpected_keys"])):
        raise UserError(f"{source}: {more[0]} is no tensor of the model that config.json describes")
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise UserError(f"{source}: {name} holds NaN or infinite weights; make the model anew")
    foreign = Foreign(model.to(device).eval())
    ids_BT = torch.arange(8, device=device)[None] % foreign.config.vocab_size
    with torch.no_grad():
        theirs, ours = foreign(ids_BT).float(), foreign.logits(foreign.hidden(ids_BT)).float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 if dtype is torch.float32 else 0.1):
        raise UserError(
            f"{source}: {type(model).__name__} makes its logits from its hidden states in a way of its own "
            f"(they differ by {(ours - theirs).abs().max().item():.3g}), so it cannot be measured here"
        )
    return foreign


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No bar, and no table of missing weights before the sentence that names one."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
