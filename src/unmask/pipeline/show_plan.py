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
    """A recipe's costs and times on this device, and its costs on so many accelerators of a kind, of whose rate
    training is to reach a share."""

    recipe: Recipe
    device: torch.device
    costs: Sequence[Cost]
    timed: Plan
    accelerators: Sequence[Accelerator]
    costs_there: Sequence[Cost]
    gpus: int
    share: float
    price: float | None = None  # dollars an hour of this machine

    def seconds(self, cost: Cost, accelerator: Accelerator) -> float:
        """Of a stage's training there; what RL reads and writes besides is not in it."""
        return cost.flops / (self.share * accelerator.flops_per_second * self.gpus)

    @property
    def dollars_here(self) -> float | None:
        """None without a price, and for what was not timed."""
        if self.price is None or self.timed.untimed:
            return None
        return self.price * self.timed.total / 3600


FORMULA = (
    "FLOPs: 6 for each weight that a token is multiplied with and 6·L·d·T of attention, a token and network trained. "
    "Memory: the least that training holds here; a process takes 0.5 to 1.5 GB more, as it keeps what earlier "
    "stages took. rl: prompts and answers at their longest; the time here is of half as long ones."
)


def table(planned: Planned) -> Group:
    """A row a stage; a column for this machine, by steps that were timed, and one for each accelerator."""
    recipe, costs, timed, accelerators = planned.recipe, planned.costs, planned.timed, planned.accelerators
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
        "memory, at least",
        "time here",
        *(f"{planned.gpus} × {each.key}" if planned.gpus > 1 else each.key for each in accelerators),
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
            *(duration(planned.seconds(cost, each)) for each in accelerators),
        )
    if not timed.untimed:
        rows.add_row("measure", "", "", "", duration(timed.seconds["measure"]))
    rows.add_row(
        "all",
        "",
        f"{sum(cost.flops for cost in costs):.2e}",
        f"{max(cost.bytes for cost in costs) / 1e9:.2f} GB",
        "" if timed.untimed else duration(timed.total),
        *(duration(sum(planned.seconds(cost, each) for cost in costs)) for each in accelerators),
    )
    how = f"not timed: {timed.untimed}" if timed.untimed else "by steps that were timed just now"
    if (dollars := planned.dollars_here) is not None:
        how += f"; {_money(dollars)} at ${planned.price:.2f} an hour"
    notes = [FORMULA, f"Here: {machine.describe(planned.device)}, {how}."]
    notes += [_note(planned, each) for each in accelerators]
    return Group(head, rows, *notes)


def _note(planned: Planned, accelerator: Accelerator) -> str:
    costs, gpus = planned.costs_there, planned.gpus
    hours = sum(planned.seconds(cost, accelerator) for cost in costs) / 3600 * gpus
    held = max(cost.bytes for cost in costs)
    said = (
        f"{accelerator.name}: {planned.share:.0%} of {accelerator.flops_per_second / 1e12:,.0f} TFLOP/s is assumed, "
        "not measured (models of a few million weights reach far less), and answers are not in it"
    )
    if gpus > 1:
        said += f"; {gpus} of them are taken to be {gpus} times as fast, and hold {held / 1e9:,.1f} GB each"
    if accelerator.dollars:
        low, high = (price * hours for price in accelerator.dollars)
        asked = " to ".join(f"${price:.2f}" for price in accelerator.dollars)
        cost = f"{_money(low)} to {_money(high)}" if high >= 0.01 else _money(high)
        said += f"; {cost} at {asked} an hour"
    if held > accelerator.memory:
        said += f"; its {accelerator.memory / 1e9:.0f} GB are too few"
    return f"{said} ({accelerator.source})."


def _money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 0.01 else "less than a cent"


def as_json(planned: Planned) -> dict[str, Any]:
    """The same numbers: seconds, bytes of one device, dollars of all."""
    timed = planned.timed
    elsewhere: dict[str, Any] = {}
    for each in planned.accelerators:
        taken = {cost.stage: planned.seconds(cost, each) for cost in planned.costs_there}
        hours = sum(taken.values()) / 3600 * planned.gpus
        dollars = [price * hours for price in each.dollars] if each.dollars else None
        held = max(cost.bytes for cost in planned.costs_there)
        elsewhere[each.name] = {
            "seconds": taken,
            "gpus": planned.gpus,
            "share": planned.share,
            "bytes": held,
            "fits": held <= each.memory,
            "dollars": dollars,
            "source": each.source,
        }
    return {
        "recipe": planned.recipe.name,
        "parameters": timed.parameters,
        "stages": [cost._asdict() for cost in planned.costs],
        "here": {
            "machine": machine.describe(planned.device),
            "seconds": timed.seconds,
            "untimed": timed.untimed,
            "dollars": planned.dollars_here,
        },
        "accelerators": elsewhere,
    }
