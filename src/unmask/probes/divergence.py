"""How far a layer is from its parent, token by token: KL both ways, JS (T1-2), and the shift of the
likeliest token (T1-1).

Both layers read the same text, and whose text it is matters: A is the child's own (greedy, and one
sample at temperature 1), P the parent's own sample, N neutral held-out text. A KL is an average over
its first argument's choices, so `kl_child_parent` belongs on A and `kl_parent_child` on P. Full
vocabulary, float32 log-softmax. The stop token that ends an answer is not part of the averages; it has
a line of its own, as template tokens would drown the rest.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from unmask.generation.engine import Answer
from unmask.lineage import Layer
from unmask.model.foreign import LanguageModel
from unmask.probes.compression import Document
from unmask.probes.forward import Text, bf16_copy, dtype_of, same_tokenizer, say, teacher_forced
from unmask.probes.probe import Finding, Floats, Meter, estimate, of, pairs, verdict
from unmask.probes.profile import (
    BY_POSITION,
    COLUMNS,
    DISTANCES,
    KL,
    PROFILE,
    SHIFTS,
    Metric,
    defined,
    half_life,
    read_pairs,
)


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
    neutral_tokens: int = 128,
    floor_limit: int = 24,
    template: str = "chat",
    seed: int = 0,
) -> list[Finding]:
    """T1-1 and T1-2 for each layer beside the one below it, and the last beside the first, on texts A,
    P and N.

    Means are over the tokens of a response, then over responses; intervals redraw prompts (N:
    documents). On the child's own sample also the profile over an answer's tokens and the stop token,
    on its greedy answer the shift by position. The numeric floor is the same figure between a layer and
    its bfloat16 copy on `floor_limit` of the texts, the larger of the two layers'. `prompts` are
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
        texts = answer_texts(prompts, answers)
        owners = [i for i, answer in enumerate(answers) if content(answer)]
        probe.read(
            Corpus("A sample", "prompt", texts, as_child, (*DISTANCES, *SHIFTS, *PROFILE), owners),
            Corpus("P sample", "prompt", texts, as_parent, (*DISTANCES, *SHIFTS)),
        )
        stops = [metric._replace(group="stop token") for metric in DISTANCES]
        probe.read(Corpus("A sample", "prompt", stop_texts(prompts, answers), as_child, stops))
    context = min(layer.model.config.max_position_embeddings for layer in layers)
    neutral = neutral_texts(layers[0], documents, neutral_limit, min(neutral_tokens, context))
    probe.read(Corpus("N", "document", neutral, compared, (*DISTANCES, *SHIFTS)))
    probe.path_excess()
    return probe.findings


class _Probe:
    """Reads one corpus after another with the layers that need it, and keeps the findings."""

    def __init__(self, layers: Sequence[Layer], floor_limit: int, template: str, seed: int) -> None:
        self.layers, self.floor_limit, self.template, self.seed = layers, floor_limit, template, seed
        self.twins = [bf16_copy(layer.model) for layer in layers]
        # Of kl_child_parent on the child's own sample, for each pair: each prompt's, and the floor.
        self.own: dict[tuple[int, int], dict[int, float]] = {}
        self.own_floor: dict[tuple[int, int], float] = {}
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
        few = spread(texts, self.floor_limit)
        noise = {k: self._rows([self.twins[k], self.layers[k].model], [(0, 1)], few)[0] for k in members}
        each = iter(rows)
        for corpus in corpora:
            for a, b in corpus.pairs:
                found = next(each)
                if corpus.owners:
                    kl = defined(KL.of, found)
                    self.own[a, b] = dict(zip(corpus.owners, kl.tolist(), strict=True))
                    self.own_floor[a, b] = _floor(KL, [noise[a], noise[b]])
                for metric in corpus.metrics:
                    self._add(corpus, metric, a, b, found, [noise[a], noise[b]])

    def path_excess(self) -> None:
        """KL(last ‖ first) less the sum of the steps between, over the prompts that all of them answered.
        Its numeric floor is the sum of theirs."""
        n = len(self.layers)
        steps = [(k, k + 1) for k in range(n - 1)]
        if n < 3 or not all(pair in self.own for pair in (*steps, (0, n - 1))):
            return
        whole = self.own[0, n - 1]
        common = [i for i in whole if all(i in self.own[step] for step in steps)]
        excess = [whole[i] - sum(self.own[step][i] for step in steps) for i in common]
        found = estimate(excess, seed=self.seed)
        floor = sum(self.own_floor[pair] for pair in (*steps, (0, n - 1)))
        keys = found.fields("prompt") | {"verdict": verdict(found.ci95, numeric=floor)}
        self.findings.append(
            Finding(
                probe="T1-2",
                metric="kl_path_excess",
                unit="nats/token",
                text_source="A sample",
                cost=self.meter.cost(),
                dtype=dtype_of(self.layers),
                template=self.template,
                floor_numeric=floor,
                **of(self.layers[-1], self.layers[0]),
                **keys,
            )
        )

    def _rows(
        self, models: Sequence[LanguageModel], places: Sequence[tuple[int, int]], texts: Sequence[Text]
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
        found = estimate(defined(metric.of, rows), seed=self.seed)
        if metric.group is not None and found.n < 2:
            return  # hardly an answer is so long, or stops: there is nothing to tell
        keys = found.fields(corpus.unit)
        if metric.same is not None:
            floor = _floor(metric, noise)
            keys |= {"floor_numeric": floor, "verdict": verdict(found.ci95, zero=metric.same, numeric=floor)}
        elif metric.of is half_life or metric.name == "early_share":
            rng = np.random.default_rng(self.seed)
            permuted = defined(metric.of, [rng.permutation(row) for row in rows])
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


def spread(texts: Sequence[Text], limit: int) -> list[Text]:
    """`limit` of the texts, evenly over their lengths from the longest to the shortest."""
    by_length = sorted(texts, key=lambda text: len(text.ids) - text.start)
    places = np.linspace(len(texts) - 1, 0, min(limit, len(texts))).round().astype(int)
    return [by_length[i] for i in places]


def _floor(metric: Metric, noise: Sequence[Sequence[Floats]]) -> float:
    """How far rounding alone takes the metric from what equal models give: the larger of the layers' means.

    The longest text is among the noise, so whatever position two responses have, it has too.
    """
    assert metric.same is not None
    return max(abs(float(defined(metric.of, few).mean()) - metric.same) for few in noise)
