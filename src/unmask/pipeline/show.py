"""What a run prints: the plan before it starts, and at its end what was measured, each figure beside its yardstick."""

import shlex
from pathlib import Path

import torch
from rich.cells import cell_len, set_cell_size
from rich.markup import escape

from unmask.colours import layer_colour
from unmask.pipeline.plan import Plan
from unmask.probes.probe import Finding
from unmask.progress import duration
from unmask.recipe import Recipe
from unmask.report import words
from unmask.report.run import Blame, Run, Stage, read
from unmask.text.planted import GROUPS, TAUGHT_BY
from unmask.training import machine

WIDTH = 78  # columns that everything fits into


def opening(recipe: Recipe, device: torch.device, plan: Plan) -> str:
    """Size, machine, and how long it will take."""
    parts = ", ".join(f"{duration(seconds)} {name}" for name, seconds in plan.seconds.items())
    time = f"about {duration(plan.total)} once the text is prepared ({parts})" if parts else "all is there"
    if plan.untimed:
        time = f"not timed: {plan.untimed}"
    return (
        f"unmask · recipe {recipe.name} · depth {recipe.depth} · "
        f"{plan.parameters / 1e6:.1f} M parameters · {machine.describe(device)} · {time}"
    )


def closing(directory: Path) -> str:
    """The findings that a newcomer asks for first, read from the run's own files."""
    run = read(directory)
    lines = [""]
    for number, stage in enumerate(run.summary.stages, 1):
        lines += [_head(run, f"{number}", stage), *_of_stage(run, stage)]
        if stage.kind == "reward" and run.summary.gold:
            lines.append(_head(run, " ", run.summary.gold))
    lines += [*_facts(run), *_truth(run), *_nudge(run)]
    if run.blames:
        lines += _said(run, run.blames[0]) + _blamed(run, run.blames[0])
    return "\n".join([*lines, *_end(run, directory)])


def _head(run: Run, number: str, stage: Stage) -> str:
    title = f"{'stage':<9}{'kind':<9}{'tokens':>10}{'time':>10}{'memory':>8}{'speed':>7}   [95 % intervals]"
    limit = run.summary.matmul_flops_per_second * stage.ranks
    rate = stage.flops / max(stage.seconds, 1e-9) / limit
    line = (
        f"{number} [bold]{escape(f'{stage.name:<7}')}[/bold]{stage.kind:<9}{stage.tokens:>10,}"
        f"{duration(stage.seconds):>10}{stage.peak_bytes / 1e9:>5.1f} GB{rate:>5.0%} of matrix products alone"
    )
    return f"[dim]{escape(title)}[/dim]\n{line}" if number == "1" else line


def _of_stage(run: Run, stage: Stage) -> list[str]:
    """What a stage is judged by, beneath it."""
    if not stage.writes:
        return _judges(run, stage)
    sources = sorted({f.group or "" for f in run.all("bits_per_byte", stage.name)})
    if stage.kind == "pretrain":
        return [
            f"    held-out {escape(source)}: {_say(found)} bits a byte; xz -9e "
            f"{_say(run.get('bits_per_byte_xz', source, stage.name))}; n = {found.n if found else 0}"
            for source in sources
            for found in [run.get("bits_per_byte", source, stage.name)]
        ]
    stop = run.get("answers_stop", None, stage.name)
    return [
        f"    answers that stop by themselves: {_percent(stop)} % (n = {stop.n if stop else 0})",
        *(
            f"    bits a byte lost on {escape(source)}: {_say(found)} from {found.parent}"
            for source in sources
            for found in run.all("bits_per_byte_change", stage.name)
            if found.group == source and found.parent_hash == stage.parent_hash
        ),
    ]


def _judges(run: Run, stage: Stage) -> list[str]:
    """The reward model beside its yardsticks, and the second one, which no layer is trained on."""
    kinds = {"reward model": "", "length alone": "_length", "words alone": "_words"}
    lines = ["    " + f"{'% right (n conversations)':<32}" + "".join(f"{title:>14}" for title in kinds)]
    for judge, title in ((stage, ""), (run.summary.gold, "gold, ")):
        for group in ("all", "equal_length") if judge else ():
            assert judge is not None
            right = run.get("reward_accuracy", group, judge.name)
            if right is not None:
                cells = (
                    _percent(run.get(f"reward_accuracy{end}", group, judge.name)) for end in kinds.values()
                )
                name = f"{title}{'held out' if group == 'all' else 'of equal length'} ({right.n:,})"
                lines.append(f"    {name:<32}" + "".join(f"{cell:>14}" for cell in cells))
    margin = run.get("reward_margin", "all", stage.name)
    calibration = run.get("reward_calibration_error", "all", stage.name)
    length = run.get("reward_length_correlation", "all", stage.name)
    chance = (
        f" (chance {words.number(calibration.null_specific)})"
        if calibration and calibration.null_specific
        else ""
    )
    ahead = (
        f"    points over the words, {title}: {_percent(over)}: {_standing(over)}"
        for group, title in (("all", "held out"), ("equal_length", "of equal length"))
        if (over := run.get("reward_accuracy_over_words", group, stage.name)) is not None
    )
    return [
        *lines,
        *ahead,
        f"    margin {_say(margin, n=True)}, log-odds",
        f"    calibration error {_say(calibration)}{chance}",
        f"    correlation of score and length {_say(length)}",
    ]


def _standing(over: Finding) -> str:
    if not (over.verdict or "").startswith("above"):
        return "level"
    return "ahead" if (over.value or 0.0) > 0 else "behind"


def _facts(run: Run) -> list[str]:
    if not run.all("facts_completed", "base"):
        return []
    asked = (
        ("base says", "facts_completed", "base"),
        ("sft answers", "facts_answered", "sft"),
        ("other words", "facts_answered_held_wording", "sft"),
        ("rl answers", "facts_answered", "rl"),
    )
    lines = ["", f"{'% right, taught by':<18}" + "".join(f"{title:>15}" for title, _, _ in asked)]
    for group in GROUPS:
        cells = (_percent(run.get(metric, group, layer)) for _, metric, layer in asked)
        lines.append(f"  {words.group(group):<16}" + "".join(f"{cell:>15}" for cell in cells))
    hidden = run.get("facts_hidden", "base_only", "sft")
    found = [run.get("facts_answered", group, "sft") for group in GROUPS]
    lines.append(f"  {'n, countries':<16}" + "".join(f"  {words.group(f.group)} {f.n}" for f in found if f))
    lines.append(f"  hidden by the mask: {_percent(hidden)} % of what only the base was taught and says")
    for group in TAUGHT_BY["sft"]:
        kept = _percent(run.get("facts_kept", group, "rl"))
        lines.append(f"  kept by rl of what sft answers, {words.group(group)}: {kept} %")
    if not run.all("facts_answered_after_chat", "sft"):
        return lines
    later = (
        ("sft answers", "facts_answered_after_chat", "sft"),
        ("rl answers", "facts_answered_after_chat", "rl"),
        ("kept by rl", "facts_kept_after_chat", "rl"),
    )
    lines.append(f"{'  in mid chat, %':<18}" + "".join(f"{title:>15}" for title, _, _ in later))
    for group in TAUGHT_BY["sft"]:
        cells = (_percent(run.get(metric, group, layer)) for _, metric, layer in later)
        lines.append(f"    {words.group(group):<14}" + "".join(f"{cell:>15}" for cell in cells))
    return lines


def _truth(run: Run) -> list[str]:
    if run.get("blame_auc", "sft_only_vs_both", "sft") is None:
        return []
    lines = [
        "",
        "Is blame right? Share of comparisons in which SFT's delta is larger on an answer",
        "that SFT alone taught (AUC)",
    ]
    for title, group in (
        ("against both layers", "sft_only_vs_both"),
        ("against base only", "sft_only_vs_base_only"),
        ("groups shuffled", "shuffled"),
    ):
        lines.append(f"  {title:<23}{_say(run.get('blame_auc', group, 'sft'), n=True)}")
    lines.append(f"  {'nats that SFT added':<23}{'to the answer':<26}to the words before it")
    for group in GROUPS:
        answer, before = (run.get(f"{part}_delta", group, "sft") for part in ("answer", "wrapping"))
        lines.append(f"    {words.group(group):<21}{_say(answer):<26}{_say(before)}")
    return lines


def _nudge(run: Run) -> list[str]:
    gain, moved = run.get("proxy_gain", None, "rl"), run.get("kl_child_parent", None, "rl")
    floor = f"{moved.floor_numeric:.1g}" if moved and moved.floor_numeric is not None else "–"
    length = run.get("answer_length", None, "rl")
    lengths = (_say(run.get("answer_length", None, "sft")), _say(length))
    n = (found.n if found else None for found in (gain, length, moved))
    gold = run.get("gold_gain", None, "rl")
    return [
        "",
        "The nudge: rl minus sft, on the same held-out prompts",
        "  n of rewards {}, of lengths {}, of the distance {}".format(*(each or "–" for each in n)),
        f"  {'the reward it climbs':<23}{_say(gain)} log-odds",
        *([f"  {'gold, at equal length':<23}{_say(gold)} log-odds"] if gold else []),
        f"  {'length of answers':<23}{' → '.join(lengths)} tokens",
        f"  {'distance':<23}{_say(moved)} nats a token",
        f"  {'the same in bf16':<23}{floor}",
    ]


def _said(run: Run, blame: Blame) -> list[str]:
    lines = ["", f"What each layer says to «{escape(blame.prompt)}»"]
    for place, name in enumerate(run.layers):
        text = " ".join(blame.alone[name].split())
        text = (
            escape(text if cell_len(text) < WIDTH - 10 else set_cell_size(text, WIDTH - 12) + " …")
            or "(no words)"
        )
        lines.append(f"  {_marked(place, name)}{' ' * (6 - len(name))} {text}")
    return lines


def _blamed(run: Run, blame: Blame) -> list[str]:
    """The answer's tokens with the mark of their layer beneath, in lines that fit."""
    legend = "   ".join(_marked(place, name) for place, name in enumerate(run.layers))
    lines = ["", f"Who put the words there (blame)   {legend}"]
    tokens, marks, width = "", "", 0
    for token in blame.tokens:
        colour = layer_colour(run.place(token.layer))
        text = " ".join(token.text.split()) or "·"
        wide = cell_len(text)  # a Chinese character fills two columns
        if width + wide + 1 > WIDTH - 2:
            lines += [f"  {tokens}", f"  {marks}"]
            tokens, marks, width = "", "", 0
        tokens += f"[{colour.terminal}]{escape(text)}[/] "
        marks += f"[{colour.terminal}]{colour.mark}[/]{' ' * wide}"
        width += wide + 1
    nats = [sum(token.parts[i] for token in blame.tokens) for i in range(len(blame.layers))]
    parts = " · ".join(f"{name} {value:+.1f}" for name, value in zip(blame.layers, nats, strict=True))
    whole = sum(token.logprob for token in blame.tokens)
    total = f"sum {sum(nats):.2f} = log p {whole:.2f}"
    return [*lines, f"  {tokens}", f"  {marks}", f"  nats: {escape(parts)} · {total}"]


def _end(run: Run, directory: Path) -> list[str]:
    summary, place = run.summary, shlex.quote(str(directory))
    lines = [
        "",
        f"{duration(summary.total_seconds)}: preparing {duration(summary.prepare_seconds)}, training "
        f"{duration(summary.total_seconds - summary.prepare_seconds - summary.measure_seconds)}, measuring "
        f"{duration(summary.measure_seconds)} ({summary.measure_peak_bytes / 1e9:.1f} GB)",
        summary.machine,
        escape(f"Open {directory}/report.html · talk: unmask chat {place}"),
    ]
    if run.blames:
        another = run.blames[min(1, len(run.blames) - 1)]  # than the one that was just shown
        lines += [
            "Which layer says what:",
            f"  unmask blame {escape(f'{place} {shlex.quote(another.prompt)}')}",
        ]
    return lines


def _say(finding: Finding | None, *, n: bool = False) -> str:
    """As "1.363 [1.318, 1.416]", with the digits that the interval allows; a dash for what was not measured."""
    if finding is None or finding.value is None:
        return "–"
    digits = words.decimals(finding)
    ends = ", ".join(words.number(end, digits) for end in finding.ci95 or ())
    of = f" (n = {finding.n:,} {words.plural(finding.n_unit, finding.n)})" if n and finding.n else ""
    return escape(words.number(finding.value, digits) + (f" [{ends}]" if ends else "") + of)


def _percent(finding: Finding | None) -> str:
    """As "61 [55, 67]"."""
    if finding is None or finding.value is None:
        return "–"
    ends = [f"{100 * end:.0f}" for end in finding.ci95 or ()]
    return escape(f"{100 * finding.value:.0f}" + (f" [{', '.join(ends)}]" if ends else ""))


def _marked(place: int, name: str) -> str:
    colour = layer_colour(place)
    return f"[{colour.terminal}]{colour.mark} {escape(name)}[/]"
