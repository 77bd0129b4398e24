"""README.md of a checkpoint: its record for people, with the front matter by which the Hub draws its tree."""

import json
import re
from typing import Any

from pydantic import JsonValue

from unmask.lineage.record import Record

KINDS = {
    "pretrain": "pretraining on raw text",
    "sft": "supervised fine-tuning on conversations",
    "reward": "a reward model from human preferences (Bradley–Terry); it scores, it does not write",
    "ppo": "reinforcement learning from human feedback (PPO)",
}


def model_card(record: Record) -> str:
    """README.md of a checkpoint: front matter as the Hub reads it, then the record for people.

    No hash covers the card: anybody may write more into it.
    """
    parent = record.parent
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if record.kind == "reward" else "text-generation",
        "tags": ["unmask", record.kind],
    }
    if parent is not None:
        matter |= {"base_model": parent.path, "base_model_relation": "finetune"}
    if found := _hub_names(record.recipe):
        matter["datasets"] = sorted(found)
    # JSON values are YAML values, and quote whatever YAML would read otherwise.
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in matter.items())
    begun_from = "nothing: random weights"
    if parent is not None:
        begun_from = f"`{parent.path}` (hash `{parent.hash[:12]}`)"
    elif branch := record.branch:
        begun_from = f"the stable phase of the base of `{branch.path}` (state `{branch.state[:12]}`)"
    rows = {
        "made by": f"`{record.kind}`: {KINDS.get(record.kind, 'a stage of training')}",
        "from": begun_from,
        **{f"with {name}": f"`{ref.path}` (hash `{ref.hash[:12]}`)" for name, ref in record.inputs.items()},
        **{f"data: {label}": f"`{fingerprint[:12]}`" for label, fingerprint in record.data.items()},
        "steps, tokens": f"{record.steps:,} steps, {record.tokens:,} tokens",
        "cost": f"{record.flops:.3g} FLOPs, {record.seconds:,.0f} s, {record.peak_bytes / 1e9:.2f} GB memory",
        "weights": f"{len(record.tensors)} tensors, {record.dtype}, seed {record.seed}",
        **{f"{name} (training)": _brief(value) for name, value in record.metrics.items()},
        "written with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    table = "".join(f"| {_cell(name)} | {_cell(text)} |\n" for name, text in rows.items())
    return (
        f"---\n{front}---\n\n# {record.name}\n\n"
        f"One layer of a lineage that `unmask` trained. Hash of its record: `{record.hash}`.\n\n"
        f"| | |\n| --- | --- |\n{table}\n"
        "`unmask log .` verifies every tensor, the tokenizer, the chat template, the configuration and the "
        "record, and follows the chain to its root. The full recipe is in `unmask.json`.\n"
    )


def _hub_names(recipe: JsonValue) -> set[str]:
    """The data sets of the Hub among a recipe's sources: only these names mean something there."""
    if isinstance(recipe, list):
        return {name for each in recipe for name in _hub_names(each)}
    if not isinstance(recipe, dict):
        return set()
    path = recipe.get("path")
    here = (
        {re.split("[:#]", path.removeprefix("hf://"))[0]}
        if isinstance(path, str) and path.startswith("hf://")
        else set()
    )
    return here | {name for each in recipe.values() for name in _hub_names(each)}


def _brief(value: JsonValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """Text that cannot leave its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
