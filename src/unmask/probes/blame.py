"""Which layer put each token of an answer there, and by how many nats.

log p_n(t | c) = log p_0(t | c) + Σ_k delta_k(t | c), exactly: the answer of the last layer is read by
every layer in the same context. A token belongs to the layer with the largest credit (the base's counts
from chance, log p_0 + ln V), and to none where that lies below the noise floor.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask import delta
from unmask.errors import UserError
from unmask.lineage import Layer
from unmask.probes.forward import Text, bf16_copy, prompt_ids, same_tokenizer, say, teacher_forced
from unmask.text.chat import Message
from unmask.text.tokenizer import Tokenizer

FLOOR_SOURCE = (
    "95th percentile over tokens and layers of how far a credit moves when the models are in bfloat16"
)


@dataclass(frozen=True)
class BlamedToken:
    """`parts` are log p under the base and then each layer's delta, summing to `logprob`; `credits` the
    same with the base counted from chance. Nats, in the order of the layers. `layer` has the largest
    credit; None below the floor."""

    id: int
    text: str
    logprob: float
    parts: tuple[float, ...]
    credits: tuple[float, ...]
    layer: str | None


@dataclass(frozen=True)
class Blame:
    """An answer of the last layer with the share of every layer in every token.

    `prompt_ids` and the tokens' ids are the exact sequence that was read: the stop token is among the
    tokens if the answer stopped, and not in `answer`. `alone` is what each layer says by itself in the
    same context, `plain` what the first one says to the prompt as plain text, since it may never have
    seen the template. `floor` is in nats.
    """

    layers: tuple[str, ...]
    prompt: str
    template: bool
    prompt_ids: tuple[int, ...]
    answer: str
    tokens: tuple[BlamedToken, ...]
    alone: dict[str, str]
    plain: str
    floor: float

    @property
    def nats(self) -> tuple[float, ...]:
        """Each layer's part of the answer's log-probability: sums over the tokens, in the order of the
        layers."""
        return tuple(sum(parts) for parts in zip(*(token.parts for token in self.tokens), strict=True))

    @property
    def logprob(self) -> float:
        """log p of the whole answer under the last layer: the sum of `nats`."""
        return sum(token.logprob for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "prompt": self.prompt,
            "template": self.template,
            "prompt_ids": list(self.prompt_ids),
            "answer": self.answer,
            "tokens": [
                {**vars(token), "parts": list(token.parts), "credits": list(token.credits)}
                for token in self.tokens
            ],
            "nats": list(self.nats),
            "logprob": self.logprob,
            "alone": dict(self.alone),
            "plain": self.plain,
            "floor": self.floor,
            "floor_source": FLOOR_SOURCE,
        }


def blame(
    layers: Sequence[Layer],
    prompt: str | Sequence[Message],
    *,
    answer: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    template: bool = True,
) -> Blame:
    """The last layer's answer to the prompt (or a given one), read by every layer, oldest first.

    Greedy unless `temperature` is given. With `template` the prompt is a user turn (or messages) in the
    chat template, else plain text after <|endoftext|>. Raises UserError for layers of different
    tokenizers or equal names, an empty answer, and a prompt beyond the context.
    """
    same_tokenizer(layers)
    names = [layer.name for layer in layers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two layers are called {twice!r}: nobody could tell whom a token is put down to")
    tokenizer = layers[-1].tokenizer
    context, plain_context = (
        prompt_ids(tokenizer, prompt, template),
        prompt_ids(tokenizer, prompt, template=False),
    )

    def said(layer: Layer, ids: Sequence[int]) -> list[int]:
        return say(layer, [ids], max_new_tokens, temperature=temperature, seed=seed)[0].ids

    alone = [said(layer, context) for layer in layers]
    ids = alone[-1] if answer is None else tokenizer.encode(answer)
    if not ids:
        raise UserError("there is no token to blame anybody for: the answer is empty")
    log_p_AL, floor = _read(layers, Text([*context, *ids], len(context)))
    parts = delta.deltas(log_p_AL.unbind(1))
    credits = delta.credits(parts, vocabulary=layers[-1].model.head.shape[0])
    winners = delta.winner(credits, floor)
    parts_AL, credits_AL = torch.stack(parts, 1), torch.stack(credits, 1)
    assert torch.allclose(parts_AL.sum(1), log_p_AL[:, -1], rtol=0, atol=1e-6), (
        "parts do not sum to the log-probability"
    )
    return Blame(
        layers=tuple(layer.name for layer in layers),
        prompt=prompt if isinstance(prompt, str) else prompt[-1]["content"],
        template=template,
        prompt_ids=tuple(context),
        answer=tokenizer.decode(ids),
        tokens=tuple(
            BlamedToken(
                id=ids[t],
                text=text,
                logprob=float(log_p_AL[t, -1]),
                parts=tuple(parts_AL[t].tolist()),
                credits=tuple(credits_AL[t].tolist()),
                layer=layers[k].name if k >= 0 else None,
            )
            for t, (text, k) in enumerate(zip(spelled(tokenizer, ids), winners.tolist(), strict=True))
        ),
        alone={layer.name: tokenizer.decode(each) for layer, each in zip(layers, alone, strict=True)},
        plain=tokenizer.decode(said(layers[0], plain_context)),
        floor=floor,
    )


def _read(layers: Sequence[Layer], text: Text) -> tuple[Tensor, float]:
    """log p of each scored token under each layer (A, L), float64 of float32 values, and the noise
    floor of a credit."""
    models = [layer.model for layer in layers]
    exact, rounded = (
        teacher_forced(group, [text])[0] for group in (models, [bf16_copy(model) for model in models])
    )
    moved = torch.stack(delta.deltas(rounded.unbind(1))) - torch.stack(delta.deltas(exact.unbind(1)))
    return exact, float(moved.abs().flatten().quantile(0.95))


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, so that together they are the text: a character of several tokens goes to
    its last one, and a control token is written out."""
    names = {number: name for name, number in tokenizer.control.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for place, id in enumerate(ids):
        ends = place + 1 == len(ids) or ids[place + 1] in names  # then no more bytes of a character can come
        texts.append(names[id] if id in names else decoder.decode(tokenizer.token_bytes[id], ends))
    return texts
