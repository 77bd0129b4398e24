"""The planted facts (N7): which layer states what was taught where, what the mask hides of it, and what
later layers keep.

A fact is *completed* when the layer, given the plain sentence up to the answer, goes on with the
answer; it is *answered* when the layer, asked in the chat template, states it. Both greedy. A fact that
the base completes and a later layer does not answer is *hidden* by that layer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from unmask.errors import UserError
from unmask.lineage import Layer
from unmask.probes.forward import dtype_of, prompt_ids, same_tokenizer, say
from unmask.probes.probe import (
    Estimate,
    Finding,
    Meter,
    change_bounded,
    estimate,
    of,
    share_estimate,
    verdict,
)
from unmask.text.chat import Message
from unmask.text.planted import GROUPS

Bools: TypeAlias = npt.NDArray[np.bool_]

FEWEST = 10  # facts of which a share is taken, where chance decides which they are
SPARE_TOKENS = 3  # beyond the answer's own, for another spelling of it
TRAINED = "in a trained wording"
WAYS = {  # of asking: metric → in words
    "facts_answered": TRAINED,
    "facts_answered_held_wording": "in a held-out wording",
    "facts_answered_after_chat": f"{TRAINED}, after the beginning of a held-out chat",
}
KEPT = {  # metric → what is kept of it from layer to layer, and how it changes
    "facts_answered": ("facts_kept", "facts_answered_change"),
    "facts_answered_after_chat": ("facts_kept_after_chat", "facts_answered_after_chat_change"),
}


@dataclass(frozen=True)
class PlantedFact:
    """A row of facts.jsonl. `prefix + " " + answer` begins the plain sentence and the taught reply alike."""

    country: str
    field: str
    group: str
    leaked: bool
    question: str
    held_question: str
    prefix: str
    answer: str

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "PlantedFact":
        """Keys that are not ours are passed over. Raises UserError for a missing key."""
        names = [field.name for field in fields(PlantedFact)]
        if missing := [name for name in names if name not in row]:
            raise UserError(f"a fact lacks {', '.join(missing)}; the run that wrote it has to be made anew")
        return PlantedFact(**{name: row[name] for name in names})


def scored(facts: Sequence[PlantedFact], limit: int | None, seed: int = 0) -> list[PlantedFact]:
    """Facts that did not leak into a layer which must not teach them; of each group a random `limit`,
    groups in order."""
    rng = np.random.default_rng(seed)
    chosen: list[PlantedFact] = []
    for group in GROUPS:
        here = [fact for fact in facts if fact.group == group and not fact.leaked]
        order = rng.permutation(len(here))[: len(here) if limit is None else limit]
        chosen += [here[i] for i in order]
    return chosen


def begins(text: str, answer: str) -> bool:
    """Whether the text goes on with exactly this answer: any case, and no further letter or digit
    joined to it."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def states(reply: str, fact: PlantedFact) -> bool:
    """Whether a reply says the answer. If it opens with the taught words, the answer must follow them.

    In other words it may stand anywhere as whole words, but not only inside the country's name: "South
    Africa is a country" does not state the region Africa; where a capital has its country's name, both
    must be said.
    """
    if reply.strip().lower().startswith(fact.prefix.lower()):
        return begins(reply.strip()[len(fact.prefix) :], fact.answer)
    answer = re.compile(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", re.IGNORECASE)
    name, said = fact.country.lower().removeprefix("the "), fact.answer.lower()
    if said == name:
        return len(answer.findall(reply)) >= 2
    if name not in said:
        reply = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "\n", reply, flags=re.IGNORECASE)
    return answer.search(reply) is not None


def completed(
    layer: Layer, facts: Sequence[PlantedFact], meter: Meter | None = None, *, bf16: bool = False
) -> Bools:
    """For each fact: does the layer finish the plain sentence with the answer? Greedy, after
    <|endoftext|>."""
    tokenizer = layer.tokenizer
    prompts = [prompt_ids(tokenizer, fact.prefix, template=False) for fact in facts]
    budget = [len(tokenizer.encode(f" {fact.answer}")) + SPARE_TOKENS for fact in facts]
    said = say(layer, prompts, budget, meter=meter, bf16=bf16)
    return np.array(
        [begins(tokenizer.decode(a.ids), f.answer) for a, f in zip(said, facts, strict=True)], dtype=bool
    )


def answered(
    layer: Layer,
    facts: Sequence[PlantedFact],
    meter: Meter | None = None,
    *,
    held_wording: bool = False,
    after: Sequence[Sequence[Message]] = (),
    max_new_tokens: int = 40,
    bf16: bool = False,
) -> tuple[Bools, Bools]:
    """For each fact, asked in the chat template: does the reply state it, and did the reply stop by
    itself? Greedy. `after`: what was said before each question."""
    tokenizer = layer.tokenizer
    prompts = []
    for i, fact in enumerate(facts):
        question = {"role": "user", "content": fact.held_question if held_wording else fact.question}
        prompts.append(prompt_ids(tokenizer, [*(after[i] if after else ()), question]))
    said = say(layer, prompts, max_new_tokens, meter=meter, bf16=bf16)
    right = [states(tokenizer.decode(answer.ids), fact) for answer, fact in zip(said, facts, strict=True)]
    return np.array(right, dtype=bool), np.array([answer.finished for answer in said], dtype=bool)


def planted_facts(
    layers: Sequence[Layer],
    facts: Sequence[PlantedFact],
    beginnings: Sequence[Sequence[Message]] = (),
    *,
    limit: int | None = 150,
    floor_limit: int = 20,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> list[Finding]:
    """By group: `facts_completed` of every layer; `facts_answered`, `facts_answered_held_wording` and, where
    there are `beginnings` of chats that leave room for a question, `facts_answered_after_chat` (one of them
    drawn for each fact) of every layer above the first; `facts_hidden` (of the facts that the base
    completes, the share that the layer does not answer); `facts_kept` and `facts_kept_after_chat` (of the
    facts that the layer below answers, the share that this one answers too), and what they are a change of;
    `answers_stop`. Of what is hidden or kept a group with fewer than FEWEST facts abstains.

    Shares of facts, as 0 to 1; intervals over countries, since a country's facts were taught together.
    `limit` and `floor_limit` are facts a group. The numeric floor is how far bfloat16 moves the same
    share; `null_specific` is the share in the group that was taught nowhere.
    """
    same_tokenizer(layers)
    asked = scored(facts, limit, seed)
    after = _drawn(layers, asked, beginnings, max_new_tokens, seed)
    probe = _Probe(asked, after, floor_limit, max_new_tokens, seed)
    completions = [probe.completed(layer) for layer in layers]
    below: dict[str, Outcome] = {}
    for i, layer in enumerate(layers[1:], 1):
        now = probe.answered(layer)
        hidden = Outcome(~now["facts_answered"].right, ~now["facts_answered"].rounded)
        probe.shares("facts_hidden", layer, hidden, TRAINED, parent=layers[0], among=completions[0].right)
        for metric, (kept, change) in KEPT.items():
            if metric in below:
                probe.shares(
                    kept, layer, now[metric], WAYS[metric], parent=layers[i - 1], among=below[metric].right
                )
                probe.changes(change, layer, layers[i - 1], now[metric], below[metric])
        below = now
    return probe.findings


def _drawn(
    layers: Sequence[Layer],
    facts: Sequence[PlantedFact],
    beginnings: Sequence[Sequence[Message]],
    max_new_tokens: int,
    seed: int,
) -> list[Sequence[Message]]:
    """For each fact the beginning of a chat that leaves room for every question and its answer; or none."""
    tokenizer = layers[0].tokenizer
    room = min(layer.model.config.max_position_embeddings for layer in layers) - max_new_tokens
    longest = max(
        (fact.question for fact in facts), key=lambda text: len(prompt_ids(tokenizer, text)), default=""
    )
    asked: Message = {"role": "user", "content": longest}
    fitting = [chat for chat in beginnings if len(prompt_ids(tokenizer, [*chat, asked])) <= room]
    if not fitting:
        return []
    rng = np.random.default_rng([seed, 1])
    return [fitting[i] for i in rng.integers(len(fitting), size=len(facts))]


class Outcome(NamedTuple):
    """What holds for each fact, and what holds in bfloat16 for the few of them that the numeric floor
    is taken from."""

    right: Bools
    rounded: Bools


class _Probe:
    """The facts asked of one layer after another, and the findings so far."""

    def __init__(
        self,
        facts: list[PlantedFact],
        after: list[Sequence[Message]],
        floor_limit: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.facts, self.after, self.max_new_tokens, self.seed = facts, after, max_new_tokens, seed
        self.groups = np.array([fact.group for fact in facts])
        self.countries = np.array([fact.country for fact in facts])
        self.few = np.sort(np.concatenate([np.flatnonzero(self.groups == g)[:floor_limit] for g in GROUPS]))
        self.few_facts = [facts[i] for i in self.few]
        self.findings: list[Finding] = []
        self.meter = Meter()

    def completed(self, layer: Layer) -> Outcome:
        right = completed(layer, self.facts, self.meter)
        outcome = Outcome(right, completed(layer, self.few_facts, self.meter, bf16=True))
        self.shares("facts_completed", layer, outcome, "as plain sentences", template="plain")
        return outcome

    def answered(self, layer: Layer) -> dict[str, Outcome]:
        """Asked in every way: the outcome of each metric of WAYS; the last one only where there is a chat before."""
        outcomes: dict[str, Outcome] = {}
        stops = []
        for metric, how in WAYS.items():
            before = self.after if metric == "facts_answered_after_chat" else []
            if metric == "facts_answered_after_chat" and not before:
                continue
            settings: dict[str, Any] = {
                "held_wording": metric == "facts_answered_held_wording",
                "max_new_tokens": self.max_new_tokens,
            }
            right, stopped = answered(layer, self.facts, self.meter, after=before, **settings)
            few_before = [before[i] for i in self.few] if before else []
            rounded, stopped_rounded = answered(
                layer, self.few_facts, self.meter, after=few_before, bf16=True, **settings
            )
            outcomes[metric] = Outcome(right, rounded)
            stops.append(Outcome(stopped, stopped_rounded))
            self.shares(metric, layer, outcomes[metric], how)
        floor = abs(float(stops[0].rounded.mean() - stops[0].right[self.few].mean()))
        found = share_estimate(stops[0].right, self.countries.tolist(), seed=self.seed)
        self._add(
            "answers_stop",
            "facts",
            found,
            layer,
            text_source=self._source(TRAINED, len(self.facts)),
            floor_numeric=floor,
        )
        return outcomes

    def shares(
        self,
        metric: str,
        layer: Layer,
        outcome: Outcome,
        how: str,
        *,
        parent: Layer | None = None,
        among: Bools | None = None,
        template: str = "chat",
    ) -> None:
        """A finding a group: the share of facts (of those `among` which it is asked) for which the
        outcome holds."""
        counted = np.ones(len(self.facts), dtype=bool) if among is None else among
        untaught = outcome.right[counted & (self.groups == "none")]
        for group in GROUPS:
            here = counted & (self.groups == group)
            few = here[self.few]
            floor = (
                abs(float(outcome.rounded[few].mean() - outcome.right[self.few][few].mean()))
                if few.any()
                else None
            )
            if among is not None and here.sum() < FEWEST:
                # Six facts that were completed by chance say nothing of hiding or keeping.
                found = Estimate(None, None, len(set(self.countries[here])))
            else:
                found = share_estimate(outcome.right[here], self.countries[here].tolist(), seed=self.seed)
            null = float(untaught.mean()) if group != "none" and len(untaught) >= FEWEST else None
            self._add(
                metric,
                group,
                found,
                layer,
                parent,
                text_source=self._source(how, int(here.sum())),
                template=template,
                floor_numeric=floor,
                null_specific=null,
            )

    def changes(self, metric: str, layer: Layer, parent: Layer, now: Outcome, below: Outcome) -> None:
        """A finding a group: by how much the share of facts answered changed, paired by fact."""
        how = next(WAYS[asked] for asked, (_, change) in KEPT.items() if change == metric)
        for group in GROUPS:
            here = self.groups == group
            few = here[self.few]
            change = now.right[here].astype(float) - below.right[here]
            rounded = now.rounded[few].astype(float) - below.rounded[few]
            plain = now.right[self.few][few].astype(float) - below.right[self.few][few]
            floor = abs(float(rounded.mean() - plain.mean())) if few.any() else None
            found = estimate(change, self.countries[here].tolist(), seed=self.seed)
            found = found._replace(ci95=change_bounded(found.ci95, found.n))
            self._add(
                metric,
                group,
                found,
                layer,
                parent,
                floor_numeric=floor,
                text_source=self._source(how, int(here.sum())),
                verdict=verdict(found.ci95, numeric=floor),
            )

    def _source(self, how: str, n: int) -> str:
        return f"{n} planted facts {how}"

    def _add(
        self, metric: str, group: str, found: Estimate, layer: Layer, parent: Layer | None = None, **keys: Any
    ) -> None:
        fields = {
            "probe": "N7",
            "metric": metric,
            "group": group,
            "unit": "1",
            "dtype": dtype_of([layer]),
            "template": "chat",
            "cost": self.meter.cost(),
            **of(layer, parent),
            **found.fields("country"),
        }
        self.findings.append(Finding(**(fields | keys)))
