"""How far a layer is from its parent, token by token: KL both ways, JS (T1-2), and the shift of the
likeliest token (T1-1).

Both layers read the same text, and whose text it is matters: A is the child's own (greedy, and one
sample at temperature 1), P the parent's own sample, N neutral held-out text. A KL is an average over
its first argument's choices, so `kl_child_parent` belongs on A and `kl_parent_child` on P. Full
vocabulary, float32 log-softmax. The stop token that ends an answer is not part of the averages; it has
a line of its own, as template tokens would drown the rest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask import delta
from unmask.generation.engine import Answer
from unmask.lineage import Layer
from unmask.model.decoder import Decoder
from unmask.probes.compression import Document
from unmask.probes.forward import Read, Text, bf16_copy, dtype_of, same_tokenizer, say, teacher_forced
from unmask.probes.probe import Finding, Floats, Meter, estimate, of, pairs, verdict

# What is read at each position for each pair of models.
KL_CHILD_PARENT, KL_PARENT_CHILD, JS, RANK, TIES, ENTROPY_PARENT, COLUMNS = range(7)


def content(answer: Answer) -> list[int]:
    """The ids of an answer without the stop token that ended it."""
    return answer.ids[:-1] if answer.finished else answer.ids


def answer_texts(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Text]:
    """Prompt and answer, scored where the answer's content is. Answers without content are left out."""
    return [
        Text([*prompt, *content(answer)], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if content(answer)
    ]


def stop_texts(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Text]:
    """Prompt and answer, scored only where the answer stopped."""
    return [
        Text([*prompt, *answer.ids], len(prompt) + len(answer.ids) - 1)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.finished
    ]


def neutral_texts(layer: Layer, documents: Iterable[Document], limit: int, tokens: int) -> list[Text]:
    """The beginnings of the first `limit` documents, `tokens` long at most, after <|endoftext|>."""
    texts = [
        Text([layer.tokenizer.end_of_text, *layer.tokenizer.encode(document.text)][: tokens + 1], 1)
        for document, _ in zip(documents, range(limit), strict=False)
    ]
    return [text for text in texts if len(text.ids) > 1]


def read_pairs(places: Sequence[tuple[int, int]]) -> Read:
    """A read of COLUMNS numbers for each (parent, child) place among the models, side by side."""

    def read(logits: Sequence[Tensor], targets_N: Tensor) -> Tensor:
        columns: list[Tensor] = []
        for parent, child in places:
            far = delta.divergences(logits[child], logits[parent])
            rank_N, ties_N = delta.shift(logits[child], logits[parent])
            columns += [
                far.kl_child_parent_T,
                far.kl_parent_child_T,
                far.js_T,
                rank_N,
                ties_N,
                far.entropy_parent_T,
            ]
        return torch.stack([column.float() for column in columns], 1)

    return read


class Metric(NamedTuple):
    """A number of one response, from its rows (A, COLUMNS); NaN where the response is too short to have it.

    `same` is what two equal models give; None where they give nothing (then `null` permutes positions
    instead).
    """

    probe: str
    name: str
    unit: str
    of: Callable[[Floats], float]
    group: str | None = None
    same: float | None = 0.0


def half_life(row: Floats) -> float:
    """The least k for which the first k tokens hold half of the summed kl_child_parent; NaN where all
    of it is 0."""
    total = np.cumsum(row[:, KL_CHILD_PARENT])
    return float(np.searchsorted(total, total[-1] / 2) + 1) if total[-1] > 0 else math.nan


def early_share(row: Floats, k: int) -> float:
    """Share of the summed kl_child_parent that the first k of T tokens hold, less k/T; NaN without more
    than k tokens."""
    kl = row[:, KL_CHILD_PARENT]
    return float(kl[:k].sum() / kl.sum() - k / len(kl)) if len(kl) > k and kl.sum() > 0 else math.nan


def mean_of(column: int, first: int = 1, last: int | None = None) -> Callable[[Floats], float]:
    """Mean of a column over the tokens first to last (from 1) that a response has."""
    return lambda row: float(row[first - 1 : last, column].mean()) if len(row) >= first else math.nan


def share_of(low: int, high: float, first: int = 1, last: int | None = None) -> Callable[[Floats], float]:
    """Per cent of the tokens first to last at which the child's likeliest token has rank low to high
    under the parent."""

    def read(row: Floats) -> float:
        rank = row[first - 1 : last, RANK]
        return 100 * float(((rank >= low) & (rank <= high)).mean()) if len(rank) else math.nan

    return read


DISTANCES = (
    Metric("T1-2", "kl_child_parent", "nats/token", mean_of(KL_CHILD_PARENT)),
    Metric("T1-2", "kl_parent_child", "nats/token", mean_of(KL_PARENT_CHILD)),
    Metric("T1-2", "js", "nats/token", mean_of(JS)),
)
SHIFTS = (
    Metric("T1-1", "unshifted", "%", share_of(1, 1), same=100.0),
    Metric("T1-1", "marginal", "%", share_of(2, 3)),
    Metric("T1-1", "shifted", "%", share_of(4, math.inf)),
)
SPANS = (
    ("token 1", 1, 1),
    ("token 2", 2, 2),
    ("tokens 3–5", 3, 5),
    ("tokens 6–10", 6, 10),
    ("tokens 11–20", 11, 20),
    ("tokens 21+", 21, None),
)
PROFILE = (
    Metric(
        "T1-2", "kl_child_parent_response", "nats/response", lambda row: float(row[:, KL_CHILD_PARENT].sum())
    ),
    Metric("T1-2", "depth_half_life", "tokens", half_life, same=None),
    *(
        Metric("T1-2", "early_share", "1", partial(early_share, k=k), f"first {k}", same=None)
        for k in (1, 3, 5, 10)
    ),
    *(
        metric
        for group, first, last in SPANS
        for metric in (
            Metric("T1-2", "kl_child_parent", "nats/token", mean_of(KL_CHILD_PARENT, first, last), group),
            Metric(
                "T1-2", "entropy_parent", "nats/token", mean_of(ENTROPY_PARENT, first, last), group, same=None
            ),
        )
    ),
)
BY_POSITION = (
    *(
        Metric("T1-1", "unshifted", "%", share_of(1, 1, first, last), group, 100.0)
        for group, first, last in SPANS
    ),
    Metric("T1-1", "ties", "%", lambda row: 100 * float((row[:, TIES] > 0).mean())),
)


class Corpus(NamedTuple):
    """Texts of one source, the pairs (parent, child) that read them, what redrawing redraws, and what
    to tell of them."""

    source: str
    unit: str
    texts: Sequence[Text]
    pairs: Sequence[tuple[int, int]]
    metrics: Sequence[Metric]
    owners: Sequence[int] = ()  # the prompt that each text answers


def divergence(
    layers: Sequence[Layer],
    prompts: Sequence[Sequence[int]],
    documents: Iterable[Document] = (),
    *,
    max_new_tokens: int = 48,
    limit: int | None = 128,
    neutral_limit: int = 48,
    floor_limit: int = 24,
    template: str = "chat",
    seed: int = 0,
) -> list[Finding]:
    """T1-1 and T1-2 for each layer beside the one below it, and the last beside the first, on texts A,
    P and N.

    Means are over the tokens of a response, then over responses; intervals redraw prompts (N:
    documents). On the child's own sample also the profile over an answer's tokens and the stop token,
    on its greedy answer the shift by position. The numeric floor is the same figure between a layer and
    its bfloat16 copy on the first `floor_limit` texts, the larger of the two layers'. `prompts` are
    ids; `limit` of them are answered in up to `max_new_tokens`. A KL is not additive: `kl_path_excess`
    is KL(last ‖ first) less the sum of the steps between, each on its own child's sample.
    """
    same_tokenizer(layers)
    probe = _Probe(layers, floor_limit, template, seed)
    prompts = prompts[:limit]
    compared = pairs(layers)
    for k, layer in enumerate(layers):
        as_child = [pair for pair in compared if pair[1] == k]
        as_parent = [pair for pair in compared if pair[0] == k]
        if as_child:
            answers = say(layer, prompts, max_new_tokens, seed=seed, meter=probe.meter)
            metrics = (*DISTANCES, *SHIFTS, *BY_POSITION)
            probe.read(Corpus("A greedy", "prompt", answer_texts(prompts, answers), as_child, metrics))
        answers = say(layer, prompts, max_new_tokens, temperature=1.0, seed=seed, meter=probe.meter)
        texts, owners = (
            answer_texts(prompts, answers),
            [i for i, answer in enumerate(answers) if content(answer)],
        )
        probe.read(
            Corpus("A sample", "prompt", texts, as_child, (*DISTANCES, *SHIFTS, *PROFILE), owners),
            Corpus("P sample", "prompt", texts, as_parent, (*DISTANCES, *SHIFTS)),
        )
        stops = [metric._replace(group="stop token") for metric in DISTANCES]
        probe.read(Corpus("A sample", "prompt", stop_texts(prompts, answers), as_child, stops))
    context = min(layer.model.config.max_position_embeddings for layer in layers)
    neutral = neutral_texts(layers[0], documents, neutral_limit, context)
    probe.read(Corpus("N", "document", neutral, compared, (*DISTANCES, *SHIFTS)))
    probe.path_excess()
    return probe.findings


class _Probe:
    """Reads one corpus after another with the layers that need it, and keeps the findings."""

    def __init__(self, layers: Sequence[Layer], floor_limit: int, template: str, seed: int) -> None:
        self.layers, self.floor_limit, self.template, self.seed = layers, floor_limit, template, seed
        self.twins = [bf16_copy(layer.model) for layer in layers]
        self.own: dict[tuple[int, int], dict[int, float]] = {}  # kl_child_parent of each prompt, on A sample
        self.findings: list[Finding] = []
        self.meter = Meter()

    def read(self, *corpora: Corpus) -> None:
        """One pass over the texts, which all these corpora share."""
        texts, wanted = corpora[0].texts, [pair for corpus in corpora for pair in corpus.pairs]
        if not texts or not wanted:
            return
        members = sorted({k for pair in wanted for k in pair})
        places = [(members.index(a), members.index(b)) for a, b in wanted]
        rows = self._rows([self.layers[k].model for k in members], places, texts)
        few = texts[: self.floor_limit]
        noise = {k: self._rows([self.twins[k], self.layers[k].model], [(0, 1)], few)[0] for k in members}
        each = iter(rows)
        for corpus in corpora:
            for a, b in corpus.pairs:
                found = next(each)
                if corpus.owners:
                    kl = _defined(mean_of(KL_CHILD_PARENT), found)
                    self.own[a, b] = dict(zip(corpus.owners, kl.tolist(), strict=True))
                for metric in corpus.metrics:
                    self._add(corpus, metric, a, b, found, [noise[a], noise[b]])

    def path_excess(self) -> None:
        """KL(last ‖ first) less the sum of the steps between, over the prompts that all of them answered."""
        n = len(self.layers)
        steps = [(k, k + 1) for k in range(n - 1)]
        if n < 3 or not all(pair in self.own for pair in (*steps, (0, n - 1))):
            return
        whole = self.own[0, n - 1]
        common = [i for i in whole if all(i in self.own[step] for step in steps)]
        excess = [whole[i] - sum(self.own[step][i] for step in steps) for i in common]
        found = estimate(excess, seed=self.seed)
        self.findings.append(
            Finding(
                probe="T1-2",
                metric="kl_path_excess",
                unit="nats/token",
                text_source="A sample",
                cost=self.meter.cost(),
                dtype=dtype_of(self.layers),
                template=self.template,
                **of(self.layers[-1], self.layers[0]),
                **found.fields("prompt"),
            )
        )

    def _rows(
        self, models: Sequence[Decoder], places: Sequence[tuple[int, int]], texts: Sequence[Text]
    ) -> list[list[Floats]]:
        """For each place the rows (A, COLUMNS) of every text."""
        wide = [each.numpy() for each in teacher_forced(models, texts, read_pairs(places), meter=self.meter)]
        return [[row[:, i * COLUMNS : (i + 1) * COLUMNS] for row in wide] for i in range(len(places))]

    def _add(
        self,
        corpus: Corpus,
        metric: Metric,
        a: int,
        b: int,
        rows: Sequence[Floats],
        noise: Sequence[Sequence[Floats]],
    ) -> None:
        found = estimate(_defined(metric.of, rows), seed=self.seed)
        if metric.group is not None and found.n < 2:
            return  # hardly an answer is so long, or stops: there is nothing to tell
        keys = found.fields(corpus.unit)
        if metric.same is not None:
            means = [values.mean() for values in (_defined(metric.of, few) for few in noise) if len(values)]
            floor = max((abs(float(mean) - metric.same) for mean in means), default=None)
            keys |= {"floor_numeric": floor, "verdict": verdict(found.ci95, zero=metric.same, numeric=floor)}
        elif metric.of is half_life or metric.name == "early_share":
            rng = np.random.default_rng(self.seed)
            permuted = _defined(metric.of, [rng.permutation(row) for row in rows])
            keys["null_specific"] = float(permuted.mean()) if len(permuted) else None
        self.findings.append(
            Finding(
                probe=metric.probe,
                metric=metric.name,
                group=metric.group,
                unit=metric.unit,
                text_source=corpus.source,
                dtype=dtype_of(self.layers),
                template="plain" if corpus.source == "N" else self.template,
                cost=self.meter.cost(),
                **of(self.layers[b], self.layers[a]),
                **keys,
            )
        )


def _defined(read: Callable[[Floats], float], rows: Sequence[Floats]) -> Floats:
    """What `read` makes of each response that has it."""
    values = np.array([read(row) for row in rows], dtype=np.float64)
    return values[np.isfinite(values)]
