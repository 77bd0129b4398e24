"""Is blame right? (N7) Facts were planted in known layers, so a layer's delta on their answers has a
truth to meet.

For each fact: its question in the chat template, then the taught reply up to and with the answer,
teacher-forced. The child's delta summed over the answer's tokens must be large where the child alone
taught the fact and small where the parent knew it. The tokens before the answer are the mask's own
wrapping.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unmask.lineage import Layer
from unmask.probes.facts import Bools, PlantedFact, scored
from unmask.probes.forward import Text, bf16_copy, dtype_of, prompt_ids, same_tokenizer, teacher_forced
from unmask.probes.probe import Estimate, Finding, Floats, Meter, codes, estimate, of, percentiles, verdict
from unmask.text.planted import GROUPS
from unmask.text.tokenizer import Tokenizer

SHUFFLES = 1000


class Nats(NamedTuple):
    """Of each fact (F,): the child's delta on its answer and on the words before it, and log p of the
    answer under the parent."""

    answer: Floats
    wrapping: Floats
    parent_answer: Floats


def fact_text(tokenizer: Tokenizer, fact: PlantedFact) -> tuple[Text, int]:
    """The question in the template with `prefix + " " + answer` as its reply, and how many of the
    scored tokens come before the answer. A token that holds the end of the prefix and the start of the
    answer counts as answer."""
    context, reply = prompt_ids(tokenizer, fact.question), tokenizer.encode(f"{fact.prefix} {fact.answer}")
    ends = np.cumsum([len(tokenizer.token_bytes[i]) for i in reply])
    before = int(np.searchsorted(ends, len(fact.prefix.encode()), side="right"))
    return Text([*context, *reply], len(context)), before


def fact_nats(
    parent: Layer, child: Layer, facts: Sequence[PlantedFact], meter: Meter, *, bf16: bool = False
) -> Nats:
    """Reads every fact with both layers; with `bf16` with their bfloat16 copies."""
    models = [bf16_copy(layer.model) if bf16 else layer.model for layer in (parent, child)]
    texts, before = zip(*(fact_text(child.tokenizer, fact) for fact in facts), strict=True)
    rows = [each.numpy() for each in teacher_forced(models, texts, meter=meter)]
    delta = [row[:, 1] - row[:, 0] for row in rows]
    return Nats(
        answer=np.array([d[b:].sum() for d, b in zip(delta, before, strict=True)]),
        wrapping=np.array([d[:b].sum() for d, b in zip(delta, before, strict=True)]),
        parent_answer=np.array([row[b:, 0].sum() for row, b in zip(rows, before, strict=True)]),
    )


def auc(scores: Floats, positive: Bools, weights: Floats) -> Floats:
    """P(a positive's score > a negative's) + ½ P(equal), for each row of weights (R, N): (R,).

    The Mann–Whitney statistic over all pairs; a pair weighs the product of its two weights. NaN without
    a pair.
    """
    a, b = scores[positive][:, None], scores[~positive][None]
    wins = (a > b) + 0.5 * (a == b)
    w_a, w_b = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = ((w_a @ wins) * w_b).sum(1) / (w_a.sum(1) * w_b.sum(1))
    return area


def shuffled_auc(scores: Floats, positive: Bools, countries: Sequence[Any], seed: int = 0) -> Floats:
    """AUCs when groups are dealt anew to whole countries (SHUFFLES,): what chance gives for these scores."""
    code, units = codes(countries, len(scores))
    group = np.zeros(units, dtype=bool)
    group[code] = positive
    rng = np.random.default_rng(seed)
    ones = np.ones((1, len(scores)))
    return np.concatenate([auc(scores, rng.permutation(group)[code], ones) for _ in range(SHUFFLES)])


def blame_truth(
    parent: Layer,
    child: Layer,
    facts: Sequence[PlantedFact],
    *,
    limit: int | None = 150,
    floor_limit: int = 20,
    seed: int = 0,
) -> list[Finding]:
    """`blame_auc` of the child's delta on answers: facts taught by the child alone against those of
    each group that the parent was taught, and the same with groups dealt anew to countries; mean nats
    of answer and wrapping by group.

    Meant for base and SFT. Intervals redraw countries; that of `shuffled` is the middle 95 % of chance,
    whose upper end is `null_specific` of the others. `limit` and `floor_limit` are facts a group; the
    numeric floor is how far bfloat16 moves the same figure on the few.
    """
    same_tokenizer([parent, child])
    meter = Meter()
    chosen = scored(facts, limit, seed)
    groups = np.array([fact.group for fact in chosen])
    countries = np.array([fact.country for fact in chosen])
    few = np.sort(np.concatenate([np.flatnonzero(groups == group)[:floor_limit] for group in GROUPS]))
    nats = fact_nats(parent, child, chosen, meter)
    rounded = fact_nats(parent, child, [chosen[i] for i in few], meter, bf16=True)
    findings: list[Finding] = []

    def add(metric: str, group: str, unit: str, found: Estimate, n: int, **keys: Any) -> None:
        fields = {
            "probe": "N7",
            "metric": metric,
            "group": group,
            "unit": unit,
            "dtype": dtype_of([parent, child]),
            "template": "chat",
            "text_source": f"{n} taught replies, teacher-forced",
            "cost": meter.cost(),
            **of(child, parent),
            **found.fields("country"),
        }
        findings.append(Finding(**(fields | keys)))

    for other in ("both", "base_only"):
        here = (groups == "sft_only") | (groups == other)
        positive, scores, where = groups[here] == "sft_only", nats.answer[here], countries[here].tolist()
        if positive.all() or not positive.any():
            continue
        chance = shuffled_auc(scores, positive, where, seed)
        interval = percentiles(chance)
        assert interval is not None
        found = _auc_estimate(scores, positive, where, seed)
        at_few = here[few]
        floor = _moved(nats.answer[few][at_few], rounded.answer[at_few], groups[few][at_few] == "sft_only")
        word = verdict(found.ci95, zero=0.5, numeric=floor)
        n = int(here.sum())
        add(
            "blame_auc",
            f"sft_only_vs_{other}",
            "1",
            found,
            n,
            floor_numeric=floor,
            null_specific=interval[1],
            verdict=word,
        )
        if other == "both":
            shuffled = Estimate(float(chance.mean()), interval, len(set(where)))
            add("blame_auc", "shuffled", "1", shuffled, n, floor_numeric=floor)
    for group in GROUPS:
        here, at_few = groups == group, groups[few] == group
        for metric, values, moved in (
            ("answer_delta", nats.answer, rounded.answer),
            ("wrapping_delta", nats.wrapping, rounded.wrapping),
            ("answer_log_prob_parent", nats.parent_answer, rounded.parent_answer),
        ):
            floor = abs(float((moved[at_few] - values[few][at_few]).mean())) if at_few.any() else None
            found = estimate(values[here], countries[here].tolist(), seed=seed)
            add(metric, group, "nats", found, int(here.sum()), floor_numeric=floor)
    return findings


def _auc_estimate(scores: Floats, positive: Bools, countries: Sequence[Any], seed: int) -> Estimate:
    return estimate(scores, countries, lambda values, weights: auc(values, positive, weights), seed=seed)


def _moved(scores: Floats, rounded: Floats, positive: Bools) -> float | None:
    """How far rounding moves the AUC; None where the few facts hold no pair."""
    ones = np.ones((1, len(scores)))
    change = (
        float(abs(auc(scores, positive, ones) - auc(rounded, positive, ones))[0]) if len(scores) else np.nan
    )
    return change if np.isfinite(change) else None
