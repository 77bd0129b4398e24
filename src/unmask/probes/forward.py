"""Teacher-forced reading: several models read the same texts, and a probe sees their logits a few
hundred rows at a time.

Nothing here computes a probability; `unmask.delta` does, in the `read` functions that probes pass in.
Texts of similar length share a batch and are padded to the right, which a causal model never sees. All
models read the same batches, so equal weights give equal bits and differences of exactly 0.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unmask import delta
from unmask.errors import UserError
from unmask.generation.engine import Answer, generate
from unmask.lineage import Layer
from unmask.model.foreign import LanguageModel
from unmask.model.scorer import Scorer
from unmask.probes.probe import Floats, Meter
from unmask.stages.batches import by_length, pad_right
from unmask.stages.reward import scores
from unmask.text.chat import Message, render
from unmask.text.tokenizer import Tokenizer

BATCH_TOKENS = 4096
LOGITS_AT_ONCE = 2**24  # numbers of logits of all models together: 64 MB, and a few temporaries of that size
ROWS_AT_ONCE = 512

# (logits of each model (N, V), the ids that came next (N,)) -> what the probe wants of each position (N, K)
Read: TypeAlias = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Judge:
    """A reward model of a lineage, loaded."""

    name: str
    model: Scorer
    tokenizer: Tokenizer
    hash: str = ""


class Text(NamedTuple):
    """Ids to read; positions of ids[start:] are scored, each in the context of all ids before it. start
    ≥ 1."""

    ids: Sequence[int]
    start: int


def log_probs(logits: Sequence[Tensor], targets_N: Tensor) -> Tensor:
    """The read that most probes want: log p of the token that came next, of each model: (N, models), nats."""
    return torch.stack([delta.log_probs(each, targets_N) for each in logits], 1)


@torch.inference_mode()
def teacher_forced(
    models: Sequence[LanguageModel],
    texts: Sequence[Text],
    read: Read = log_probs,
    *,
    meter: Meter | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Tensor]:
    """For each text what `read` made of its scored positions: (A, K) float64 on the CPU, A = len(ids) −
    start.

    Raises UserError for a text longer than a model's context.
    """
    device = models[0].head.device
    context = min(model.config.max_position_embeddings for model in models)
    longest = max((len(text.ids) for text in texts), default=0)
    if longest - 1 > context:  # the last id is only a target
        raise UserError(
            f"a text of {longest} tokens does not fit the models' context of {context}: shorten it"
        )
    rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (models[0].head.shape[0] * len(models))))
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for batch in by_length([len(text.ids) - 1 for text in texts], batch_tokens):
        here = [texts[i] for i in batch]
        assert all(1 <= text.start < len(text.ids) for text in here), (
            "a text needs something to score, and a token before it"
        )
        ids_BT, _ = pad_right([text.ids[:-1] for text in here], device)
        # Of each scored position: its index in the flattened batch; the id that came next.
        place = [
            row * ids_BT.shape[1] + torch.arange(t.start - 1, len(t.ids) - 1) for row, t in enumerate(here)
        ]
        at_N = torch.cat(place).to(device)
        targets_N = torch.tensor([i for text in here for i in text.ids[text.start :]], device=device)
        hidden = [model.hidden(ids_BT, at_N=at_N) for model in models]
        pieces = [
            read(
                [m.logits(h[i : i + rows]) for m, h in zip(models, hidden, strict=True)],
                targets_N[i : i + rows],
            )
            for i in range(0, len(at_N), rows)
        ]
        values = torch.split(torch.cat(pieces).double().cpu(), [len(each) for each in place])
        for i, value in zip(batch, values, strict=True):
            found[i] = value
        if meter is not None:
            meter.fp_tokens += len(models) * sum(len(text.ids) - 1 for text in here)
    return found


def bf16_copy(model: LanguageModel) -> LanguageModel:
    """The same weights in bfloat16, products and activations too: what floor N1 is measured with."""
    return copy.deepcopy(model).to(torch.bfloat16)


def judged(
    judge: Judge, texts: Sequence[Sequence[int]], *, meter: Meter | None = None, bf16: bool = False
) -> Floats:
    """The judge's score of each text, read at its last id, less its offset: (texts,)."""
    model = copy.deepcopy(judge.model).to(torch.bfloat16) if bf16 else judge.model
    if meter is not None:
        meter.fp_tokens += sum(map(len, texts))
    return np.asarray(scores(model, texts).double().numpy())


def dtype_of(layers: Sequence[Layer | Judge]) -> str:
    """The dtype that models are read in, as findings name it; several are joined by a comma."""
    return ", ".join(
        sorted({str(next(layer.model.parameters()).dtype).removeprefix("torch.") for layer in layers})
    )


def same_tokenizer(layers: Sequence[Layer]) -> None:
    """Raises UserError unless all layers share one vocabulary: token by token nothing else can be
    compared."""
    first = layers[0]
    for other in layers[1:]:
        if other.tokenizer.hash != first.tokenizer.hash:
            raise UserError(
                f"{first.name} and {other.name} have different tokenizers, so their probabilities of a token "
                "cannot be compared. Compare checkpoints of one lineage."
            )


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[Message], template: bool = True) -> list[int]:
    """A prompt as a model reads it: in the chat template with the assistant's turn open, or as plain
    text after <|endoftext|>. A string is one user turn; plain text of a conversation is its turns, a
    line each."""
    if template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return render(tokenizer, messages, open_turn=True).ids
    text = prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)
    return [tokenizer.end_of_text, *tokenizer.encode(text)]


def say(
    layer: Layer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    meter: Meter | None = None,
    bf16: bool = False,
) -> list[Answer]:
    """What a layer answers to each prompt, up to its stop token or the limit; greedy unless a
    temperature is given."""
    model = bf16_copy(layer.model) if bf16 else layer.model
    answers = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=layer.tokenizer.stop_ids,
        temperature=temperature,
        seed=seed,
    )
    if meter is not None:
        meter.fp_tokens += sum(map(len, prompts)) + sum(len(answer.ids) for answer in answers)
    return answers
