"""`unmask log`, `diff` and `blame`: where a model comes from, what each layer changed, which layer put a word there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unmask.cli.options import Device
from unmask.colours import layer_colour
from unmask.errors import UserError
from unmask.progress import UNPRINTABLE, Progress, console, duration

if TYPE_CHECKING:
    from unmask.probes.probe import Finding

BRIEF = {
    "kl_child_parent",
    "kl_parent_child",
    "js",
    "unshifted",
    "marginal",
    "shifted",
    "relative_weight_change",
}
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Models = Annotated[
    list[Path],
    typer.Argument(help="Checkpoints or runs. One stands for its whole lineage.", show_default=False),
]


def log(
    model: Annotated[Path, typer.Argument(help="A checkpoint, as runs/tiny/rl, or a run.")],
    as_json: Json = False,
) -> None:
    """Where does this model come from, and does the chain of hashes hold? Exit status 1 if it does not."""
    from unmask.lineage import Lineage

    lineage = Lineage.open(model)
    problems, rows = lineage.verify(), lineage.rows()
    if as_json:
        print(json.dumps({"verified": not problems, "problems": problems, "chain": rows}, indent=1))
    else:
        _print_log(rows, problems)
    if problems:
        raise typer.Exit(1)


def diff(
    models: Models,
    prompts: Annotated[
        Path | None, typer.Option(help="Rows with prompts or messages to answer. Default: the run's own.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text (txt, jsonl, parquet). Default: the run's own.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts that are answered.", min=1)] = 64,
    plain: Annotated[
        bool, typer.Option("--plain", help="Prompts as plain text, without the chat template.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also by position, at the stop token, and by kind of weights.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """What did each layer change, and is the change larger than the noise?"""
    from unmask.lineage import open_layers
    from unmask.probes.compare import compare, texts_beside
    from unmask.training.machine import pick_device

    layers = open_layers(models, device=str(pick_device(device)))
    findings = compare(
        layers, texts_beside(models, prompts, text), limit=limit, template=not plain, say=Progress().line
    )
    if as_json:
        for finding in findings:
            print(json.dumps(finding.to_json()))
    else:
        _print_diff([finding for finding in findings if everything or _in_brief(finding)])
        if not everything:
            console().print("[dim]--all: also by position, at the stop token, and by kind of weights.[/dim]")


def blame(
    models_and_prompt: Annotated[
        list[str],
        typer.Argument(metavar="MODEL... PROMPT", help="A lineage, or models oldest first; then the prompt."),
    ],
    answer: Annotated[str | None, typer.Option(help="Blame this answer instead of the model's own.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest answer.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain text to go on with, without the chat template.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write the blame as a page.")] = None,
) -> None:
    """Which layer put each token of the answer there, and by how many nats?"""
    from unmask.lineage import open_layers
    from unmask.probes.blame import blame as blame_answer
    from unmask.training.machine import pick_device

    if len(models_and_prompt) < 2:
        raise UserError(
            'blame takes a model and a prompt: unmask blame runs/tiny "What is the capital of Kenya?"'
        )
    *models, prompt = models_and_prompt
    found = blame_answer(
        open_layers([Path(model) for model in models], device=str(pick_device(device))),
        prompt,
        answer=answer,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_tokens,
        template=not plain,
    ).to_json()
    if html is not None:
        from unmask.report.page import write_blame

        write_blame(html, found)
    if as_json:
        print(json.dumps(found))
    else:
        _print_blame(found)


def _print_log(rows: list[dict[str, Any]], problems: list[str]) -> None:
    out = console()
    for place, row in enumerate(rows):
        headline = [f"{name} {value:.4g}" for name, value in row.get("headline", {}).items()]
        out.print(
            f"[bold]{escape(row['name'])}[/bold] [dim]{row['kind']}[/dim] {row['hash'][:12]}  {escape(row['path'])}"
        )
        if "tokens" in row:
            data = ", ".join(f"{label} {digest[:8]}" for label, digest in row["data"].items())
            out.print(
                f"  {row['tokens']:,} tokens read · {row['steps']:,} steps · {duration(row['seconds'])}"
                f" · {row['peak_bytes'] / 1e9:.1f} GB"
            )
            if headline:
                out.print(f"  at the end of training: {escape(', '.join(headline))}")
            if branch := row["branch"]:
                state = f"{escape(branch['path'])} (state {branch['state'][:12]})"
                out.print(f"  goes on from the stable phase of {state}", soft_wrap=True)
            out.print(f"  data: {escape(data)}", soft_wrap=True)
        for role, digest in row.get("inputs", {}).items():
            out.print(f"  with {role} {digest[:12]}")
        if place < len(rows) - 1:
            out.print("  │")
    if problems:
        out.print(f"[bold red]does not hold[/bold red] ({len(problems)}):")
        for problem in problems:
            out.print(f"  ✗ {escape(problem)}", soft_wrap=True)
    else:
        out.print("[green]✓[/green] every hash holds: tensors, tokenizer, template, config, records, parents")


def _print_diff(findings: "Sequence[Finding]") -> None:
    """A line a finding, in 80 columns where its name lets it, beneath the layers and the text that it was read on."""
    from unmask.report import words

    out = console()
    out.print(f"[dim]{'':<33} {'value [95 % interval]':<34} {'floor':<6} over[/dim]")
    tables: dict[str, dict[str, list[Finding]]] = {}
    for f in findings:
        n = "" if f.n is None else f"n = {f.n:,} {words.plural(f.n_unit, f.n)}"
        read = " · ".join(filter(None, (f.text_source, n))) or "weights"
        layers = f"{f.parent} → {f.child}" if f.parent else f.child
        tables.setdefault(layers, {}).setdefault(read, []).append(f)
    for layers, table in tables.items():
        out.print(f"[bold]{escape(layers)}[/bold]")
        for read, rows in table.items():
            out.print(f" [dim]{escape(read)}[/dim]")
            for f in rows:
                name = f.metric + (f" ({f.group})" if f.group else "")
                digits = words.decimals(f)
                value = "–" if f.value is None else words.number(f.value, digits)
                ends = ", ".join(words.number(end, digits) for end in f.ci95 or ())
                unit = "" if f.unit == "1" else f" {f.unit}"
                said = value + (f" [{ends}]" if ends else "") + unit
                floor = "exact" if f.exact else "–" if f.floor_numeric is None else f"{f.floor_numeric:.2g}"
                row = f" {name:<{max(1, min(32, 66 - len(said)))}} {said:<34} {floor:<7} {_beyond(f.verdict or '')}"
                out.print(escape(row.rstrip()))
    out.print(
        "[dim]A: answers of the layer, P: of the one below it, N: held-out text.\n"
        "floor: the same weights in bfloat16. over: the whole interval lies beyond it.[/dim]"
    )


def _in_brief(finding: "Finding") -> bool:
    """What a layer changed on the whole; bits per byte by source."""
    if finding.metric.startswith("bits_per_byte"):
        return True
    return finding.group is None and finding.metric in BRIEF


def _beyond(verdict: str) -> str:
    """Yes or no; nothing for a level, which is compared with nothing; what abstains says why."""
    if verdict.startswith("abstain") or not verdict:
        return verdict
    return "yes" if verdict.startswith("above") else "no"


def _print_blame(found: dict[str, Any]) -> None:
    out = console()
    places = {name: place for place, name in enumerate(found["layers"])}
    line = Text()
    for token in found["tokens"]:
        colour = layer_colour(places.get(token["layer"], -1))
        line.append(token["text"].translate(UNPRINTABLE), style=colour.terminal)
        line.append(colour.mark, style=f"{colour.terminal} dim")
    out.print(line)
    legend = (f"[{(c := layer_colour(i)).terminal}]{c.mark} {escape(name)}[/]" for name, i in places.items())
    out.print("  ".join(legend) + f"  · below the floor of {found['floor']:.2g} nats")
    first = found["tokens"][0]
    out.print(
        f"A token's mark is its largest credit: for {escape(found['layers'][0])} its nats below + "
        f"{first['credits'][0] - first['parts'][0]:.2f}, as it is counted from chance (ln V); "
        "for the others their nats."
    )
    table = Table("token", box=None, pad_edge=False)
    for name in (*found["layers"], "log p"):
        table.add_column(escape(name), overflow="fold")  # paths differ at their ends
    for token in found["tokens"]:
        colour = layer_colour(places.get(token["layer"], -1))
        cells = [f"{part:+.2f}" for part in token["parts"]]
        table.add_row(
            f"[{colour.terminal}]{colour.mark} {escape(repr(token['text']))}[/]",
            *cells,
            f"{token['logprob']:.2f}",
        )
    table.add_section()
    table.add_row("sum", *(f"{value:+.2f}" for value in found["nats"]), f"{found['logprob']:.2f}")
    out.print(table)
    out.print("\nWhat each layer alone says")
    said = Table.grid(padding=(0, 2))  # so that long answers wrap in their own column
    for _ in range(2):
        said.add_column(overflow="fold")
    for name, place in places.items():
        colour = layer_colour(place)
        said.add_row(f"[{colour.terminal}]{colour.mark} {escape(name)}[/]", _one_line(found["alone"][name]))
    said.add_row(f"{layer_colour(0).mark} plain text", _one_line(found["plain"]))
    out.print(said)


def _one_line(answer: str) -> str:
    return escape(" ".join(answer.split())) or "(no words)"
