"""`unmask run`, from the first line to the last: keep the recipe, build what is missing, measure, write the page."""

from contextlib import nullcontext
from pathlib import Path

from unmask.errors import UserError, nearest
from unmask.files import lock, sweep_temporaries, write_atomic
from unmask.pipeline import check, measure, show
from unmask.pipeline.build import Builder, Built
from unmask.pipeline.plan import plan
from unmask.progress import Progress
from unmask.recipe import STAGES, Recipe, dumps
from unmask.report.page import write_report
from unmask.stages.prepare import Prepared
from unmask.training import machine, parallel
from unmask.training.parallel import Ranks


def run(
    recipe: Recipe,
    *,
    output: Path | None = None,
    restart_from: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build all layers of a resolved recipe, measure them and write report.html; returns the run's directory.

    What the same recipe made from the same data and parents is kept; a stage under way goes on from its snapshot.
    Raises UserError where recipe, data or parent differ from what is there, naming the key, unless `restart_from`
    names a stage to begin anew from; for what is missing or unusable, before anything is trained; Interrupted when
    a signal stopped a stage after it was saved.
    """
    with parallel.joined(device) as (ranks, device):
        return _run(recipe, output, restart_from, device, progress or Progress(), ranks)


def _run(
    recipe: Recipe,
    output: Path | None,
    restart_from: str | None,
    device: str | None,
    progress: Progress,
    ranks: Ranks,
) -> Path:
    """All ranks train; what else there is to do the leader does alone."""
    if restart_from is not None and restart_from not in STAGES:
        raise UserError(
            f"--from {restart_from}: there is no such stage.{nearest(restart_from, STAGES)}"
            f" Stages: {', '.join(STAGES)}."
        )
    check.check_extras()
    directory = Path("runs") / recipe.name if output is None else output
    if (directory / "unmask.json").exists():
        raise UserError(f"{directory} is a checkpoint, not a run's directory. Give --output another one.")
    machine.keep_large_blocks()
    with lock(directory) if ranks.leader else nullcontext():
        builder = Builder(recipe, directory, machine.pick_device(device), progress, restart_from, ranks)
        with ranks.leader_first():
            if ranks.leader:
                prepared = _begin(builder)
            else:
                prepared = builder.prepare()
        built = builder.build(prepared)
        with (
            ranks.leader_first()
        ):  # the others wait: torchrun would take a machine that is done for one that is lost
            if ranks.leader:
                _measure(builder, prepared, built)
    return directory


def _measure(builder: Builder, prepared: Prepared, built: Built) -> None:
    recipe, directory = builder.recipe, builder.directory
    if measure.stands(directory, recipe, built):
        builder.progress.line(
            "measured  kept: the same layers and settings; delete summary.json to measure again"
        )
    else:
        measured = measure.measure(recipe, prepared, built, builder.device, builder.progress)
        measure.write(directory, recipe, prepared, built, measured, builder.device)
    write_report(directory)


def _begin(builder: Builder) -> Prepared:
    """Refuse what cannot be built, say what it will take, make the text, and set aside what is built anew."""
    recipe, directory = builder.recipe, builder.directory
    for place in (directory, directory / "data"):
        sweep_temporaries(place)
    builder.refuse_another_recipe()
    builder.refuse_another_trunk()
    builder.progress.line(show.opening(recipe, builder.device, plan(builder)))
    prepared = builder.prepare()
    if builder.missing():
        check.check(recipe, prepared)
    builder.set_aside()  # only now: a run that is refused stays as it was
    write_atomic(directory / "recipe.toml", dumps(recipe))
    return prepared
