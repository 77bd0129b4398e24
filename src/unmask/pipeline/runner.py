"""`unmask run`, from the first line to the last: keep the recipe, build what is missing, measure, write the page."""

from pathlib import Path

from unmask.errors import UserError, nearest
from unmask.files import lock, sweep_temporaries, write_atomic
from unmask.pipeline import check, measure, show
from unmask.pipeline.build import Builder
from unmask.pipeline.plan import plan
from unmask.progress import Progress
from unmask.recipe import STAGES, Recipe, dumps
from unmask.report.page import write_report
from unmask.training import machine


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
    progress = progress or Progress()
    if restart_from is not None and restart_from not in STAGES:
        raise UserError(
            f"--from {restart_from}: there is no such stage.{nearest(restart_from, STAGES)}"
            f" Stages: {', '.join(STAGES)}."
        )
    check.check_extras()
    directory = Path("runs") / recipe.name if output is None else output
    machine.keep_large_blocks()
    with lock(directory):
        for place in (directory, directory / "data"):
            sweep_temporaries(place)
        builder = Builder(recipe, directory, machine.pick_device(device), progress, restart_from)
        builder.refuse_another_recipe()
        progress.line(show.opening(recipe, builder.device, plan(builder)))

        prepared = builder.prepare()
        if builder.missing():
            check.check(recipe, prepared)
        builder.set_aside()  # only now: a run that is refused stays as it was
        write_atomic(directory / "recipe.toml", dumps(recipe))
        built = builder.build(prepared)

        if measure.stands(directory, recipe, built):
            progress.line(
                "measured  kept: the same layers and settings; delete summary.json to measure again"
            )
        else:
            measured = measure.measure(recipe, prepared, built, builder.device, progress)
            measure.write(directory, recipe, prepared, built, measured, builder.device)
        write_report(directory)
    return directory
