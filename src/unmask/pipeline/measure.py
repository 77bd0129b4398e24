"""Measuring a finished run: every probe on its layers, and the files that page, tests and people read."""

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unmask.files import read_json_lines, write_atomic
from unmask.lineage import Checkpoint, load_layers
from unmask.model.scorer import Scorer
from unmask.pipeline.build import RATE, Built
from unmask.probes.blame import Blame, blame
from unmask.probes.blame_truth import blame_truth
from unmask.probes.compression import compression
from unmask.probes.divergence import divergence
from unmask.probes.facts import PlantedFact, planted_facts
from unmask.probes.forward import Judge
from unmask.probes.probe import Finding
from unmask.probes.reward_quality import Compared, Opinion, reward_quality, text_of
from unmask.probes.rl_effect import rl_effect
from unmask.probes.weights_change import weights_change
from unmask.progress import Progress
from unmask.recipe import Recipe
from unmask.report import run as run_files
from unmask.stages import examples
from unmask.stages.prepare import Prepared
from unmask.text.chat import Chat, render
from unmask.text.tokenizer import Tokenizer
from unmask.training import machine

# What a run stands by, in summary.json; all else is in findings.jsonl beside it.
CLAIMS = {
    "bits_per_byte", "bits_per_byte_xz", "bits_per_byte_change",
    "facts_completed", "facts_answered", "facts_answered_held_wording", "facts_answered_after_chat",
    "facts_hidden", "facts_kept", "facts_kept_after_chat", "facts_answered_change",
    "facts_answered_after_chat_change", "answers_stop",
    "blame_auc", "answer_delta", "wrapping_delta",
    "reward_accuracy", "reward_accuracy_words", "reward_accuracy_length", "reward_accuracy_over_words",
    "reward_accuracy_over_length", "reward_margin", "reward_calibration_error", "reward_length_correlation",
    "proxy_gain", "gold_gain", "gold_gain_any_length", "answer_length", "answer_length_change", "capitals",
    "kl_child_parent", "relative_weight_change",
}  # fmt: skip

MEASURED_ON = {  # written beside what was measured; what their rows need
    "facts.jsonl": {field.name for field in fields(PlantedFact)},
    "heldout.jsonl": {"source", "text"},
    "prompts.jsonl": {"messages"},
}
WRITTEN = ("summary.json", "findings.jsonl", "blame.json", *MEASURED_ON)
# Of the prompts: a mean over every token of their answers needs fewer than one score an answer.
KL_PROMPTS = 128


class Measured(NamedTuple):
    findings: list[Finding]
    blames: list[Blame]
    seconds: float
    peak_bytes: int


def measure(
    recipe: Recipe, prepared: Prepared, built: Built, device: torch.device, progress: Progress
) -> Measured:
    """All probes on the layers of a run, in float32."""
    started = time.monotonic()
    machine.reset_peak_memory(device)
    layers = load_layers([built.base, built.sft, built.rl], device=str(device))
    base, mask, nudge = layers
    proxy = load_judge(built.reward, device)
    gold = load_judge(built.gold, device) if built.gold else None
    facts = planted(prepared)
    prompts = [
        render(prepared.tokenizer, chat, open_turn=True).ids
        for chat in held_prompts(recipe, prepared.tokenizer)
    ]
    amount, seed = recipe.measure, recipe.seed
    findings: list[Finding] = []

    def say(what: str) -> None:
        progress.line(f"measuring  {what}")

    say("held-out text")
    findings += compression(layers, prepared.heldout, limit_bytes=amount.heldout_bytes, seed=seed)
    findings += weights_change(layers)
    if facts:
        say("planted facts")
        findings += planted_facts(
            layers,
            facts,
            examples.beginnings(recipe, held=True),
            limit=amount.facts_per_group,
            seed=seed,
        )
        findings += blame_truth(base, mask, facts, limit=amount.facts_per_group, seed=seed)
    say("what people preferred")
    findings += _reward_quality(recipe, proxy, "proxy")
    if gold is not None:
        findings += _reward_quality(recipe, gold, "gold")
    say("what the nudge did")
    findings += rl_effect(
        mask, nudge, prompts, proxy, gold, max_new_tokens=amount.answer_tokens, limit=amount.prompts,
        floor_limit=amount.floor_prompts, seed=seed,
    )  # fmt: skip
    say("how far each layer moved")
    findings += divergence(
        layers, prompts, prepared.heldout, max_new_tokens=amount.answer_tokens, limit=KL_PROMPTS,
        floor_limit=amount.floor_prompts, seed=seed,
    )  # fmt: skip
    say("blame")
    blames = [blame(layers, question) for question in dict.fromkeys((*_telling(facts), *amount.questions))]
    return Measured(findings, blames, time.monotonic() - started, machine.peak_memory(device))


def load_judge(checkpoint: Checkpoint, device: torch.device) -> Judge:
    model = checkpoint.model(torch.float32, str(device))
    assert isinstance(model, Scorer), f"{checkpoint.path} does not score"
    return Judge(checkpoint.name, model, checkpoint.tokenizer(), checkpoint.hash)


def planted(prepared: Prepared) -> list[PlantedFact]:
    return [PlantedFact.from_row(fact.to_row()) for fact in prepared.facts]


def held_prompts(recipe: Recipe, tokenizer: Tokenizer) -> list[Chat]:
    """Of `held_chats` those which leave room for an answer, drawn by the seed."""
    room = min(recipe.rl.prompt_tokens, recipe.context - recipe.measure.answer_tokens)
    distinct = held_chats(recipe)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(recipe.seed))
    fitting = (
        distinct[int(i)]
        for i in order
        if len(render(tokenizer, distinct[int(i)], open_turn=True).ids) <= room
    )
    return list(islice(fitting, recipe.measure.prompts))


def held_chats(recipe: Recipe) -> list[Chat]:
    """Conversations that no layer saw and that wait for an answer, each once: a source may stand in both sections."""
    chats = [
        chat
        for source in (*recipe.rl.sources, *recipe.sft.sources)
        for chat in examples.prompts(source, recipe, (), held=True)
    ]
    return list({json.dumps(chat): chat for chat in chats}.values())


def _reward_quality(recipe: Recipe, judge: Judge, half: examples.Half) -> list[Finding]:
    equal = recipe.reward.equal_length or examples.EQUAL_LENGTH
    pairs = {
        group: [
            Compared(*each) for each in examples.comparisons(recipe, "held_out", recipe.measure.pairs, length)
        ]
        for group, length in (("all", None), ("equal_length", equal))
    }
    train = [Opinion(text_of(chat), value, owner) for chat, value, owner in examples.opinions(recipe, half)]
    return reward_quality(judge, pairs, train, seed=recipe.seed)


def _telling(facts: Sequence[PlantedFact]) -> list[str]:
    """A question each about a fact that both layers were taught, that the base alone was, and SFT alone."""
    found: dict[str, str] = {}
    for fact in facts:
        if not fact.leaked and fact.field == "capital":
            found.setdefault(fact.group, fact.question)
    return [found[group] for group in ("both", "base_only", "sft_only") if group in found]


def stands(directory: Path, recipe: Recipe, built: Built) -> bool:
    """Whether what lies in `directory` was measured on these layers, with these settings, by this version."""
    if not all((directory / name).is_file() for name in WRITTEN):
        return False
    try:
        run_files.measured(directory)
        for name, needed in MEASURED_ON.items():
            if any(not needed <= row.keys() for row in read_json_lines(directory / name)):
                return False
        summary = json.loads((directory / "summary.json").read_bytes())
        hashes = {row["name"]: row["hash"] for row in (*summary["stages"], summary["gold"]) if row}
        by = summary["measured_by"]
    except (ValueError, KeyError, TypeError):  # of another version, or damaged: measured anew
        return False
    return hashes == {stage.name: stage.hash for stage in built.all} and by == _by(recipe)


def _by(recipe: Recipe) -> dict[str, Any]:
    return {
        "version": metadata.version("unmask"),
        "seed": recipe.seed,
        "measure": recipe.measure.model_dump(mode="json"),
    }


def write(
    directory: Path,
    recipe: Recipe,
    prepared: Prepared,
    built: Built,
    measured: Measured,
    device: torch.device,
) -> None:
    """What was measured, and what it was measured on; last of all summary.json, which says that a run is done."""
    write_atomic(directory / "findings.jsonl", _lines([finding.to_json() for finding in measured.findings]))
    write_atomic(directory / "facts.jsonl", _lines([fact.to_row() for fact in prepared.facts]))
    held = [{"source": document.source, "text": document.text} for document in prepared.heldout]
    write_atomic(directory / "heldout.jsonl", _lines(held))
    prompts = [{"messages": chat} for chat in held_prompts(recipe, prepared.tokenizer)]
    write_atomic(directory / "prompts.jsonl", _lines(prompts))
    blames = json.dumps([blame.to_json() for blame in measured.blames], ensure_ascii=False)
    write_atomic(directory / "blame.json", blames.encode("utf-8", "replace"))
    rates = [c.record.metrics.get(RATE) for c in built.all if c.record]
    rate = max(
        machine.matmul_rate(machine.compute_dtype(device), device=device),
        *(float(each) for each in rates if isinstance(each, float)),
    )
    stages = [_row(checkpoint, directory) for checkpoint in built.all if checkpoint != built.gold]
    parameters = sum(p.numel() for p in built.rl.model().parameters())
    summary = {
        "name": recipe.name,
        "total_seconds": prepared.seconds
        + sum(_row(c, directory)["seconds"] for c in built.all)
        + measured.seconds,
        "prepare_seconds": prepared.seconds,
        "measure_seconds": measured.seconds,
        "measure_peak_bytes": measured.peak_bytes,
        "measured_by": _by(recipe),
        "parameters": parameters,
        "machine": f"{machine.describe(device)}; matrix products {rate / 1e9:,.0f} GFLOP/s measured",
        RATE: rate,
        "stages": stages,
        "gold": _row(built.gold, directory) if built.gold else None,
        "claims": [finding.to_json() for finding in measured.findings if is_claim(finding, stages)],
    }
    write_atomic(directory / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def is_claim(finding: Finding, stages: Sequence[dict[str, Any]]) -> bool:
    """A KL is claimed for a layer and its direct parent, on the layer's own sampled answers, which it averages over."""
    if finding.metric != "kl_child_parent":
        return finding.metric in CLAIMS
    parents = {stage["name"]: stage["parent_hash"] for stage in stages}
    of_parent = parents.get(finding.child) == finding.parent_hash
    return (
        finding.probe == "T1-2" and finding.text_source == "A sample" and finding.group is None and of_parent
    )


def _row(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    record = checkpoint.record
    assert record is not None
    return {
        "name": record.name,
        "kind": record.kind,
        "path": str(checkpoint.path.relative_to(directory)),
        "hash": checkpoint.hash,
        "parent_hash": record.parent.hash if record.parent else None,
        "inputs": {role: reference.hash for role, reference in record.inputs.items()},
        "tokens": record.tokens,
        "steps": record.steps,
        "seconds": record.seconds,
        "peak_bytes": record.peak_bytes,
        "flops": record.flops,
        "metrics": record.metrics,
    }


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
