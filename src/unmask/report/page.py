"""The page of a run: one HTML file that loads nothing and computes nothing."""

import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from unmask.colours import LAYER_COLOURS, NO_LAYER, layer_colour
from unmask.files import write_atomic
from unmask.probes.probe import Finding
from unmask.progress import duration
from unmask.report import sections, words
from unmask.report.run import Blame, Run, Stage, read

ROLES = {
    "pretrain": "unsupervised pretraining; it never saw a conversation",
    "sft": "the mask: fine-tuned on conversations",
    "ppo": "the nudge: reinforced toward what people rate higher",
}
PLANTED = (  # group, in the base's text, in the conversations, what it shows
    ("both", True, True, "the mask over knowledge that is there"),
    ("base_only", True, False, "what the base knows, and the mask shows or hides"),
    ("sft_only", False, True, "what fine-tuning itself put in"),
    ("none", False, False, "the control: chance"),
)
NUDGE = (
    "proxy_gain",
    "gold_gain",
    "kl_child_parent",
    "answers_stop",
    "answer_length",
    "answer_length_change",
    "capitals",
    "facts_kept",
    "facts_kept_after_chat",
)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a finished run from what it measured, and return its path.

    Raises UserError if the run is not finished, a file has another form, or the extra `report` is missing.
    """
    run = read(Path(run_dir))
    path = run.directory / "report.html"
    write_atomic(path, render(run))
    return path


def render(run: Run) -> str:
    parts = {
        "truth": sections.truth(run),
        "facts": sections.facts(run),
        "change": sections.change(run),
        "reward": sections.reward(run),
        "reinforcement": sections.reinforcement(run),
        "nudge": nudge(run),
        "losses": sections.losses(run),
    }
    return _template("page.html.j2").render(
        run=run,
        roles={stage.name: ROLES.get(stage.kind, stage.kind) for stage in run.stages},
        planted=PLANTED,
        shown_path=_shown(run.directory),
        hidden=[f for f in run.all("facts_hidden") if f.group == "base_only" and f.value is not None][:1],
        rail=rail(run),
        every=every(run),
        seeds=any(f.floor_seed is not None for f in every(run)),
        data=[token_data(blame, run.layers) for blame in run.blames],
        contents=_contents(run, parts),
        **_shared(run.layers),
        **parts,
    )


def write_blame(path: Path, found: Mapping[str, Any]) -> Path:
    """Write one blame, as `unmask blame --json` gives it, as a page of its own."""
    # A prompt from a command line may hold bytes that are no text.
    blame = Blame.model_validate_json(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    page = _template("blame.html.j2").render(
        blame=blame, data=[token_data(blame, blame.layers)], rail=Rail([], 1), **_shared(blame.layers)
    )
    write_atomic(path, page)
    return path


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unmask.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _shared(layers: Sequence[str]) -> dict[str, Any]:
    """What every template reads."""
    return {
        "colours": LAYER_COLOURS,
        "no_layer": NO_LAYER,
        "colour": layer_colour,
        "duration": duration,
        "floors": floors,
        "is_control": is_control,
        "place": lambda name: layers.index(name) if name in layers else -1,
        "visible": visible,
        "words": words,
    }


class Node(NamedTuple):
    """A stage in the drawing of the lineage: right of its parent; row 1 is the chain of the last layer."""

    stage: Stage
    parent: str | None
    inputs: list[tuple[str, str]]
    row: int
    column: int


class Rail(NamedTuple):
    nodes: list[Node]
    columns: int


def rail(run: Run) -> Rail:
    by_hash = {stage.hash: stage for stage in run.stages}
    chain: list[Stage] = []
    step: Stage | None = run.tip
    while step is not None and step not in chain:
        chain.insert(0, step)
        step = by_hash.get(step.parent_hash or "")
    nodes: list[Node] = []
    rows: dict[int, int] = {}
    for stage in [*chain, *(stage for stage in run.stages if stage not in chain)]:
        parent = by_hash.get(stage.parent_hash or "")
        column = 1 + next((node.column for node in nodes if parent and node.stage.name == parent.name), 0)
        rows[column] = rows.get(column, 0) + 1
        inputs = [(role, by_hash[digest].name) for role, digest in stage.inputs.items() if digest in by_hash]
        nodes.append(Node(stage, parent.name if parent else None, inputs, rows[column], column))
    return Rail(nodes, max(rows))


def every(run: Run) -> list[Finding]:
    """All findings in order of their probes, claims that stand in no other file included; each once."""
    known = {(f.probe, f.metric, f.group, f.child, f.parent, f.text_source): f for f in run.summary.claims}
    for f in run.findings:
        known.setdefault((f.probe, f.metric, f.group, f.child, f.parent, f.text_source), f)
    return sorted(known.values(), key=lambda f: f.probe)


def token_data(blame: Blame, layers: Sequence[str]) -> dict[str, Any]:
    """What the page's script shows of a token. It starts at the word where a layer above the base stands out."""
    places = [layers.index(name) if name in layers else -1 for name in blame.layers]
    above = [-math.inf if is_control(t.text) else max(t.credits[1:], default=0.0) for t in blame.tokens]
    return {
        "layers": blame.layers,
        "places": places,
        "marks": [layer_colour(place).mark for place in places],
        "start": above.index(max(above)) if above else 0,
        "tokens": [
            {
                "text": re.sub("^ | $", "␣", visible(token.text)) or "⋯",
                "layer": token.layer,
                "logprob": round(token.logprob, 5),
                "credits": [round(credit, 5) for credit in token.credits],
            }
            for token in blame.tokens
        ],
    }


def nudge(run: Run) -> list[Finding]:
    """What RL did to the layer below it, in the order of NUDGE."""
    layers = [stage.name for stage in run.stages if stage.kind == "ppo"]
    found = [
        f
        for f in every(run)
        if (f.probe == "G-9" and f.metric in NUDGE)
        or (f.metric.startswith("facts_kept") and f.child in layers)
    ]
    return sorted(found, key=lambda f: NUDGE.index(f.metric))


def floors(finding: Finding) -> str:
    """The floors that were measured, each with its name."""
    known = {
        "bf16": finding.floor_numeric,
        "seeds": finding.floor_seed,
        "training": finding.floor_training,
        "chance": finding.null_specific,
    }
    scale = 100 if finding.metric in words.SHARES else 1
    unit = " %" if scale == 100 else ""
    return "; ".join(f"{name} {scale * at:.2g}{unit}" for name, at in known.items() if at is not None) or "–"


def is_control(text: str) -> bool:
    return text.startswith("<|") and text.endswith("|>")


def visible(text: str) -> str:
    """A token's text with a sign for each character that has no look of its own."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        signs.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in hidden else c) for c in text
    )


def _contents(run: Run, parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    titles = (
        ("truth", "Is blame right?", parts["truth"]),
        ("facts", "What was taught where", parts["facts"]),
        ("blame", "Who put each word there", run.blames),
        ("change", "How far each layer moved", parts["change"]),
        ("lineage", "Lineage", True),
        ("reward", "The reward model", parts["reward"]),
        ("rl", "The nudge", parts["reinforcement"] or parts["nudge"]),
        ("training", "Training", parts["losses"]),
        ("findings", "Every finding", True),
        ("limits", "What it cannot say", True),
    )
    return [(name, title) for name, title, there in titles if there]


def _shown(directory: Path) -> str:
    """How a command on this page names the run: from where it was written, and without the writer's folders, as
    the page may be sent to others."""
    path = Path(os.path.relpath(directory))
    return directory.resolve().name if path.parts[:1] == ("..",) else str(path)
