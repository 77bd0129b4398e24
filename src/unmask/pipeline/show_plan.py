"""What `unmask plan` prints."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table

from unmask.pipeline.estimate import Accelerator, Cost, shape
from unmask.pipeline.plan import Plan
from unmask.progress import duration
from unmask.recipe import Recipe
from unmask.training import machine


class Planned(NamedTuple):
    """A recipe's costs and times on this device, and its costs on accelerators, of whose rate training is to reach a
    share."""

    recipe: Recipe
    device: torch.device
    costs: Sequence[Cost]
    timed: Plan
    accelerators: Sequence[Accelerator]
    costs_there: Sequence[Cost]
    share: float


FORMULA = (
    "FLOPs: 6 for each weight that a token is multiplied with and 6·L·d·T of attention, a token and network trained. "
    "Memory here: the least that training holds; a process takes 0.5 to 1.5 GB more, as it keeps what earlier "
    "stages took. rl: prompts and answers at their longest; the time here is of half as long ones."
)


def table(planned: Planned) -> Group:
    """A row a stage; a column for this machine, by steps that were timed, and one for each accelerator."""
    recipe, device, costs, timed, accelerators, costs_there, share = planned
    config = shape(recipe)
    head = (
        f"recipe {recipe.name} · depth {recipe.depth} · {config.hidden_size} wide · context {recipe.context} · "
        f"{timed.parameters / 1e6:,.1f} M parameters"
    )
    rows = Table(box=None)
    for title in (
        "stage",
        "tokens",
        "FLOPs",
        "memory here",
        "time here",
        *(each.key for each in accelerators),
    ):
        rows.add_column(title, justify="left" if title == "stage" else "right")
    for cost in costs:
        here = timed.seconds.get(cost.stage)
        rows.add_row(
            cost.stage,
            f"{cost.tokens:,}",
            f"{cost.flops:.2e}",
            f"{cost.bytes / 1e9:.2f} GB",
            "" if here is None else duration(here),
            *(duration(seconds(cost, each, share)) for each in accelerators),
        )
    rows.add_row("measure", "", "", "", duration(timed.seconds["measure"]))
    rows.add_row(
        "all",
        "",
        f"{sum(cost.flops for cost in costs):.2e}",
        f"{max(cost.bytes for cost in costs) / 1e9:.2f} GB",
        duration(timed.total),
        *(duration(sum(seconds(cost, each, share) for cost in costs)) for each in accelerators),
    )
    notes = [FORMULA, f"Here: {machine.describe(device)}, by steps that were timed just now."]
    notes += [_note(costs_there, each, share) for each in accelerators]
    return Group(head, rows, *notes)


def seconds(cost: Cost, accelerator: Accelerator, share: float) -> float:
    """Of a stage's training at `share` of an accelerator's rate; what RL reads and writes besides is not in it."""
    return cost.flops / (share * accelerator.flops_per_second)


def _note(costs: Sequence[Cost], accelerator: Accelerator, share: float) -> str:
    hours = sum(seconds(cost, accelerator, share) for cost in costs) / 3600
    said = (
        f"{accelerator.name}: {share:.0%} of {accelerator.flops_per_second / 1e12:,.0f} TFLOP/s is assumed, not "
        "measured, and answers are not in it"
    )
    if accelerator.dollars:
        low, high = (price * hours for price in accelerator.dollars)
        asked = " to ".join(f"${price:.2f}" for price in accelerator.dollars)
        cost = f"${low:,.2f} to ${high:,.2f}" if high >= 0.01 else "less than a cent"
        said += f"; {cost} at {asked} an hour"
    if max(cost.bytes for cost in costs) > accelerator.memory:
        said += f"; its {accelerator.memory / 1e9:.0f} GB are too few"
    return f"{said} ({accelerator.source})."


def as_json(planned: Planned) -> dict[str, Any]:
    """The same numbers: seconds, bytes, dollars."""
    recipe, device, costs, timed, accelerators, costs_there, share = planned
    elsewhere: dict[str, Any] = {}
    for each in accelerators:
        taken = {cost.stage: seconds(cost, each, share) for cost in costs_there}
        hours = sum(taken.values()) / 3600
        dollars = [price * hours for price in each.dollars] if each.dollars else None
        held = max(cost.bytes for cost in costs_there)
        elsewhere[each.name] = {
            "seconds": taken,
            "share": share,
            "bytes": held,
            "fits": held <= each.memory,
            "dollars": dollars,
            "source": each.source,
        }
    return {
        "recipe": recipe.name,
        "parameters": timed.parameters,
        "stages": [cost._asdict() for cost in costs],
        "here": {"machine": machine.describe(device), "seconds": timed.seconds},
        "accelerators": elsewhere,
    }
