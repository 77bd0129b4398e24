"""Each figure shows under a label the finding or the metric that the label says."""

import json
from pathlib import Path
from typing import Any

import pytest

from unmask.report import run as runs
from unmask.report import sections


def test_every_way_of_asking_for_facts_stands_under_its_own_name(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every claim gets a value of its own, so that no other can stand in its place."""
    file = run_directory / "summary.json"
    summary = json.loads(file.read_bytes())
    wanted = {}
    for i, row in enumerate(summary["claims"]):
        if row["metric"].startswith("facts_"):
            value = round(0.3 + i / 1000, 4)
            row |= {"value": value, "ci95": [value, value]}
            wanted[row["metric"], row["child"], value] = row
    file.write_text(json.dumps(summary), "utf-8")
    drawn: list[Any] = []
    monkeypatch.setattr(sections, "dots", lambda title, caption, points, **keys: drawn.extend(points))
    sections.facts(runs.read(run_directory))
    names = {
        "base completes the sentence": ("facts_completed", "base"),
        "sft answers": ("facts_answered", "sft"),
        "sft, in other words": ("facts_answered_held_wording", "sft"),
        "sft, in mid chat": ("facts_answered_after_chat", "sft"),
        "rl answers": ("facts_answered", "rl"),
        "rl, in mid chat": ("facts_answered_after_chat", "rl"),
    }
    assert {dot.series.name for dot in drawn} == set(names)
    assert all((*names[dot.series.name], dot.value) in wanted for dot in drawn)


def test_the_caption_of_a_loss_says_the_means_of_its_first_and_last_tenth(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": step, "tokens": 10 * step, "loss": float(step)} for step in range(1, 21)]
    file = run_directory / "work" / "base" / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    captions: list[str] = []
    monkeypatch.setattr(sections, "lines", lambda title, caption, curves, **keys: captions.append(caption))
    sections.losses(runs.read(run_directory))
    assert any("base from 1.5 to 19.5 (means" in caption for caption in captions)


def test_curves_of_the_nudge_are_the_metrics_that_they_are_called(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = ("reward", "gold", "kl_child_parent", "answer_tokens", "truncated")
    file = run_directory / "work" / "rl" / "metrics.jsonl"
    rows = [{"step": step} | {name: 10.0 * i for i, name in enumerate(metrics, 1)} for step in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    drawn: dict[str, float] = {}

    def lines(title: str, caption: str, curves: Any, **keys: Any) -> str:
        drawn.update({f"{title}: {series.name}": points[0][1] for series, points in curves})
        return title

    monkeypatch.setattr(sections, "lines", lines)
    sections.reinforcement(runs.read(run_directory))
    assert drawn == {
        "Reward: reward (proxy)": 10.0,
        "Reward: gold, at equal length": 20.0,
        "Distance from the mask: KL": 30.0,
        "Length: length": 40.0,
        "Answers that were cut: cut": 50.0,
    }


def test_how_far_a_layer_lies_from_another_is_drawn_on_every_text(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        sections, "dots", lambda title, caption, points, **keys: drawn.update({title: points})
    )
    sections.change(runs.read(run_directory))
    found = {(dot.row, dot.series.name) for dot in drawn["Is the change larger than the noise?"]}
    for pair in ("base → sft", "sft → rl", "base → rl"):
        for name in ("on its own answers", "on its parent's answers", "on held-out text"):
            assert (pair, name) in found


def test_what_was_not_measured_is_no_dot(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run_directory / "summary.json"
    summary = json.loads(file.read_bytes())
    for row in summary["claims"]:
        if row["metric"] in ("answer_delta", "blame_auc") and row["group"] in ("none", "shuffled"):
            row |= {"value": None, "ci95": None, "verdict": "abstain: n = 0"}
    file.write_text(json.dumps(summary), "utf-8")
    drawn: list[Any] = []
    monkeypatch.setattr(sections, "dots", lambda title, caption, points, **keys: drawn.extend(points))
    sections.truth(runs.read(run_directory))
    assert drawn
    assert not [dot for dot in drawn if dot.row == "groups shuffled"]
    assert len([dot for dot in drawn if dot.series.name == "the answer"]) == 3
