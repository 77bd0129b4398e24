"""`unmask run` builds the layers of a recipe; `unmask report` writes its page anew."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.options import Device
from unmask.progress import Progress, console, speaks


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (tiny) or the path of a TOML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key: --set sft.tokens=600000. May be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the run lives. Default: runs/NAME.")] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", help="Build anew from this stage (base, sft, reward, rl); the old ones are set aside."
        ),
    ] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Build the layers: tokenizer, base, SFT, reward model, RL; then measure them and write report.html.

    Run it again to go on where it stopped. Ctrl-C saves first.
    """
    from unmask.pipeline import run as run_recipe
    from unmask.pipeline.show import closing
    from unmask.recipe import load, resolve

    directory = run_recipe(
        resolve(load(recipe, set_ or ())),
        output=output,
        restart_from=from_,
        device=device,
        progress=Progress(quiet),
    )
    if speaks():  # other processes are done before it is measured
        console().print(closing(directory), soft_wrap=True)  # a command that is cut in two cannot be copied


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (tiny) or the path of a TOML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, as for `run`. May be repeated.")
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(help="An accelerator to plan for, as H100; a wrong name lists all. May be repeated."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many of each accelerator.")] = 1,
    share: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Of an accelerator's rate, which training is taken to reach."),
    ] = 0.4,
    price: Annotated[
        float | None, typer.Option(min=0.0, max=1e6, help="Dollars an hour of this machine, for its cost.")
    ] = None,
    device: Device = None,
    json_: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """What a recipe's layers will cost, before anything is trained: parameters, FLOPs, memory, time, money.

    On this machine by steps that are timed now; on an accelerator by its data sheet and --share.
    """
    import json

    import torch

    from unmask.pipeline import estimate, show_plan
    from unmask.pipeline.plan import whole_plan
    from unmask.recipe import load, resolve
    from unmask.training import machine

    resolved = resolve(load(recipe, set_ or ()))
    named = [estimate.accelerator(key) for key in on or ()]
    here = machine.pick_device(device)
    costs = estimate.estimate(resolved, machine.compute_dtype(here), here.type == "cpu")
    there = estimate.estimate(resolved, torch.bfloat16, cpu=False, processes=gpus)
    Progress().line("timing a few steps of this size here …")
    timed = whole_plan(resolved, here)
    planned = show_plan.Planned(resolved, here, costs, timed, named, there, gpus, share, price)
    if json_:
        print(json.dumps(show_plan.as_json(planned)))
    else:
        console().print(show_plan.table(planned))


def text(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (tiny) or the path of a TOML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, as for `run`. May be repeated.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Copies and near copies in a recipe's text, and what of its held-out text and questions it trains on."""
    import json

    from unmask.pipeline import text_check
    from unmask.recipe import load, resolve

    found = text_check.look(resolve(load(recipe, set_ or ())))
    if json_:
        print(json.dumps(text_check.as_json(found), ensure_ascii=False))
    else:
        console().print(text_check.table(found))


def report(run: Annotated[Path, typer.Argument(help="The directory of a run, as runs/tiny.")]) -> None:
    """Write report.html of a finished run anew from its summary and findings."""
    from unmask.report.page import write_report

    print(write_report(run))
