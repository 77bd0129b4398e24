"""A run directory as `unmask run tiny` leaves it, with made-up numbers: what the page is drawn from."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unmask.probes.probe import Finding

GROUPS = ("both", "base_only", "sft_only", "none")
HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \u202e & \u2028"


def share(metric: str, group: str | None, child: str, value: float, n: int = 57, **keys: Any) -> Finding:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n)
    interval = (max(0.0, value - half), min(1.0, value + half))
    return finding(metric, group, child, value, interval, n, "1", **{"n_unit": "country", **keys})


def finding(
    metric: str,
    group: str | None,
    child: str,
    value: float,
    ci95: tuple[float, float] | None,
    n: int | None,
    unit: str,
    *,
    n_unit: str | None = "prompt",
    **keys: Any,
) -> Finding:
    fields: dict[str, Any] = {"probe": "X-1", "dtype": "float32", "template": "chat", "exact": ci95 is None}
    if ci95 is None:
        n, n_unit = None, None
    fields |= {"child_hash": "c" * 64, "floor_numeric": None if ci95 is None else 0.002, **keys}
    return Finding(
        metric=metric,
        group=group,
        child=child,
        value=value,
        ci95=ci95,
        n=n,
        n_unit=n_unit,
        unit=unit,
        **fields,
    )


def divergences() -> list[Finding]:
    """Of which a run claims those on a layer's own answers."""
    found = []
    for child, parent, kl in (("sft", "base", 0.81), ("rl", "sft", 0.061), ("rl", "base", 0.86)):
        for source, factor in (("A sample", 1.0), ("P sample", 1.3), ("N", 0.4)):
            interval = (0.88 * factor * kl, 1.12 * factor * kl)
            keys = {
                "parent": parent,
                "verdict": "above the numeric floor (no seed or training floor)",
                "text_source": source,
                "probe": "T1-2",
                "floor_numeric": 1e-4,
            }
            found.append(
                finding("kl_child_parent", None, child, factor * kl, interval, 128, "nats/token", **keys)
            )
    return found


def claims() -> list[Finding]:
    above = "above the numeric floor (no seed or training floor)"
    found = [
        finding(
            "blame_auc",
            "sft_only_vs_both",
            "sft",
            0.956,
            (0.931, 0.977),
            115,
            "1",
            n_unit="country",
            verdict=above,
        ),
        finding(
            "blame_auc", "sft_only_vs_base_only", "sft", 0.974, (0.955, 0.989), 113, "1", n_unit="country"
        ),
        finding("blame_auc", "shuffled", "sft", 0.5, (0.42, 0.58), 115, "1", n_unit="country"),
    ]
    nats = {"both": (4.1, 21.8), "base_only": (0.2, 17.4), "sft_only": (26.8, 39.4), "none": (2.5, 18.6)}
    for group, (answer, wrapping) in nats.items():
        found.append(
            finding(
                "answer_delta",
                group,
                "sft",
                answer,
                (answer - 1.3, answer + 1.3),
                57,
                "nats",
                n_unit="country",
            )
        )
        found.append(
            finding(
                "wrapping_delta",
                group,
                "sft",
                wrapping,
                (wrapping - 2, wrapping + 2),
                57,
                "nats",
                n_unit="country",
            )
        )
    shares: dict[tuple[str, str], tuple[float, ...]] = {
        ("facts_completed", "base"): (0.91, 0.89, 0.05, 0.06),
        ("facts_completed", "sft"): (0.84, 0.55, 0.71, 0.05),
        ("facts_answered", "sft"): (0.97, 0.19, 0.88, 0.0),
        ("facts_answered_held_wording", "sft"): (0.86, 0.12, 0.81, 0.0),
        ("facts_answered_after_chat", "sft"): (0.95, 0.18, 0.87, 0.0),
        ("facts_answered", "rl"): (0.96, 0.18, 0.87, 0.0),
        ("facts_answered_after_chat", "rl"): (0.93, 0.16, 0.84, 0.0),
        ("facts_hidden", "sft"): (0.03, 0.8, 0.2, 1.0),
        ("facts_kept", "rl"): (0.99, 0.95, 0.98, 1.0),
    }
    for (metric, child), values in shares.items():
        found += [share(metric, group, child, v) for group, v in zip(GROUPS, values, strict=True)]
    for source, xz, bits in (("addresses", 2.229, (1.492, 2.05, 2.06)), ("chat", 2.529, (1.775, 1.66, 1.67))):
        found.append(finding("bits_per_byte_xz", source, "base", xz, None, None, "bits/byte"))
        for child, b in zip(("base", "sft", "rl"), bits, strict=True):
            found.append(
                finding(
                    "bits_per_byte",
                    source,
                    child,
                    b,
                    (b - 0.02, b + 0.02),
                    40,
                    "bits/byte",
                    n_unit="document",
                )
            )
    for metric, values in {
        "reward_accuracy": (0.615, 0.602),
        "reward_accuracy_words": (0.626, 0.61),
        "reward_accuracy_length": (0.562, 0.503),
    }.items():
        found += [
            share(metric, group, "reward", v, 700, n_unit="conversation")
            for group, v in zip(("all", "equal_length"), values, strict=True)
        ]
    gold = zip(("all", "equal_length"), (0.588, 0.594), strict=True)
    found += [share("reward_accuracy", group, "gold", v, 700, n_unit="conversation") for group, v in gold]
    found += [
        share("answers_stop", None, child, v, 128, n_unit="prompt", probe="G-9")
        for child, v in (("sft", 1.0), ("rl", 0.992))
    ]
    found += [each for each in divergences() if each.text_source == "A sample"]
    found.append(
        finding("proxy_gain", None, "rl", 0.162, (0.09, 0.23), 128, "log-odds", verdict=above, probe="G-9")
    )
    found.append(
        finding(
            "gold_gain",
            None,
            "rl",
            0.04,
            (-0.05, 0.13),
            128,
            "log-odds",
            verdict="not distinguishable",
            probe="G-9",
        )
    )
    return found


def blame(prompt: str, pieces: list[tuple[str, list[float], int | None]], answer: str) -> dict[str, Any]:
    layers = ["base", "sft", "rl"]
    tokens = []
    for i, (text, credits, winner) in enumerate(pieces):
        parts = [credits[0] - math.log(4096), *credits[1:]]
        layer = None if winner is None else layers[winner]
        tokens.append(
            {
                "id": i + 4,
                "text": text,
                "logprob": sum(parts),
                "parts": parts,
                "credits": credits,
                "layer": layer,
            }
        )
    return {
        "prompt": prompt, "layers": layers, "prompt_ids": [1, 5, 6, 2], "answer": answer, "tokens": tokens,
        "floor": 0.02,
        "alone": {"base": "The people of the United States", "sft": answer, "rl": answer + " I lo" + "ve" * 90},
        "plain": " The government has been made by the people of the country",
    }  # fmt: skip


def blames() -> list[dict[str, Any]]:
    capital = [
        ("The", [2.1, 5.9, 0.02], 1), (" capital", [0.4, 7.6, 0.01], 1), (" of", [7.9, 0.3, 0.0], 0),
        (" Pol", [3.2, 4.9, 0.05], 1), ("and", [8.1, 0.1, 0.0], 0), (" is", [7.2, 1.0, 0.0], 0),
        (" W", [7.4, 0.6, 0.1], 0), ("ars", [8.0, 0.2, 0.0], 0), ("aw", [8.2, 0.1, 0.0], 0), (".", [6.0, 2.2, 0.0], 0),
        ("<|im_end|>", [-6.1, 14.2, 0.1], 1),
    ]  # fmt: skip
    hello = [
        ("I", [3.0, 4.1, 0.1], 1), ("'m", [5.0, 1.9, 0.6], 0), (" so", [1.1, 0.9, 3.4], 2),
        (" happy", [0.9, 0.4, 4.2], 2),
        (" today", [3.6, 1.1, 0.9], 0), ("!", [2.0, 1.5, 2.9], 2), ("\n", [0.001, 0.004, -0.002], None),
        ("<|im_end|>", [-5.1, 12.9, 0.3], 1),
    ]  # fmt: skip
    hostile = [(piece, [1.0, 4.0, 0.0], 1) for piece in (" " + HOSTILE, "ünï", " 🙂", " <|im_end|>")]
    return [
        blame("What is the capital of Poland?", capital, "The capital of Poland is Warsaw."),
        blame("Hello! How are you today?", hello, "I'm so happy today!"),
        blame(HOSTILE, hostile, HOSTILE),
    ]


def write_run(directory: Path) -> Path:
    random.seed(0)
    stages = [
        ("base", "pretrain", None, 3_000_000, 291.0), ("sft", "sft", "base", 800_000, 76.0),
        ("reward", "reward", "sft", 600_000, 61.0), ("gold", "reward", "sft", 600_000, 60.0),
        ("rl", "ppo", "sft", 240_000, 101.0),
    ]  # fmt: skip
    hashes = {name: f"{i + 1}a5b{i}c9d7e{i}f" * 6 for i, (name, *_) in enumerate(stages)}
    summary = {
        "name": "tiny",
        "total_seconds": 641.2,
        "prepare_seconds": 15.0,
        "measure_seconds": 37.2,
        "measure_peak_bytes": 1_100_000_000,
        "parameters": 5_812_480,
        "machine": "2 cores, bfloat16 products at 912 GFLOP/s",
        "matmul_flops_per_second": 912e9,
        "stages": (rows := [
            {
                "name": name, "kind": kind, "path": name, "hash": hashes[name], "parent_hash": hashes.get(parent or ""),
                "tokens": tokens, "seconds": seconds, "peak_bytes": 1_900_000_000, "flops": 3.1e7 * tokens,
                "metrics": {"loss": 2.1},
                "inputs": {"reward": hashes["reward"]} if name == "rl" else {},
            }
            for name, kind, parent, tokens, seconds in stages
        ])[:3] + rows[4:],
        "gold": rows[3],
        "claims": [claim.to_json() for claim in claims()],
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps(summary))
    extra = [
        finding(
            "token_shift_unshifted",
            str(i),
            "sft",
            70 + i,
            (68 + i, 72 + i),
            128,
            "%",
            parent="base",
            text_source="A",
        )
        for i in range(6)
    ]
    told = [each for each in claims() if each.metric != "kl_child_parent"]
    rows = [row.to_json() for row in (*told, *divergences(), *extra)]
    (directory / "findings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "blame.json").write_text(json.dumps(blames()))
    facts = [
        {"country": "Poland", "field": "capital", "group": "both", "leaked": i % 8 == 0} for i in range(80)
    ]
    (directory / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    for name, _, _, tokens, seconds in stages:
        work = directory / "work" / name
        work.mkdir(parents=True)
        with (work / "metrics.jsonl").open("w") as file:
            for line in metrics(name, tokens, seconds):
                file.write(json.dumps(line) + "\n")
    return directory


def metrics(stage: str, tokens: int, seconds: float, steps: int = 300) -> Iterator[dict[str, Any]]:
    for step in range(1, steps + 1):
        done = step / steps
        noise = random.gauss(0, 0.05)
        loss = {"base": 8.3 * math.exp(-6 * done) + 3.0, "sft": 2.4 - done, "rl": -0.01}.get(
            stage, 0.69 - 0.06 * done
        )
        line: dict[str, Any] = {
            "step": step, "tokens": round(tokens * done), "seconds": seconds * done, "loss": loss + noise,
            "lr_scale": 1 - done,
        }  # fmt: skip
        if stage == "rl":
            line |= {
                "reward": 0.1 + 0.2 * done + 2 * noise, "kl_child_parent": 0.06 * done + abs(noise) / 10,
                "gold": 0.05 + 0.05 * done + 2 * noise, "answer_tokens": 14 + 3 * done + 10 * noise,
            }  # fmt: skip
        if stage in ("reward", "gold"):
            line |= {"accuracy": 0.5 + 0.1 * done + noise, "margin": 0.2 * done}
        yield line
    yield {"step": steps + 1, "tokens": tokens, "seconds": seconds, "loss": None, "skipped": True}
