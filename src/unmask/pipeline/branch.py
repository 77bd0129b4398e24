"""What a base goes on from where `pretrain.branch` names another run: the end of that one's stable phase."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from unmask.errors import UserError
from unmask.pipeline import begun
from unmask.pipeline.jobs import base_work
from unmask.recipe import Recipe, difference, given
from unmask.stages import pretrain
from unmask.training import machine, snapshot
from unmask.training.resume import STABLE, refuse_outside
from unmask.training.schedule import stable_phase

# What a branch may have otherwise than its trunk; by the names of the loop's settings, resume.AFTER_STABLE.
AFTER_STABLE = ("tokens", "warmup", "decay", "lr_floor", "branch")


def trunk(other: Path, directory: Path) -> str:
    """A hash of the state that the stable phase of the run in `other` ended with.

    Raises UserError if there is none, or if it is `directory` itself.
    """
    if other.resolve() == directory.resolve():
        raise UserError(
            f"pretrain.branch is {other}, this run itself. Give --output another directory, or leave it out."
        )
    stable = base_work(other) / STABLE
    if (found := snapshot.stamp(stable)) is None:
        raise UserError(
            f"pretrain.branch is {other}, and {stable} holds no snapshot: there is no such run, or its base "
            "has no stable phase (a warm-up that ends before the decay begins), or not yet, or it was deleted."
        )
    return found


def refuse_another(
    other: Path,
    recipe: Recipe,
    decided: Mapping[str, Any],
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Raises UserError where the base in `other` is another one before its decay than the recipe's, naming a key.

    `decided`: what decides the base that is to begin.
    """
    work = base_work(other)
    if (found := snapshot.latest(work / STABLE, say)) is None:
        raise UserError(f"{work / STABLE} holds no whole snapshot: there is nothing to branch from.")
    here, there = str(machine.compute_dtype(device)), f"torch.{found.meta['identity'].get('precision')}"
    if here != there:
        raise UserError(
            f"the base of {other} was trained in {there}, and this machine trains in {here}: it can be "
            "branched on a machine like its own alone."
        )
    then = begun.read(work)
    if then.get("scheme") != decided["scheme"]:
        raise UserError(
            f"the base of {other} was made by a version of unmask that read texts otherwise: train it anew, or branch "
            "it with that version."
        )
    if key := difference(_before_decay(then), _before_decay(decided)):
        raise UserError(
            f"the base of {other} is another one before its decay: {key}. To branch from it, write the "
            "old value into the recipe."
        )
    section = recipe.pretrain
    steps, rows = pretrain.whole(given(section.tokens), given(section.batch_tokens), recipe.context)
    each = rows * recipe.context
    whole = steps * each
    stable = stable_phase(steps, each, section.warmup * whole, section.decay * whole)
    refuse_outside(found.step, stable, other)


def _before_decay(decided: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a base up to the end of its stable phase, of all that decides it."""
    whole = begun.with_defaults(decided)
    facts = dict(whole["facts"] or {})
    planted_for = facts.pop("pretrain_tokens", None) or whole["pretrain"]["tokens"]
    if any(source["path"] == "facts" for source in whole["pretrain"]["sources"]):
        # More of their text is other text: its rows come in another order.
        facts["pretrain_tokens"] = planted_for
    section = {key: value for key, value in whole["pretrain"].items() if key not in AFTER_STABLE}
    sources = {path: held for path, held in whole["sources"].items() if path != whole["pretrain"]["branch"]}
    return {**whole, "facts": facts, "pretrain": section, "sources": sources}
