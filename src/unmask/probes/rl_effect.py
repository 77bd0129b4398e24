"""What the nudge did (G-9): reward and length-controlled gold of RL against its parent, and what it cost.

Both layers answer the same prompts at temperature 1 with the same uniform numbers, so differences are
paired by prompt. Reward models learned from conversations that end: answers that were cut, or that
stopped with another token than the one which ends a turn, are never scored, and a gain is over the
prompts that both layers finished; `answers_stop` says how many that leaves out.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from unmask.errors import UserError
from unmask.generation.engine import Answer
from unmask.lineage import Layer
from unmask.probes.divergence import answer_texts, content
from unmask.probes.forward import Judge, bf16_copy, dtype_of, judged, same_tokenizer, say, teacher_forced
from unmask.probes.probe import Estimate, Finding, Floats, Meter, change_bounded, estimate, of, verdict
from unmask.probes.profile import COLUMNS, KL_CHILD_PARENT, read_pairs


def capitals(text: str) -> float:
    """Share of a text's letters that are capitals; 0 without letters."""
    letters = [character for character in text if character.isalpha()]
    return sum(character.isupper() for character in letters) / max(1, len(letters))


def controlled_gain(values: Floats, weights: Floats) -> Floats:
    """Mean gain of the child at equal length (R,), from values (N, 4): score of parent and child,
    length of parent and child.

    gain − b · (mean length child − mean length parent), b the common slope of score on length within
    the two layers (analysis of covariance; least squares). Without any spread of length within layers,
    the plain gain.
    """
    share = weights / weights.sum(1, keepdims=True)
    means = share @ values
    centred = values[None] - means[:, None]
    score, length = centred[..., :2], centred[..., 2:]
    both = (share[..., None] * score * length).sum((1, 2))
    spread = (share[..., None] * length**2).sum((1, 2))
    slope = np.divide(both, spread, out=np.zeros_like(both), where=spread > 1e-12)
    gain: Floats = (means[:, 1] - means[:, 0]) - slope * (means[:, 3] - means[:, 2])
    return gain


def rl_effect(
    parent: Layer,
    child: Layer,
    prompts: Sequence[Sequence[int]],
    proxy: Judge,
    gold: Judge | None,
    *,
    max_new_tokens: int = 48,
    limit: int | None = 256,
    floor_limit: int = 24,
    seed: int = 0,
) -> list[Finding]:
    """`proxy_gain` (of the reward model that RL climbed), `gold_gain` (of a second judge, at equal
    length: `controlled_gain`), both judges' mean score of each layer, `kl_child_parent` on the child's
    own sampled answers, and of each layer `answers_stop`, `answer_length` and the share of `capitals`,
    with their changes. `prompts` are ids that end with the opened assistant turn.

    Scores are log-odds of a person's preference, offsets taken off. Intervals redraw prompts. The
    numeric floor is how far the figure moves on the first `floor_limit` prompts when the judges, or the
    layers that speak, are in bfloat16; for the KL it is what the layers' bfloat16 copies show against
    themselves.
    """
    same_tokenizer([parent, child])
    if not prompts:
        raise UserError("there is no prompt to compare the layers on: give some held-out ones")
    report = _Report(parent, child, seed)
    settings: dict[str, Any] = {"temperature": 1.0, "seed": seed, "meter": report.meter}
    prompts, few = prompts[:limit], prompts[:limit][:floor_limit]
    old, new = (say(layer, prompts, max_new_tokens, **settings) for layer in (parent, child))
    old_few, new_few = (say(layer, few, max_new_tokens, bf16=True, **settings) for layer in (parent, child))
    reads: tuple[tuple[str, str, Callable[[Answer], float]], ...] = (
        ("answers_stop", "1", lambda answer: float(answer.finished)),
        ("answer_length", "tokens", lambda answer: float(len(content(answer)))),
        ("capitals", "1", lambda answer: capitals(parent.tokenizer.decode(answer.ids))),
    )
    for metric, unit, read in reads:
        sides = [np.array([read(answer) for answer in answers]) for answers in (old, new)]
        rounded = [np.array([read(answer) for answer in answers]) for answers in (old_few, new_few)]
        report.levels(metric, unit, sides, rounded, share=metric == "answers_stop")
        report.change(f"{metric}_change", unit, sides, rounded, share=metric == "answers_stop")

    end = parent.tokenizer.turn_end  # the only one that a reward model has seen
    whole = [i for i in range(len(prompts)) if old[i].ids[-1] == new[i].ids[-1] == end]
    texts = [[[*prompts[i], *answers[i].ids] for i in whole] for answers in (old, new)]
    lengths = [np.array([float(len(content(answers[i]))) for i in whole]) for answers in (old, new)]
    for judge, level, gain in (
        (proxy, "proxy_reward", "proxy_gain"),
        (gold, "gold_reward", "gold_gain_any_length"),
    ):
        if judge is None:
            continue
        sides = [judged(judge, side, meter=report.meter) for side in texts]
        rounded = [judged(judge, side[:floor_limit], meter=report.meter, bf16=True) for side in texts]
        report.levels(level, "log-odds", sides, rounded)
        report.change(gain, "log-odds", sides, rounded)
        if judge is gold:
            report.change("gold_gain", "log-odds", sides, rounded, lengths)
    report.kl(prompts, new, floor_limit)
    return report.findings


class _Report:
    """Findings about a child beside its parent. `sides` are arrays of the parent's and the child's
    values, a prompt each; `rounded` the same of the first few prompts in bfloat16."""

    def __init__(self, parent: Layer, child: Layer, seed: int) -> None:
        self.parent, self.child, self.seed = parent, child, seed
        self.findings: list[Finding] = []
        self.meter = Meter()

    def levels(
        self,
        metric: str,
        unit: str,
        sides: Sequence[Floats],
        rounded: Sequence[Floats],
        *,
        share: bool = False,
    ) -> None:
        for layer, values, few in zip((self.parent, self.child), sides, rounded, strict=True):
            floor = abs(float(few.mean() - values[: len(few)].mean())) if len(few) else None
            self._add(
                metric, unit, estimate(values, share=share, seed=self.seed), of(layer), floor_numeric=floor
            )

    def change(
        self,
        metric: str,
        unit: str,
        sides: Sequence[Floats],
        rounded: Sequence[Floats],
        lengths: Sequence[Floats] | None = None,
        *,
        share: bool = False,
    ) -> None:
        """Child − parent, paired by prompt; with `lengths` at equal length."""
        columns = [*sides, *(lengths if lengths is not None else (np.zeros_like(sides[0]),) * 2)]
        found = estimate(np.stack(columns, 1), statistic=controlled_gain, seed=self.seed)
        if share:
            found = found._replace(ci95=change_bounded(found.ci95, found.n))
        n = len(rounded[0])
        floor = abs(float((rounded[1] - rounded[0]).mean() - (sides[1] - sides[0])[:n].mean())) if n else None
        word = verdict(found.ci95, numeric=floor)
        self._add(metric, unit, found, of(self.child, self.parent), floor_numeric=floor, verdict=word)

    def kl(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], floor_limit: int) -> None:
        """Nats a token between child and parent where the child answers, stop tokens aside (they are
        T1-2's own line)."""
        layers = (self.parent, self.child)
        texts = answer_texts(prompts, answers)
        read = teacher_forced(
            [layer.model for layer in layers], texts, read_pairs([(0, 1)]), meter=self.meter
        )
        twins = [each for layer in layers for each in (bf16_copy(layer.model), layer.model)]
        noise = teacher_forced(twins, texts[:floor_limit], read_pairs([(0, 1), (2, 3)]), meter=self.meter)
        moved = [
            [float(each[:, k].mean()) for each in noise] for k in (KL_CHILD_PARENT, KL_CHILD_PARENT + COLUMNS)
        ]
        floor = max(map(fmean, moved)) if noise else None
        found = estimate([float(each[:, KL_CHILD_PARENT].mean()) for each in read], seed=self.seed)
        word = verdict(found.ci95, numeric=floor)
        who = of(self.child, self.parent)
        self._add("kl_child_parent", "nats/token", found, who, floor_numeric=floor, verdict=word)

    def _add(self, metric: str, unit: str, found: Estimate, who: dict[str, Any], **keys: Any) -> None:
        fields = {
            "probe": "G-9",
            "metric": metric,
            "unit": unit,
            "dtype": dtype_of([self.parent, self.child]),
            "template": "chat",
            "text_source": "A sample",
            "cost": self.meter.cost(),
            **who,
            **found.fields("prompt"),
        }
        self.findings.append(Finding(**(fields | keys)))
