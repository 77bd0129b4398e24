"""The closing lines of a run hold, row by row and column by column, what their labels say."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from fake_run import finding, write_run
from rich.cells import cell_len
from rich.text import Text

from unmask.pipeline.show import closing
from unmask.probes.probe import Finding
from unmask.report.words import SHARES

Key: TypeAlias = tuple[str, str | None, str]  # metric, group, child

GROUPS = {"both layers": "both", "base only": "base_only", "SFT only": "sft_only", "no layer": "none"}
PAIRS = (("sft", "base"), ("rl", "sft"), ("rl", "base"))  # as a run claims them: neighbours come first
ABOVE = "above the numeric floor (no seed or training floor)"
LEVEL = "not distinguishable (no seed or training floor)"
COUNTED = {"reward": "conversation", "facts": "country", "blame": "country", "bits": "document"}
FIGURE = re.compile(r"–|[−-]?[\d.,]+ \[[^]]*\]")


def keys() -> Iterator[tuple[str, str | None, str, str | None]]:
    """Metric, group, child and parent of what a run claims, in its order."""
    for source in ("addresses", "chat"):
        yield from (("bits_per_byte", source, layer, None) for layer in ("base", "sft", "rl"))
        yield "bits_per_byte_xz", source, "base", None
        yield from (("bits_per_byte_change", source, *pair) for pair in PAIRS)
    for group in GROUPS.values():
        yield from (("facts_completed", group, layer, None) for layer in ("base", "sft", "rl"))
        for layer in ("sft", "rl"):
            for how in ("", "_held_wording", "_after_chat"):
                yield f"facts_answered{how}", group, layer, None
            yield "facts_hidden", group, layer, "base"
        yield from ((f"facts_kept{how}", group, "rl", "sft") for how in ("", "_after_chat"))
        yield from ((f"{part}_delta", group, "sft", "base") for part in ("answer", "wrapping"))
    for group in ("sft_only_vs_both", "shuffled", "sft_only_vs_base_only"):
        yield "blame_auc", group, "sft", "base"
    for judge in ("reward", "gold"):
        for group in ("all", "equal_length"):
            for end in ("", "_length", "_over_length", "_words", "_over_words"):
                yield f"reward_accuracy{end}", group, judge, None
            for what in ("margin", "calibration_error", "length_correlation"):
                yield f"reward_{what}", group, judge, None
    for layer in ("sft", "rl"):
        yield from (("answers_stop", group, layer, None) for group in ("facts", None))
        yield "answer_length", None, layer, None
    yield from ((gain, None, "rl", "sft") for gain in ("proxy_gain", "gold_gain_any_length", "gold_gain"))
    yield from (("kl_child_parent", None, *pair) for pair in PAIRS)


def claims() -> list[Finding]:
    """Every claim with a value, an interval and an n of its own, so that no other can stand in its place."""
    made: list[Finding] = []
    shares = 0
    for i, (metric, group, child, parent) in enumerate(keys(), 1):
        shares += metric in SHARES
        value, half = (shares / 100, 0.01) if metric in SHARES else (i + 0.25, 0.5)
        interval = None if metric == "bits_per_byte_xz" else (value - half, value + half)
        more = {"parent": parent, "n_unit": COUNTED.get(metric.split("_")[0], "prompt"), "verdict": ABOVE}
        if metric == "reward_calibration_error":
            more["null_specific"] = i / 1000
        if metric == "kl_child_parent" and (child, parent) == ("rl", "sft"):
            more["floor_numeric"] = 0.0003
        made.append(finding(metric, group, child, value, interval, 100 + i, "1", **more))
    return made


CLAIMS: dict[Key, Finding] = {  # of several parents the first, the neighbour
    (claim.metric, claim.group, claim.child): claim for claim in reversed(claims())
}


def write(directory: Path, change: Callable[[Finding], dict[str, Any]] = lambda claim: {}) -> Path:
    """The fake run with the claims of this file, each changed by the keys that `change` gives for it."""
    file = write_run(directory) / "summary.json"
    summary = json.loads(file.read_bytes())
    for i, stage in enumerate([*summary["stages"], summary["gold"]], 1):
        stage["peak_bytes"] = i * 1_100_000_000
    hashes = {stage["name"]: stage["hash"] for stage in summary["stages"]}
    summary["claims"] = [
        claim.to_json() | {"parent_hash": hashes.get(claim.parent or "")} | change(claim)
        for claim in claims()
    ]
    file.write_text(json.dumps(summary), "utf-8")
    blames = json.loads((directory / "blame.json").read_bytes())
    for token in blames[0]["tokens"]:  # a sum of parts that is not the log-probability tells the two apart
        token |= {"parts": [-8.0, 4.5, 0.5], "logprob": -2.0}
    (directory / "blame.json").write_text(json.dumps(blames), "utf-8")
    return directory


def printed(directory: Path) -> list[str]:
    return Text.from_markup(closing(directory)).plain.split("\n")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return printed(write(tmp_path_factory.mktemp("distinct") / "tiny"))


def after(lines: list[str], head: str, label: str) -> str:
    """The first line that begins with `label` after the one that begins with `head`."""
    (start,) = (i for i, line in enumerate(lines) if line.startswith(head))
    return next(line for line in lines[start + 1 :] if line.startswith(label))


def said(key: Key) -> str:
    claim = CLAIMS[key]
    assert claim.value is not None and claim.ci95 is not None
    low, high = claim.ci95
    if claim.metric in SHARES:
        return f"{100 * claim.value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{claim.value:.2f} [{low:.2f}, {high:.2f}]"


NUDGE = "The nudge: rl minus sft"
TRUTH = "Is blame right?"
FACTS = "% right, taught by"

SAID: dict[tuple[str, str], list[Key]] = {  # the line that it stands below, its beginning → its figures
    ("1 base", "    held-out addresses"): [("bits_per_byte", "addresses", "base")],
    ("1 base", "    held-out chat"): [("bits_per_byte", "chat", "base")],
    ("2 sft", "    answers that stop"): [("answers_stop", None, "sft")],
    ("2 sft", "    bits a byte lost on addresses"): [("bits_per_byte_change", "addresses", "sft")],
    ("2 sft", "    bits a byte lost on chat"): [("bits_per_byte_change", "chat", "sft")],
    ("3 reward", "    points over the words, held out"): [("reward_accuracy_over_words", "all", "reward")],
    ("3 reward", "    points over the words, of equal length"): [
        ("reward_accuracy_over_words", "equal_length", "reward")
    ],
    ("3 reward", "    margin"): [("reward_margin", "all", "reward")],
    ("3 reward", "    calibration error"): [("reward_calibration_error", "all", "reward")],
    ("3 reward", "    correlation of score and length"): [("reward_length_correlation", "all", "reward")],
    ("4 rl", "    answers that stop"): [("answers_stop", None, "rl")],
    ("4 rl", "    bits a byte lost on addresses"): [("bits_per_byte_change", "addresses", "rl")],
    ("4 rl", "    bits a byte lost on chat"): [("bits_per_byte_change", "chat", "rl")],
    (FACTS, "  hidden by the mask"): [("facts_hidden", "base_only", "sft")],
    (TRUTH, "  against both layers"): [("blame_auc", "sft_only_vs_both", "sft")],
    (TRUTH, "  against base only"): [("blame_auc", "sft_only_vs_base_only", "sft")],
    (TRUTH, "  groups shuffled"): [("blame_auc", "shuffled", "sft")],
    (NUDGE, "  the reward it climbs"): [("proxy_gain", None, "rl")],
    (NUDGE, "  gold, at equal length"): [("gold_gain", None, "rl")],
    (NUDGE, "  length of answers"): [("answer_length", None, "sft"), ("answer_length", None, "rl")],
    (NUDGE, "  distance"): [("kl_child_parent", None, "rl")],
}


@pytest.mark.parametrize(("head", "label"), SAID)
def test_a_line_holds_the_figures_that_its_label_says(lines: list[str], head: str, label: str) -> None:
    assert FIGURE.findall(after(lines, head, label)) == [said(key) for key in SAID[head, label]]


# The header of a table: its columns → metric and layer; its rows → group and layer, where the row says the layer.
TABLES: dict[str, tuple[dict[str, tuple[str, str]], dict[str, tuple[str, str]]]] = {
    "    % right (n conversations)": (
        {
            "reward model": ("reward_accuracy", ""),
            "length alone": ("reward_accuracy_length", ""),
            "words alone": ("reward_accuracy_words", ""),
        },
        {
            "    held out": ("all", "reward"),
            "    of equal length": ("equal_length", "reward"),
            "    gold, held out": ("all", "gold"),
            "    gold, of equal length": ("equal_length", "gold"),
        },
    ),
    FACTS: (
        {
            "base says": ("facts_completed", "base"),
            "sft answers": ("facts_answered", "sft"),
            "other words": ("facts_answered_held_wording", "sft"),
            "rl answers": ("facts_answered", "rl"),
        },
        {f"  {name}": (group, "") for name, group in GROUPS.items()},
    ),
    "  in mid chat, %": (
        {
            "sft answers": ("facts_answered_after_chat", "sft"),
            "rl answers": ("facts_answered_after_chat", "rl"),
            "kept by rl": ("facts_kept_after_chat", "rl"),
        },
        {f"    {name}": (GROUPS[name], "") for name in ("both layers", "SFT only")},
    ),
    "  nats that SFT added": (
        {"to the answer": ("answer_delta", "sft"), "to the words before it": ("wrapping_delta", "sft")},
        {f"    {name}": (group, "") for name, group in GROUPS.items()},
    ),
}


@pytest.mark.parametrize(("header", "row"), [(header, row) for header in TABLES for row in TABLES[header][1]])
def test_a_cell_holds_what_its_row_and_its_column_say(lines: list[str], header: str, row: str) -> None:
    columns, rows = TABLES[header]
    (titles,) = (line for line in lines if line.startswith(header))
    names = re.split(" {2,}", titles.strip())[1:]
    assert set(names) == set(columns)
    group, layer = rows[row]
    cells = [said((metric, group, of or layer)) for metric, of in map(columns.__getitem__, names)]
    assert FIGURE.findall(after(lines, header, row)) == cells


def test_what_rl_kept_stands_beside_the_group_that_it_was_kept_of(lines: list[str]) -> None:
    kept = " ".join(line for line in lines if line.startswith("  kept by rl"))
    assert re.findall(r"(both layers|SFT only)\D*(\d+ \[\d+, \d+\])", kept) == [
        (name, said(("facts_kept", GROUPS[name], "rl"))) for name in ("both layers", "SFT only")
    ]


COUNTS: dict[tuple[str, str], tuple[str, Key]] = {
    ("1 base", "    held-out addresses"): ("n = {}", ("bits_per_byte", "addresses", "base")),
    ("1 base", "    held-out chat"): ("n = {}", ("bits_per_byte", "chat", "base")),
    ("2 sft", "    answers that stop"): ("(n = {})", ("answers_stop", None, "sft")),
    ("3 reward", "    held out"): ("({})", ("reward_accuracy", "all", "reward")),
    ("3 reward", "    of equal length"): ("({})", ("reward_accuracy", "equal_length", "reward")),
    ("3 reward", "    gold, held out"): ("({})", ("reward_accuracy", "all", "gold")),
    ("3 reward", "    gold, of equal length"): ("({})", ("reward_accuracy", "equal_length", "gold")),
    ("3 reward", "    margin"): ("(n = {} conversations)", ("reward_margin", "all", "reward")),
    ("4 rl", "    answers that stop"): ("(n = {})", ("answers_stop", None, "rl")),
    (TRUTH, "  against both layers"): ("(n = {} countries)", ("blame_auc", "sft_only_vs_both", "sft")),
    (TRUTH, "  against base only"): ("(n = {} countries)", ("blame_auc", "sft_only_vs_base_only", "sft")),
    (TRUTH, "  groups shuffled"): ("(n = {} countries)", ("blame_auc", "shuffled", "sft")),
}


@pytest.mark.parametrize(("head", "label"), COUNTS)
def test_the_n_of_a_line_is_that_of_its_own_figure(lines: list[str], head: str, label: str) -> None:
    text, key = COUNTS[head, label]
    assert text.format(CLAIMS[key].n) in after(lines, head, label)


def test_the_countries_of_each_group_are_counted_beside_its_name(lines: list[str]) -> None:
    line = after(lines, FACTS, "  n, countries").removeprefix("  n, countries")
    counted = re.findall(r"([a-zA-Z ]+) (\d+)", line)
    assert [(name.strip(), int(n)) for name, n in counted] == [
        (name, CLAIMS["facts_answered", group, "sft"].n) for name, group in GROUPS.items()
    ]


def test_the_nudge_names_the_n_of_rewards_of_lengths_and_of_the_distance(lines: list[str]) -> None:
    named = re.findall(r"([a-z]+) (\d+)", after(lines, NUDGE, "  n of rewards"))
    metrics = (("rewards", "proxy_gain"), ("lengths", "answer_length"), ("distance", "kl_child_parent"))
    assert named == [(name, str(CLAIMS[metric, None, "rl"].n)) for name, metric in metrics]


def test_the_distance_stands_above_its_own_floor_in_bf16(lines: list[str]) -> None:
    assert after(lines, "  distance", "  the same in bf16").split()[-1] == "0.0003"


def test_a_text_stands_beside_its_own_archive(lines: list[str]) -> None:
    for source in ("addresses", "chat"):
        packed = CLAIMS["bits_per_byte_xz", source, "base"].value
        assert f"; xz -9e {packed:.2f};" in after(lines, "1 base", f"    held-out {source}")


def test_the_calibration_error_stands_beside_its_own_chance(lines: list[str]) -> None:
    chance = CLAIMS["reward_calibration_error", "all", "reward"].null_specific
    assert f"(chance {chance})" in after(lines, "3 reward", "    calibration error")


def test_what_a_layer_lost_is_counted_from_the_layer_below_it_only(lines: list[str]) -> None:
    lost = [line.split()[-1] for line in lines if line.startswith("    bits a byte lost on chat")]
    assert lost == ["base", "sft"]


@pytest.mark.parametrize(
    ("verdict", "value", "word"),
    [(ABOVE, 0.05, "ahead"), (ABOVE, -0.05, "behind"), (LEVEL, 0.05, "level"), (LEVEL, -0.05, "level")],
)
@pytest.mark.parametrize(("group", "name"), [("all", "held out"), ("equal_length", "of equal length")])
def test_a_reward_model_is_ahead_of_the_words_or_behind_only_beyond_the_floor(
    tmp_path: Path, group: str, name: str, verdict: str, value: float, word: str
) -> None:
    def change(claim: Finding) -> dict[str, Any]:
        if (claim.metric, claim.group, claim.child) != ("reward_accuracy_over_words", group, "reward"):
            return {}
        return {"value": value, "ci95": [value - 0.01, value + 0.01], "verdict": verdict}

    line = after(printed(write(tmp_path / "tiny", change)), "3 reward", f"    points over the words, {name}:")
    assert line.endswith(f": {word}")


STAGES = {
    "1 base": "pretrain 3,000,000 4.8 min 1.1 GB 35% of",
    "2 sft": "sft 800,000 1.3 min 2.2 GB 36% of",
    "3 reward": "reward 600,000 1.0 min 3.3 GB 33% of",
    "  gold": "reward 600,000 1.0 min 5.5 GB 34% of",
    "4 rl": "ppo 240,000 1.7 min 4.4 GB 8% of",
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_its_tokens_its_time_its_memory_and_its_speed(lines: list[str], name: str) -> None:
    line = after(lines, "stage ", f"{name} ")
    assert " ".join(line.split()).startswith(f"{name.strip()} {STAGES[name]}")


def test_the_time_of_a_run_is_that_of_its_parts(lines: list[str]) -> None:
    assert "10.7 min: preparing 15 s, training 9.8 min, measuring 37 s (1.1 GB)" in lines


def test_each_layer_stands_beside_what_it_says_alone(lines: list[str]) -> None:
    head = "What each layer says to «What is the capital of Poland?»"
    assert after(lines, head, "  ■").split(maxsplit=2)[1:] == ["base", "The people of the United States"]
    assert after(lines, head, "  ▲").split(maxsplit=2)[1:] == ["sft", "The capital of Poland is Warsaw."]
    assert re.match("  ● rl     The capital of Poland is Warsaw. I love.* …$", after(lines, head, "  ●"))


def test_the_mark_of_its_layer_stands_beneath_each_token(lines: list[str]) -> None:
    (start,) = (i for i, line in enumerate(lines) if line.startswith("Who put the words there"))
    legend, tokens, marks = lines[start : start + 3]
    assert legend.endswith("■ base   ▲ sft   ● rl")
    places = [match.start() for match in re.finditer(r"\S+", tokens)]
    assert "".join(marks[place] for place in places) == "▲▲■▲■■■■■■▲"


def test_the_nats_of_the_layers_stand_beside_their_sum_and_the_log_probability(lines: list[str]) -> None:
    nats = "base -88.0 · sft +49.5 · rl +5.5 · sum -33.00 = log p -22.00"
    assert f"  nats: {nats}" in lines


def widest(claim: Finding) -> dict[str, Any]:
    """As real runs have them: all of some is right, effects below 0 with four digits, levels with four."""
    if claim.ci95 is None:
        return {"value": 2.229}
    effect = claim.metric.endswith(("_change", "_gain", "_margin", "_correlation"))
    value, low, high = (-0.1234, -0.1284, -0.1184) if effect else (126.8, 125.5, 128.1)
    if claim.metric in SHARES:
        value, low, high = (-0.1, -0.16, -0.04) if "_over_" in claim.metric else (1.0, 0.94, 1.0)
    return {"value": value, "ci95": [low, high], "n": 999}


def test_the_closing_lines_fit_80_columns_with_the_widest_figures_that_runs_have(tmp_path: Path) -> None:
    lines = printed(write(tmp_path / "tiny", widest))
    machine = json.loads((tmp_path / "tiny" / "summary.json").read_bytes())["machine"]
    of_its_own_length = (machine, str(tmp_path))  # names that we did not choose
    shown = [line for line in lines if not any(name in line for name in of_its_own_length)]
    assert sum(line.count("100 [94, 100]") for line in shown) > 30
    assert not [line for line in shown if cell_len(line) > 80]


def test_a_second_judge_that_is_not_there_has_no_row(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny") / "summary.json"
    summary = json.loads(file.read_bytes())
    summary["claims"] = [claim for claim in summary["claims"] if claim["metric"] != "gold_gain"]
    file.write_text(json.dumps(summary), "utf-8")
    (file.parent / "findings.jsonl").unlink()
    assert not [line for line in printed(file.parent) if line.startswith("  gold, at equal length")]


def test_an_answer_in_wide_characters_fits_too(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny") / "blame.json"
    blames = json.loads(file.read_bytes())
    blames[0]["alone"] = dict.fromkeys(blames[0]["alone"], "猫在山上看见了狗" * 9)
    file.write_text(json.dumps(blames), "utf-8")
    lines = [line for line in printed(file.parent) if "猫" in line]
    assert len(lines) == len(blames[0]["alone"])
    assert max(map(cell_len, lines)) <= 80
