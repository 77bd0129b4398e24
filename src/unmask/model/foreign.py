"""Causal language models of families that our decoder does not cover, run by transformers (extra `hf`).

They are read, not trained: the same hidden states, head and logits as a Decoder, without a cache.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.model.precision import linear


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
        cache: None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, of whole rows only: no packed documents, no cache."""
        assert documents_BT is cache is None
        places = {} if positions_BT is None else {"position_ids": positions_BT}
        states: Tensor = self.inner.base_model(input_ids=ids_BT, use_cache=False, **places).last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.head, self.inner.get_output_embeddings().bias) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V), as transformers itself gives them."""
        logits: Tensor = self.inner(input_ids=ids_BT, use_cache=False).logits
        return logits


def open(
    source: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Foreign:
    """A model directory or hub id, through transformers; safetensors only, never code that comes with it.

    UserError if it cannot be opened, or if its logits come from its last hidden states in an unknown way.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"{source} opens through transformers: pip install 'unmask[hf]'") from None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{source}: transformers cannot open it: {error}") from None
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
