"""What a run prints: the plan before it starts, and at its end what was measured, each figure beside its yardstick."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from unmask.colours import layer_colour
from unmask.pipeline.plan import Plan
from unmask.progress import duration
from unmask.recipe import Recipe
from unmask.training import parallel

GROUPS = {"both": "both layers", "base_only": "the base alone", "sft_only": "SFT alone", "none": "no layer"}
WIDTH = 78  # columns that everything fits into


def opening(recipe: Recipe, device: torch.device, plan: Plan) -> str:
    """Size, machine, and how long it will take."""
    parts = ", ".join(f"{duration(seconds)} {name}" for name, seconds in plan.seconds.items())
    time = f"about {duration(plan.total)} of training ({parts}), then measuring" if parts else "measuring"
    return (
        f"[bold]unmask[/bold] · recipe {recipe.name} · depth {recipe.depth} · "
        f"{plan.parameters / 1e6:.1f} M parameters · {parallel.describe(device)} · {time}"
    )


def closing(directory: Path) -> str:
    """The findings that a newcomer asks for first, read from the run's own files."""
    summary = json.loads((directory / "summary.json").read_text("utf-8"))
    blames = json.loads((directory / "blame.json").read_text("utf-8"))
    claims = _Claims(summary["claims"])
    names = [stage["name"] for stage in summary["stages"] if stage["kind"] != "reward"]
    lines = ["", *_stages(summary, claims), *_facts(claims), *_truth(claims), *_nudge(claims)]
    if blames:
        lines += _said(blames[0], names) + _blamed(blames[0], names)
    lines += [
        "",
        f"Preparing, training and measuring took {duration(summary['total_seconds'])} · {summary['machine']}",
        f"Open {directory}/report.html · talk: unmask chat {directory}",
    ]
    if blames:
        asked = shlex.quote(blames[:2][-1]["prompt"])
        lines.append(f"Which layer says what: unmask blame {escape(f'{directory} {asked}')}")
    return "\n".join(lines)


class _Claims:
    def __init__(self, claims: list[dict[str, Any]]) -> None:
        self.claims = claims

    def get(self, metric: str, group: str | None, child: str) -> dict[str, Any] | None:
        return next(
            (c for c in self.claims if (c["metric"], c["group"], c["child"]) == (metric, group, child)), None
        )

    def say(self, metric: str, group: str | None, child: str, scale: float = 1.0, unit: str = "") -> str:
        """The value with its half-width of interval; a dash where it was not measured."""
        found = self.get(metric, group, child)
        if found is None or found["value"] is None:
            return "–"
        digits = "{:.0f}" if scale == 100 else "{:.3g}"
        text = digits.format(scale * found["value"])
        if found["ci95"]:
            low, high = found["ci95"]
            text += f" ± {digits.format(scale * (high - low) / 2)}"
        return text + unit

    def share(self, metric: str, group: str | None, child: str) -> str:
        return self.say(metric, group, child, 100, " %")


def _stages(summary: dict[str, Any], claims: _Claims) -> list[str]:
    lines = []
    for number, stage in enumerate(summary["stages"], 1):
        rate = stage["flops"] / max(stage["seconds"], 1e-9) / summary["matmul_flops_per_second"]
        lines.append(
            f"{number} [bold]{stage['name']:<7}[/bold]{stage['kind']:<9}{stage['tokens']:>10,} tokens  "
            f"{duration(stage['seconds']):>8}  {stage['peak_bytes'] / 1e9:.1f} GB  {rate:.0%} of the matmul rate"
        )
        if stage["kind"] == "pretrain":
            for source in sorted(
                {c["group"] for c in claims.claims if c["metric"] == "bits_per_byte" and c["group"]}
            ):
                xz = claims.say("bits_per_byte_xz", source, stage["name"])
                bits = claims.say("bits_per_byte", source, stage["name"])
                lines.append(f"          held-out {source}: {bits} bits a byte (xz -9e: {xz})")
        elif stage["kind"] == "sft":
            lines.append(
                f"          answers stop by themselves: {claims.share('answers_stop', None, stage['name'])}"
            )
        elif stage["kind"] == "reward":
            for group, title in (("all", "held-out people"), ("equal_length", "equal length")):
                ours = claims.share("reward_accuracy", group, stage["name"])
                length = claims.share("reward_accuracy_length", group, stage["name"])
                words = claims.share("reward_accuracy_words", group, stage["name"])
                lines.append(f"          {title}: right {ours} (length alone {length}, words alone {words})")
    return lines


def _facts(claims: _Claims) -> list[str]:
    if not any(c["metric"] == "facts_completed" for c in claims.claims):
        return []
    asked = (
        ("base says", "facts_completed", "base"),
        ("sft answers", "facts_answered", "sft"),
        ("other words", "facts_answered_held_wording", "sft"),
        ("rl answers", "facts_answered", "rl"),
    )
    lines = ["", f"{'Facts taught by':<18}" + "".join(f"{title:>15}" for title, _, _ in asked)]
    for group, title in GROUPS.items():
        cells = (claims.share(metric, group, layer) for _, metric, layer in asked)
        lines.append(f"  {title:<16}" + "".join(f"{cell:>15}" for cell in cells))
    hidden = claims.share("facts_hidden", "base_only", "sft")
    return [*lines, f"  hidden by the mask: {hidden} of what the base alone was taught and says"]


def _truth(claims: _Claims) -> list[str]:
    if claims.get("blame_auc", "shuffled", "sft") is None:
        return []
    found = claims.get("blame_auc", "sft_only_vs_both", "sft")
    n = found["n"] if found else 0
    return [
        "",
        f"Is blame right? SFT's delta on answers that SFT alone taught, n = {n} countries",
        f"  AUC {claims.say('blame_auc', 'sft_only_vs_both', 'sft')} against both, "
        f"{claims.say('blame_auc', 'sft_only_vs_base_only', 'sft')} against base only; "
        f"shuffled {claims.say('blame_auc', 'shuffled', 'sft')}",
    ]


def _nudge(claims: _Claims) -> list[str]:
    kl = claims.get("kl_child_parent", None, "rl")
    floor = f"{kl['floor_numeric']:.1g}" if kl and kl["floor_numeric"] is not None else "–"
    verdict = kl["verdict"] if kl else ""
    return [
        "",
        f"The nudge: proxy reward {claims.say('proxy_gain', None, 'rl')}, gold at equal length "
        f"{claims.say('gold_gain', None, 'rl')} log-odds",
        f"  {claims.say('kl_child_parent', None, 'rl')} nats a token from the mask "
        f"(same weights in bf16: {floor}) · {verdict}",
    ]


def _said(blame: dict[str, Any], names: list[str]) -> list[str]:
    lines = ["", f"What each layer says to «{escape(blame['prompt'])}»"]
    for place, name in enumerate(names):
        text = escape(" ".join(blame["alone"][name].split())[:160]) or "(nothing: it ends at once)"
        lines.append(f"  {_marked(place, name)}{' ' * (6 - len(name))} {text}")
    return lines


def _blamed(blame: dict[str, Any], names: list[str]) -> list[str]:
    """The answer's tokens with the mark of their layer beneath, in lines that fit."""
    lines = [
        "",
        "Who put the words there (blame)   " + "   ".join(_marked(i, name) for i, name in enumerate(names)),
    ]
    words, marks, width = "", "", 0
    for token in blame["tokens"]:
        colour = layer_colour(names.index(token["layer"]) if token["layer"] else -1)
        text = " ".join(token["text"].split()) or "·"
        if width + len(text) + 1 > WIDTH - 2:
            lines += [f"  {words}", f"  {marks}"]
            words, marks, width = "", "", 0
        words += f"[{colour.terminal}]{escape(text)}[/] "
        marks += f"[{colour.terminal}]{colour.mark}[/]{' ' * len(text)}"
        width += len(text) + 1
    nats = " · ".join(
        f"{name} {value:+.1f}" for name, value in zip(blame["layers"], blame["nats"], strict=True)
    )
    total = f"sum {sum(blame['nats']):.2f} = log-probability {blame['logprob']:.2f}"
    return [*lines, f"  {words}", f"  {marks}", f"  nats: {nats} · {total}"]


def _marked(place: int, name: str) -> str:
    colour = layer_colour(place)
    return f"[{colour.terminal}]{colour.mark} {name}[/]"
