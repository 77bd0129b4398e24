"""What a run prints: the plan before it starts, and at its end what was measured, each figure beside its yardstick."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from unmask.colours import layer_colour
from unmask.pipeline.plan import Plan
from unmask.probes.probe import Finding
from unmask.progress import duration
from unmask.recipe import Recipe
from unmask.report import words
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
        f"Preparing, training and measuring took {duration(summary['total_seconds'])} on",
        summary["machine"],
        escape(f"Open {directory}/report.html · talk: unmask chat {shlex.quote(str(directory))}"),
    ]
    if blames:
        asked = shlex.quote(blames[:2][-1]["prompt"])
        lines.append(
            f"Which layer says what: unmask blame {escape(f'{shlex.quote(str(directory))} {asked}')}"
        )
    return "\n".join(lines)


class _Claims:
    """The findings of a summary, as text: the value and its interval, with the digits that the interval allows."""

    def __init__(self, claims: list[dict[str, Any]]) -> None:
        self.findings = [Finding(**claim) for claim in claims]

    def get(self, metric: str, group: str | None, child: str) -> Finding | None:
        wanted = (metric, group, child)
        return next((f for f in self.findings if (f.metric, f.group, f.child) == wanted), None)

    def say(self, metric: str, group: str | None, child: str) -> str:
        """As "1.363 [1.318, 1.416]"; a dash where it was not measured."""
        found = self.get(metric, group, child)
        if found is None or found.value is None:
            return "–"
        digits = words.decimals(found)
        ends = [words.number(end, digits) for end in found.ci95 or ()]
        return words.number(found.value, digits) + (f" [{', '.join(ends)}]" if ends else "")

    def percent(self, metric: str, group: str | None, child: str) -> str:
        """As "61 [55, 67]"."""
        found = self.get(metric, group, child)
        if found is None or found.value is None:
            return "–"
        ends = [f"{100 * end:.0f}" for end in found.ci95 or ()]
        return f"{100 * found.value:.0f}" + (f" [{', '.join(ends)}]" if ends else "")

    def groups(self, metric: str) -> list[str]:
        return sorted({f.group for f in self.findings if f.metric == metric and f.group})


def _stages(summary: dict[str, Any], claims: _Claims) -> list[str]:
    lines = [
        f"[dim]{'stage':<9}{'kind':<9}{'tokens':>10}{'time':>10}{'memory':>8}{'speed':>7}   [95 % intervals][/dim]"
    ]
    for number, stage in enumerate(summary["stages"], 1):
        rate = stage["flops"] / max(stage["seconds"], 1e-9) / summary["matmul_flops_per_second"]
        name = stage["name"]
        lines.append(
            f"{number} [bold]{name:<7}[/bold]{stage['kind']:<9}{stage['tokens']:>10,}{duration(stage['seconds']):>10}"
            f"{stage['peak_bytes'] / 1e9:>5.1f} GB{rate:>5.0%} of matrix products alone"
        )
        if stage["kind"] == "pretrain":
            lines += [
                f"          held-out {escape(source)}: {claims.say('bits_per_byte', source, name)} bits a byte; "
                f"xz -9e {claims.say('bits_per_byte_xz', source, name).split()[0]}"
                for source in claims.groups("bits_per_byte")
            ]
        elif stage["kind"] == "reward":
            asked = {"reward model": "", "length alone": "_length", "words alone": "_words"}
            lines.append(f"{'':<10}{'% right':<18}" + "".join(f"{title:>15}" for title in asked))
            for group, title in (("all", "held-out people"), ("equal_length", "of equal length")):
                cells = (claims.percent(f"reward_accuracy{end}", group, name) for end in asked.values())
                lines.append(f"{'':<10}{title:<18}" + "".join(f"{cell:>15}" for cell in cells))
        else:
            lines.append(
                f"          % of answers that stop by themselves: {claims.percent('answers_stop', None, name)}"
            )
    return lines


def _facts(claims: _Claims) -> list[str]:
    if not claims.groups("facts_completed"):
        return []
    asked = (
        ("base says", "facts_completed", "base"),
        ("sft answers", "facts_answered", "sft"),
        ("other words", "facts_answered_held_wording", "sft"),
        ("rl answers", "facts_answered", "rl"),
    )
    lines = ["", f"{'% right, taught by':<18}" + "".join(f"{title:>15}" for title, _, _ in asked)]
    for group, title in GROUPS.items():
        cells = (claims.percent(metric, group, layer) for _, metric, layer in asked)
        lines.append(f"  {title:<16}" + "".join(f"{cell:>15}" for cell in cells))
    hidden = claims.percent("facts_hidden", "base_only", "sft")
    return [*lines, f"  hidden by the mask: {hidden} % of what the base alone was taught and says"]


def _truth(claims: _Claims) -> list[str]:
    found = claims.get("blame_auc", "sft_only_vs_both", "sft")
    if found is None:
        return []
    kinds = (("against both layers", "both"), ("against the base alone", "base_only"))
    return [
        "",
        f"Is blame right? Share of comparisons in which SFT's delta is larger on an answer"
        f"\nthat SFT alone taught (AUC, n = {found.n} countries)",
        *(f"  {title:<23}{claims.say('blame_auc', f'sft_only_vs_{group}', 'sft')}" for title, group in kinds),
        f"  {'groups shuffled':<23}{claims.say('blame_auc', 'shuffled', 'sft')}",
    ]


def _nudge(claims: _Claims) -> list[str]:
    kl = claims.get("kl_child_parent", None, "rl")
    floor = f"{kl.floor_numeric:.1g}" if kl and kl.floor_numeric is not None else "–"
    return [
        "",
        "The nudge: RL minus SFT, on the same held-out prompts",
        f"  {'the reward it climbs':<23}{claims.say('proxy_gain', None, 'rl')} log-odds",
        f"  {'gold, at equal length':<23}{claims.say('gold_gain', None, 'rl')} log-odds",
        f"  {'distance':<23}{claims.say('kl_child_parent', None, 'rl')} nats a token",
        f"  {'the same in bf16':<23}{floor}",
    ]


def _said(blame: dict[str, Any], names: list[str]) -> list[str]:
    lines = ["", f"What each layer says to «{escape(blame['prompt'])}»"]
    for place, name in enumerate(names):
        text = " ".join(blame["alone"][name].split())
        text = escape(text if len(text) < WIDTH - 10 else text[: WIDTH - 12] + " …") or "(no words)"
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
