"""Building the stages of a run: keep those that fit the recipe, resume the one under way, train the rest."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.errors import UserError
from unmask.files import read_json_lines
from unmask.lineage import Checkpoint, write_checkpoint
from unmask.model.compiled import compiles, lacking
from unmask.model.decoder import Trunk
from unmask.pipeline import begun, branch, jobs
from unmask.pipeline.jobs import Job, Place
from unmask.progress import Progress
from unmask.recipe import Recipe, difference
from unmask.stages.prepare import SCHEME, Prepared, prepare
from unmask.text.sources import content_hash
from unmask.training import loop, machine
from unmask.training.cost import training_flops
from unmask.training.parallel import ALONE, Ranks
from unmask.training.resume import SNAPSHOTS
from unmask.training.shard import unsharded

ORDER = ("base", "sft", "reward", "gold", "rl")  # gold: the second scorer, which no layer is trained on
SECTIONS = {"base": "pretrain", "sft": "sft", "reward": "reward", "gold": "reward", "rl": "rl"}
MADE_FROM = {"sft": ("base",), "reward": ("sft",), "gold": ("sft",), "rl": ("sft", "reward")}
MEASURED = ("summary.json", "findings.jsonl", "blame.json", "report.html")  # they speak of the old stages
RATE = "matmul_flops_per_second"  # of the machine, measured before each stage: another process may load it at times
# By kind, on a GPU. Not PPO: its ratios are to start at 1 and its divergence from SFT at 0, so that what learns has to
# read with the very kernels of what was frozen or is not learning yet; and most of its time goes into answers.
COMPILED = ("pretrain", "sft", "reward")
SHARED = ("seed", "depth", "context", "heldout", "tokenizer", "facts")


@dataclass(frozen=True)
class Built:
    """The finished stages of a run."""

    base: Checkpoint
    sft: Checkpoint
    reward: Checkpoint
    gold: Checkpoint | None
    rl: Checkpoint

    @property
    def all(self) -> list[Checkpoint]:
        return [
            stage for stage in (self.base, self.sft, self.reward, self.gold, self.rl) if stage is not None
        ]


class Builder:
    """The stages of one run directory. `anew`: the first stage that is to be built again, whatever is there."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        device: torch.device,
        progress: Progress,
        anew: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.directory, self.device, self.progress = recipe, directory, device, progress
        self.ranks = ranks
        self.later = ORDER[ORDER.index(anew) :] if anew else ()
        self._contents: dict[str, str] = {}

    def prepare(self) -> Prepared:
        return prepare(self.recipe, self.directory / "data", self.progress)

    def build(self, prepared: Prepared) -> Built:
        if self.device.type == "cuda" and (what := lacking(self.device)):
            self.progress.line(
                f"nothing is compiled for the GPU, which makes training slower: it lacks {what}"
            )
        place = Place(self.recipe, prepared, self.device, self.progress, self.ranks)
        base = self._stage("base", "pretrain", None, lambda: jobs.pretraining(place), prepared)
        mask = self._stage("sft", "sft", base, lambda: jobs.imitation(place, base), prepared)
        judge = self._stage("reward", "reward", mask, lambda: jobs.preference(place, mask, "proxy"), prepared)
        gold = None
        if self.recipe.reward.gold:
            gold = self._stage("gold", "reward", mask, lambda: jobs.preference(place, mask, "gold"), prepared)
        nudge = self._stage(
            "rl",
            "ppo",
            mask,
            lambda: jobs.reinforcement(place, mask, judge, gold),
            prepared,
            {"reward": judge},
        )
        return Built(base, mask, judge, gold, nudge)

    # What is there ----------------------------------------------------------------------------------------------

    def missing(self) -> list[str]:
        """Stages that have still to be trained, in their order."""
        wanted = [name for name in ORDER if name != "gold" or self.recipe.reward.gold]
        return [name for name in wanted if name in self.later or not (self.directory / name).exists()]

    def refuse_another_recipe(self) -> None:
        """Raises UserError if a source is missing, if a stage that stays was begun with another recipe (names the
        key), or if one that it was made from is gone."""
        decided = {name: self._decides(name) for name in ORDER}
        self._refuse_what_stands_on_nothing()
        for name in ORDER:
            found = None if name in self.later else self._begun(name)
            if found is not None and (key := difference(begun.with_defaults(found), decided[name])):
                raise UserError(
                    f"{self.directory / name} was made with another recipe: {key}. Run with the old value, "
                    f"give --output another directory, or build anew with"
                    f" --from {_stage_of(name)} (nothing is deleted)."
                )

    def refuse_another_trunk(self) -> None:
        """Raises UserError where the base that is to be branched from is another one before its decay, naming a key."""
        other = self.recipe.pretrain.branch
        begins = "base" in self.missing() and ("base" in self.later or not self._has_snapshot("base"))
        if other is not None and begins:
            decided = self._decides("base")
            branch.refuse_another(Path(other), self.recipe, decided, self.device, self.progress.line)

    def _refuse_what_stands_on_nothing(self) -> None:
        """A stage built again has another hash, for which those above it were not made: hours would be spent first."""
        missing = self.missing()
        for name, below in MADE_FROM.items():
            gone = [each for each in below if each in missing]
            if gone and name not in self.later and (self.directory / name).exists():
                raise UserError(
                    f"{self.directory / name} is there, and {self.directory / gone[0]}, which it was made from, is not."
                    f" Put it back, or build anew with --from {_stage_of(gone[0])} (nothing is deleted)."
                )

    def set_aside(self) -> None:
        """Move the stages that are built anew, with their work, to set-aside/N; nothing is deleted."""
        found = [
            path
            for name in self.later
            for path in (self.directory / name, self.directory / "work" / name)
            if path.exists()
        ]
        if not found:
            return
        found += [self.directory / name for name in MEASURED if (self.directory / name).exists()]
        aside = self.directory / "set-aside"
        number = 1 + max((int(path.name) for path in aside.glob("*") if path.name.isdigit()), default=0)
        for path in found:
            target = aside / str(number) / path.relative_to(self.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        self.progress.line(f"set aside in {aside / str(number)}: {', '.join(str(path) for path in found)}")

    def _begun(self, name: str) -> Mapping[str, Any] | None:
        """The recipe that a stage was finished or begun with."""
        if (self.directory / name).exists():
            record = Checkpoint.open(self.directory / name).record
            if record is None:
                raise UserError(
                    f"{self.directory / name} has no unmask.json: this run did not make it. Move it away and run again."
                )
            return record.recipe
        work = self.directory / "work" / name
        if not begun.there(work) or not self._has_snapshot(name):  # it would begin with its first step again
            return None
        try:
            return begun.read(work)
        except UserError as error:
            raise UserError(
                f"{error} Build it anew with --from {_stage_of(name)} (nothing is deleted)."
            ) from None

    def _has_snapshot(self, name: str) -> bool:
        return any((self.directory / "work" / name / SNAPSHOTS).glob("step_*"))

    def _decides(self, name: str) -> dict[str, Any]:
        """The part of the recipe that decides this stage, beyond its parents."""
        plain = self.recipe.model_dump(mode="json")
        if self.recipe.facts and self.recipe.facts.pretrain_tokens == self.recipe.pretrain.tokens:
            plain["facts"]["pretrain_tokens"] = None  # as much as without it
        section = dict(plain[SECTIONS[name]])
        for key in begun.DECIDES_NOTHING:
            section.pop(key, None)
        given = [section["source"]] if "source" in section else section["sources"]
        held = {each["path"]: self._content(each["path"]) for each in given if each["path"] != "facts"}
        if other := section.get("branch"):
            held[other] = self._branched_from(other)
        return {
            **{key: plain[key] for key in SHARED},
            SECTIONS[name]: section,
            "sources": held,
            "scheme": SCHEME,
        }

    def _branched_from(self, other: str) -> str:
        """A hash of the state that the base goes on, or went on, from. Once it has gone on it does not need it."""
        found = None if "base" in self.later else self._begun("base")
        if found is not None and found["pretrain"].get("branch") == other:
            return str(found["sources"][other])
        return branch.trunk(Path(other), self.directory)

    def _content(self, source: str) -> str:
        """What a source holds, read once a run: a corpus may be large."""
        if source not in self._contents:
            self._contents[source] = content_hash(source)
        return self._contents[source]

    # One stage --------------------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        kind: str,
        parent: Checkpoint | None,
        job: Callable[[], Job],
        prepared: Prepared,
        inputs: Mapping[str, Checkpoint] | None = None,
    ) -> Checkpoint:
        path, work = self.directory / name, self.directory / "work" / name
        if path.exists():
            # What a process left that died right after it had saved.
            shutil.rmtree(work / SNAPSHOTS, ignore_errors=True)
            return self._kept(path, parent, inputs or {}, prepared)
        started = time.monotonic()
        stage = job()
        trunks = [module for module in stage.model.modules() if isinstance(module, Trunk)]
        for trunk in trunks:
            trunk.recompute = getattr(self.recipe, SECTIONS[name]).recompute
            trunk.compiled = kind in COMPILED and compiles(self.device)
        setup = time.monotonic() - started
        rate = machine.matmul_rate(machine.compute_dtype(self.device), device=self.device)
        decided = self._decides(name) if self.ranks.leader else {}  # it reads all text
        if self.ranks.leader:
            begun.write(work, decided)
        outcome = loop.train(
            stage.model,
            stage.objective,
            stage.optimizer,
            stage.settings,
            work,
            self.progress,
            f"{name:<7}{kind:<9}",
            stage.shown,
            self.ranks,
        )
        for trunk in trunks:
            trunk.compiled = False
        with self.ranks.together():
            trained = unsharded(stage.model)
        with self.ranks.leader_first():
            if self.ranks.leader:
                model, metrics = stage.finish(trained, outcome)
                write_checkpoint(
                    path,
                    model=model.float(),
                    tokenizer=prepared.tokenizer,
                    name=name,
                    kind=kind,
                    parent=parent,
                    inputs=inputs,
                    data=stage.data,
                    recipe=decided,
                    seed=self.recipe.seed,
                    steps=outcome.steps,
                    tokens=outcome.tokens,
                    flops=self._flops(stage, outcome, work),
                    seconds=setup + outcome.seconds,
                    peak_bytes=outcome.peak_bytes,
                    metrics={
                        **metrics,
                        "skipped_steps": outcome.skipped_steps,
                        "left_out": stage.left_out,
                        "ranks": self.ranks.size,
                        RATE: rate,
                    },
                )
                # The checkpoint holds what they were for.
                shutil.rmtree(work / SNAPSHOTS, ignore_errors=True)
        return Checkpoint.open(path)

    def _flops(self, stage: Job, outcome: loop.Outcome, work: Path) -> float:
        context = self.recipe.context
        whole = training_flops(stage.model, outcome.tokens, context)
        if stage.idle is None:
            return whole
        network, steps = stage.idle
        lines = read_json_lines(work / "metrics.jsonl")
        unread = max((line["tokens"] for line in lines if line["step"] <= steps), default=0)
        return whole - training_flops(network, unread, context)

    def _kept(
        self, path: Path, parent: Checkpoint | None, inputs: Mapping[str, Checkpoint], prepared: Prepared
    ) -> Checkpoint:
        """The finished stage in `path`, if it is whole and comes from these parents."""
        checkpoint = Checkpoint.open(path)
        if problems := checkpoint.problems():
            raise UserError(problems[0])
        record = checkpoint.record
        assert record is not None, "refused at the start"
        if record.tokenizer != prepared.tokenizer.hash:
            raise UserError(
                f"{path} was made with another tokenizer than the text of this recipe gives now. "
                "Put the text back as it was, or build anew with --from base."
            )
        wanted = {role: other.hash for role, other in ({"parent": parent} | dict(inputs)).items() if other}
        found = {role: reference.hash for role, reference in record.inputs.items()}
        if record.parent:
            found["parent"] = record.parent.hash
        if key := difference(found, wanted):
            raise UserError(
                f"{path} was made from another checkpoint: {key}. Build anew with --from {_stage_of(path.name)}."
            )
        self.progress.line(
            f"{path.name:<7}{record.kind:<9}kept, {record.tokens:,} tokens in {record.seconds:.0f} s"
        )
        return checkpoint


def _stage_of(name: str) -> str:
    """What --from takes for a stage: the gold scorer is built with the reward model."""
    return "reward" if name == "gold" else name
