"""Batched generation with a KV cache. The engine knows nothing of text: token ids in, token ids out.

Continuous batching: rows whose answer ended are free, waiting prompts are read in groups and take free
rows, and once nothing waits the batch shrinks to the rows that still write. Prompts are padded to the right
while they are read, never to the left, so that a token's position is its place in its own sequence.

The uniform number behind each token is a pure function of (seed, stream, step), where a prompt's stream is
its index unless given: what is drawn for a prompt does not depend on the prompts beside it. (Its logits do
in their last bits, as matrix products of other sizes round differently; that decides a token once in a
million.)
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.generation.sampling import check_settings, sample, uniforms
from unmask.model.foreign import LanguageModel

PREFILL_TOKENS = 2_048  # prompts are read in groups of at most this many tokens, padding included
FREE_SHARE = (
    4  # a group waits until one row in this many is free: a pass for one prompt costs as much as a step
)
KEPT_SHARE = 0.75  # the batch shrinks when no more than this share of its rows writes


@dataclass(frozen=True)
class Answer:
    """Ids after the prompt, with the stop token if it was reached, and the log-probability of each in
    nats."""

    ids: list[int]
    log_probs: list[float]
    finished: bool  # ended with a stop token, and was not cut at its limit


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and when an answer ends."""

    stop_ids: Collection[int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Request:
    """A prompt, the most ids that may follow it, and its stream of uniform numbers."""

    prompt: Sequence[int]
    limit: int
    stream: int


# Logits of every model (B, V) → the logits that are sampled. One model: itself. Several: the dial.
Blend = Callable[[Sequence[Tensor]], Tensor]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    rows: int = 64,
) -> list[Answer]:
    """An answer to each prompt, in their order. An answer ends after a stop token, at its limit or at the
    context's.

    `max_new_tokens`: one limit, or one a prompt. `rows`: how many answers are written side by side. For the
    distribution and the log-probabilities see `sample`; for `seed` and `streams` the head of this file.

    Raises UserError for an empty prompt, one that fills the context, ids outside the vocabulary, and settings
    that describe no distribution.
    """
    settings = Settings(stop_ids, temperature, top_k, top_p, seed)
    return answer([model], itself, to_requests([model], prompts, max_new_tokens, streams), settings, rows)


def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The ids that `generate` gives for this prompt alone, each as soon as it is chosen."""
    settings = Settings(stop_ids, temperature, top_k, top_p, seed)
    [request] = to_requests([model], [prompt], max_new_tokens, None)
    return _stream(model, request, settings)


def itself(logits: Sequence[Tensor]) -> Tensor:
    return logits[0]


def to_requests(
    models: Sequence[LanguageModel],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    streams: Sequence[int] | None,
) -> list[Request]:
    """Checked requests: limits are cut so that prompt and answer fit every model's context."""
    context = min(model.config.max_position_embeddings for model in models)
    vocabulary = min(model.config.vocab_size for model in models)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    streams = range(len(prompts)) if streams is None else streams
    if not len(prompts) == len(limits) == len(streams):
        raise UserError(
            f"{len(prompts)} prompts, {len(limits)} values in max_new_tokens and {len(streams)} streams: "
            "give one for each prompt"
        )
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: a model continues at least one token, as <|endoftext|>")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, and a context of {context} leaves no room for an "
                "answer: shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UserError(
                f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, and the model's vocabulary ends at "
                f"{vocabulary - 1}: use the tokenizer that belongs to the model"
            )
        if limit < 1:
            raise UserError(f"max_new_tokens is {limit} for prompt {i}: ask for one token at least")
    return [
        Request(prompt, min(limit, context - len(prompt)), number)
        for prompt, limit, number in zip(prompts, limits, streams, strict=True)
    ]


@torch.no_grad()
def answer(
    models: Sequence[LanguageModel], blend: Blend, requests: Sequence[Request], settings: Settings, rows: int
) -> list[Answer]:
    """Answers in the order of the requests, by models that read the same tokens in step."""
    if rows < 1:
        raise UserError(f"rows is {rows}: at least one answer is written at a time")
    answers: dict[int, Answer] = {}
    # Longest first: prompts of like length are padded least when they are read together.
    waiting = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
    batch = Batch(models, blend, settings, requests, rows)
    while waiting or batch.writing:
        free = batch.rows - batch.writing
        if waiting and (free * FREE_SHARE >= batch.rows or not batch.writing):
            most = max(1, min(free, PREFILL_TOKENS // len(requests[waiting[0]].prompt)))
            batch.admit(waiting[:most])
            waiting = waiting[most:]
        else:
            if not waiting and batch.writing <= KEPT_SHARE * batch.rows:
                batch.shrink()
            batch.step()
        answers |= batch.collect()
    return [answers[i] for i in range(len(requests))]


@torch.no_grad()
def _stream(model: LanguageModel, request: Request, settings: Settings) -> Iterator[int]:
    batch = Batch([model], itself, settings, [request], 1)
    batch.admit([0])
    yield batch.last
    while not batch.collect():
        batch.step()
        yield batch.last


class Batch:
    """Rows in which answers are written in step. A row is free (`request` −1) or writes the answer of one
    request.

    A step runs over all rows, the free ones included: their length stays 0, and what they compute is not
    read.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        blend: Blend,
        settings: Settings,
        requests: Sequence[Request],
        rows: int,
    ) -> None:
        self.models, self.blend, self.settings, self.requests = models, blend, settings, requests
        self.device = models[0].head.device
        rows = min(rows, len(requests))
        length = max((len(request.prompt) + request.limit for request in requests), default=1)
        width = max((request.limit for request in requests), default=1)
        self.caches: list[Any] = [model.new_cache(rows, length) for model in models]  # each fits its model
        self.stops = torch.tensor(sorted(settings.stop_ids), dtype=torch.int64, device=self.device)
        self.request = [-1] * rows
        self.finished: list[int] = []  # rows whose answer has ended and was not collected yet

        def table(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.writes_B = table(rows)  # 1 where a row writes, 0 where it is free
        self.last_B, self.step_B, self.limit_B = table(rows), table(rows), table(rows)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.uniforms_BA = table(rows, width, dtype=wide)
        self.ids_BA, self.log_probs_BA = table(rows, width), table(rows, width, dtype=torch.float32)

    @property
    def rows(self) -> int:
        return len(self.request)

    @property
    def writing(self) -> int:
        return sum(i >= 0 for i in self.request)

    @property
    def last(self) -> int:
        """The newest id of the first row."""
        return int(self.last_B[0])

    def admit(self, indices: Sequence[int]) -> None:
        """Read these requests' prompts into free rows, and choose the first token of each answer."""
        group = [self.requests[i] for i in indices]
        free = [row for row, i in enumerate(self.request) if i < 0][: len(group)]
        at = torch.tensor(free, device=self.device)
        lengths = [len(request.prompt) for request in group]
        padded = np.zeros((len(group), max(lengths)), dtype=np.int64)
        numbers = np.zeros((len(group), self.uniforms_BA.shape[1]))
        for row, request in enumerate(group):
            padded[row, : lengths[row]] = request.prompt
            numbers[row, : request.limit] = uniforms(self.settings.seed, request.stream, request.limit)
            self.request[free[row]] = indices[row]
        self.uniforms_BA[at] = torch.from_numpy(numbers).to(self.uniforms_BA)
        self.limit_B[at] = torch.tensor([request.limit for request in group], device=self.device)
        self.writes_B[at], self.step_B[at] = 1, 0
        ids_BT, lengths_B = (
            torch.from_numpy(padded).to(self.device),
            torch.tensor(lengths, device=self.device),
        )
        logits = []
        for model, cache in zip(self.models, self.caches, strict=True):
            own: Any = model.new_cache(*padded.shape)
            hidden_BTD = model.hidden(ids_BT, cache=own)
            own.advance(lengths_B)
            cache.put(at, own)
            logits.append(model.logits(hidden_BTD[torch.arange(len(group)), lengths_B - 1]))
        self._choose(at, self.blend(logits))

    def step(self) -> None:
        """Choose one more token in every row."""
        logits = []
        for model, cache in zip(self.models, self.caches, strict=True):
            logits.append(model.logits(model.hidden(self.last_B[:, None], cache=cache)[:, 0]))
            cache.advance(self.writes_B)
        self._choose(torch.arange(self.rows, device=self.device), self.blend(logits))

    def _choose(self, at: Tensor, logits_BV: Tensor) -> None:
        step = self.step_B[at]
        ids, log_probs = sample(
            logits_BV,
            self.uniforms_BA[at, step],
            self.settings.temperature,
            self.settings.top_k,
            self.settings.top_p,
        )
        self.ids_BA[at, step], self.log_probs_BA[at, step], self.last_B[at] = ids, log_probs, ids
        step = step + self.writes_B[at]
        self.step_B[at] = step
        ended = ((ids[:, None] == self.stops).any(1) | (step >= self.limit_B[at])) & self.writes_B[at].bool()
        if ended.any():
            self.finished += at[ended].tolist()

    def collect(self) -> dict[int, Answer]:
        """The answers that ended since the last call, by the index of their request. Their rows become
        free."""
        answers = {}
        for row in self.finished:
            n = int(self.step_B[row])
            ids, log_probs = self.ids_BA[row, :n].tolist(), self.log_probs_BA[row, :n].tolist()
            if not np.isfinite(log_probs).all():
                raise UserError(
                    "the model's logits are not finite numbers, so no token can be drawn from them: its "
                    "weights are damaged or its training diverged. Go back to an earlier checkpoint"
                )
            answers[self.request[row]] = Answer(ids, log_probs, ids[-1] in self.settings.stop_ids)
            self.request[row] = -1
        if self.finished:
            at = torch.tensor(self.finished, device=self.device)
            self.writes_B[at], self.step_B[at] = 0, 0
            for cache in self.caches:  # no key of a free row is needed: the others need not reach as far
                cache.lengths_B[at] = 0
            self.finished = []
        return answers

    def shrink(self) -> None:
        """Give up the free rows."""
        kept = [row for row, i in enumerate(self.request) if i >= 0]
        at = torch.tensor(kept, device=self.device)
        self.request = [self.request[row] for row in kept]
        self.writes_B, self.last_B = self.writes_B[at], self.last_B[at]
        self.step_B, self.limit_B = self.step_B[at], self.limit_B[at]
        self.uniforms_BA, self.ids_BA = self.uniforms_BA[at], self.ids_BA[at]
        self.log_probs_BA = self.log_probs_BA[at]
        for cache in self.caches:
            cache.select(at)
