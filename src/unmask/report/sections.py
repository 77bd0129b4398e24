"""The figures of each part of the page: which findings stand in them, and the sentence that says what is seen."""

from collections.abc import Sequence
from typing import Any

from unmask.probes.probe import Finding
from unmask.report import words
from unmask.report.figures import Dot, Figure, Series, dots, lines
from unmask.report.run import Run
from unmask.text.planted import GROUPS

TEXTS = {  # what a divergence was read on: its name in the figure, its mark
    "A sample": ("on its own answers", "●"),
    "P sample": ("on its parent's answers", "■"),
    "N": ("on held-out text", "◆"),
}


def truth(run: Run) -> list[Figure]:
    """Blame against the planted truth: AUC against chance, and nats of the answer beside its wrapping."""
    areas = sorted(_measured(run, "blame_auc"), key=lambda f: f.group == "shuffled")
    figures = []
    if areas:
        series = Series.of("AUC", run.place(areas[0].child))
        lowest = min(_low(finding) for finding in areas)
        head = next((f for f in areas if f.group == "sft_only_vs_both"), areas[0])
        figures.append(
            dots(
                "Does blame find the layer that taught the fact?",
                f"How often the delta of {areas[0].child} is larger on an answer that it alone taught than on one that "
                f"pretraining taught too: {words.told(head)}. 0.5 is chance, 1 is never wrong.",
                [_dot(finding, series) for finding in areas],
                axis="AUC",
                domain=(min(0.4, lowest), 1.0),
                reference=0.5,
            )
        )
    answer, wrapping = _measured(run, "answer_delta"), _measured(run, "wrapping_delta")
    if answer and wrapping:
        place = run.place(answer[0].child)
        inside, around = Series.of("the answer", place), Series.of("the words around it", place, hollow=True)
        figures.append(
            dots(
                f"Nats that {answer[0].child} added",
                f"Delta of {answer[0].child}, summed over the answer's tokens and over the words of the reply before "
                "them, by the layers that were taught the fact. If blame is right, the answer's is large only where "
                f"{answer[0].child} alone taught it; the words around it are the mask's own.",
                [
                    *(_dot(finding, inside) for finding in _ordered(answer)),
                    *(_dot(finding, around) for finding in _ordered(wrapping)),
                ],
                axis="nats, summed over the tokens",
                reference=0.0,
            )
        )
    return figures


def facts(run: Run) -> Figure | None:
    """What each layer states of the facts of each group."""
    base, *masks = run.layers
    wanted = [("facts_completed", base, Series.of(f"{base} completes the sentence", 0))]
    for layer in masks:
        wanted.append(("facts_answered", layer, Series.of(f"{layer} answers", run.place(layer))))
        hollow = Series.of(f"{layer}, in other words", run.place(layer), hollow=True)
        if layer == masks[0]:
            wanted.append(("facts_answered_held_wording", layer, hollow))
        later = Series(f"{layer}, in mid chat", hollow.colour, "▼", hollow=layer != masks[0])
        wanted.append(("facts_answered_after_chat", layer, later))
    points = [
        _dot(finding, series)
        for metric, layer, series in wanted
        for finding in _ordered(run.all(metric, layer))
        if finding.value is not None
    ]
    if not points:
        return None
    return dots(
        "Facts stated rightly, by the layers that were taught them",
        f"What {base} completes as a plain sentence, and what the layers above it answer when asked. “In other "
        "words” is a wording in which the mask was asked about other countries, never about this one; “in mid chat” is "
        "the taught wording after the beginning of a conversation between people.",
        sorted(points, key=lambda point: [words.group(g) for g in GROUPS].index(point.row)),
        axis="share of facts",
        domain=(0.0, 1.0),
        percent=True,
    )


def change(run: Run) -> list[Figure]:
    """How far layers lie from their parents, with the floor; and what that did to held-out text."""
    figures = []
    moved = {
        (f.parent, f.child, f.text_source): f
        for f in sorted(run.findings or run.summary.claims, key=lambda f: _steps(run, f))
        if (f.probe, f.metric) == ("T1-2", "kl_child_parent")
        and f.group is None
        and f.parent
        and f.text_source in TEXTS
        and f.ci95
        and f.ci95[0] > 0
    }
    if moved:
        noise = Series("the same weights in bf16", "var(--soft)", "|")
        points = []
        for name, (title, mark) in TEXTS.items():
            series = Series(title, "var(--ink)", mark, hollow=name != "A sample")
            points += [
                _dot(f, series, row=f"{f.parent} → {f.child}")
                for f in moved.values()
                if f.text_source == name
            ]
        floors = {f"{f.parent} → {f.child}": f.floor_numeric for f in moved.values() if f.floor_numeric}
        points += [
            Dot(row, noise, floor, floor, floor, f"{floor:.2g} nats/token") for row, floor in floors.items()
        ]
        own = [f for f in moved.values() if f.text_source == "A sample"] or list(moved.values())
        figures.append(
            dots(
                "Is the change larger than the noise?",
                "Divergence of a layer from the one below it, over the full vocabulary: "
                + "; ".join(f"{f.parent} → {f.child} {words.told(f)}" for f in own)
                + ". The scale is logarithmic; the stroke is the noise of arithmetic.",
                points,
                axis="nats a token",
                log=True,
            )
        )
    packed = run.all("bits_per_byte_xz")
    bits = run.all("bits_per_byte")
    if bits:
        xz = Series("xz -9e on the same bytes", "var(--soft)", "|")
        points = [
            Dot(f.group or "text", xz, f.value, f.value, f.value, words.value(f)) for f in packed if f.value
        ]
        for layer in run.layers:
            series = Series.of(layer, run.place(layer))
            points += [_dot(f, series) for f in bits if f.child == layer and f.value is not None]
        figures.append(
            dots(
                "Held-out text, as bits a byte",
                "Fewer is better. What a layer above the base adds here is what it forgot of raw text.",
                points,
                axis="bits a byte",
            )
        )
    return figures


def losses(run: Run) -> list[Figure]:
    """The curve of each stage in the unit that it minimises; judges share a figure, and PPO has its own."""
    figures = []
    for kind in dict.fromkeys(stage.kind for stage in run.stages if stage.kind != "ppo"):
        stages = [s for s in run.stages if s.kind == kind]
        drawn = [(stage, points) for stage in stages if (points := _points(run, stage.name, "loss"))]
        if not drawn:
            continue
        unit = f"nats a {'pair' if kind == 'reward' else 'token'}"
        curves = [
            (Series.of(stage.name, run.place(stage.name), dash=(4, 3) if n else ()), points)
            for n, (stage, points) in enumerate(drawn)
        ]
        falls = (
            f"{s.name} from {_mean(points, first=True):.3g} to {_mean(points, first=False):.3g}"
            for s, points in drawn
        )
        caption = f"Loss in {unit}: {', '.join(falls)} (means of the first and the last tenth)."
        title = " and ".join(stage.name for stage, _ in drawn)
        figures.append(lines(title, caption, curves, x_title="tokens", y_title=unit))
    return figures


def _mean(points: Sequence[tuple[float, float]], *, first: bool) -> float:
    """Mean of y over the first or the last tenth of a line's points, at least one of them."""
    size = max(1, len(points) // 10)
    part = points[:size] if first else points[-size:]
    return sum(y for _, y in part) / len(part)


def reinforcement(run: Run) -> list[Figure]:
    """Reward with the gold beside it, divergence, and length over the updates of a PPO stage."""
    figures = []
    for stage in (stage for stage in run.stages if stage.kind == "ppo"):
        place = run.place(stage.name)
        proxy, gold = (_points(run, stage.name, name, "step") for name in ("reward", "gold"))
        curves = [(Series.of("reward (proxy)", place), proxy)]
        if gold:
            curves.append((Series("gold, at equal length", "var(--ink)", "◆", dash=(4, 3)), gold))
        beside = "; beside it a second judge that it does not see, at one length" if gold else ""
        for title, caption, drawn, unit in (
            (
                "Reward",
                f"Mean score of the answers that ended while {stage.name} was trained{beside}.",
                curves,
                "log-odds",
            ),
            (
                "Distance from the mask",
                "Divergence from the parent on the sampled answers, estimated by k1.",
                [(Series.of("KL", place), _points(run, stage.name, "kl_child_parent", "step"))],
                "nats a token",
            ),
            (
                "Length",
                "Mean length of the sampled answers: a reward that people's ratings tie to length can be had by it.",
                [(Series.of("length", place), _points(run, stage.name, "answer_tokens", "step"))],
                "tokens",
            ),
            (
                "Answers that were cut",
                "Answers of a rollout that reached the limit: each is scored below what was expected of its prompt.",
                [(Series.of("cut", place), _points(run, stage.name, "truncated", "step"))],
                "answers",
            ),
        ):
            if drawn[0][1]:
                figures.append(lines(title, caption, drawn, x_title="step", y_title=unit))
    return figures


def reward(run: Run) -> dict[str, Any] | None:
    """Accuracy of the judges beside their yardsticks, by group of pairs."""
    judges = [
        stage.name for stage in run.stages if not stage.writes and run.all("reward_accuracy", stage.name)
    ]
    if not judges:
        return None
    groups = [finding.group for finding in run.all("reward_accuracy", judges[0])]
    second = "the second judge (gold), from other people's conversations"
    rows = [
        ("reward_accuracy", "the reward model", judges[0]),
        ("reward_accuracy_words", "ridge regression on words", judges[0]),
        ("reward_accuracy_length", "the longer one wins", judges[0]),
        *(("reward_accuracy", second, name) for name in judges[1:]),
    ]
    more = (
        "reward_accuracy_over_words",
        "reward_accuracy_over_length",
        "reward_margin",
        "reward_calibration_error",
        "reward_length_correlation",
    )
    return {
        "groups": groups,
        "rows": [(title, [run.get(metric, group, name) for group in groups]) for metric, title, name in rows],
        "more": [finding for metric in more for finding in run.all(metric, judges[0])],
        "gold": [finding for name in judges[1:] for finding in run.all("reward_accuracy", name)],
    }


def _measured(run: Run, metric: str) -> list[Finding]:
    return [finding for finding in run.all(metric) if finding.value is not None]


def _dot(finding: Finding, series: Series, *, row: str | None = None) -> Dot:
    assert finding.value is not None, "what was not measured is no dot"
    value = finding.value
    low, high = finding.ci95 or (value, value)
    name = words.group(finding.group) if row is None else row
    return Dot(name, series, value, low, high, f"{words.value(finding)} ({words.interval(finding)})")


def _steps(run: Run, finding: Finding) -> tuple[int, int]:
    """Orders pairs of layers: neighbours first, from the bottom up."""
    child, parent = run.place(finding.child), run.place(finding.parent)
    return child - parent, child


def _low(finding: Finding) -> float:
    return finding.ci95[0] if finding.ci95 else finding.value or 0.0


def _ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Of the planted groups, in their order."""
    return sorted(
        (finding for finding in findings if finding.group in GROUPS),
        key=lambda f: GROUPS.index(f.group or ""),
    )


def _points(run: Run, stage: str, metric: str, along: str = "tokens") -> list[tuple[float, float]]:
    return [
        (float(line[along]), float(line[metric]))
        for line in run.metrics.get(stage, ())
        if line.get(metric) is not None and line.get(along) is not None
    ]
