"""unmask: train a language model layer by layer, and see what each layer did.

    import unmask

    lineage = unmask.open("runs/tiny")              # a run or a checkpoint, with all its ancestors
    assert not lineage.verify()                     # every hash holds
    layers = lineage.load()                         # base, sft, rl, oldest first
    told = unmask.blame(layers, "What is the capital of Kenya?")
    print(told.answer, dict(zip(told.layers, told.nats)))

Names load on first use, so that importing a lower floor loads nothing above it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unmask.lineage import Layer, Lineage, open_layers
    from unmask.pipeline import run
    from unmask.probes.blame import blame
    from unmask.probes.compare import compare
    from unmask.recipe import load as load_recipe
    from unmask.recipe import resolve as resolve_recipe
    from unmask.report.page import write_report

    open = Lineage.open

_PLACES = {
    "Layer": ("unmask.lineage", "Layer"),
    "Lineage": ("unmask.lineage", "Lineage"),
    "blame": ("unmask.probes.blame", "blame"),
    "compare": ("unmask.probes.compare", "compare"),
    "load_recipe": ("unmask.recipe", "load"),
    "open": ("unmask.lineage", "Lineage.open"),
    "open_layers": ("unmask.lineage", "open_layers"),
    "resolve_recipe": ("unmask.recipe", "resolve"),
    "run": ("unmask.pipeline", "run"),
    "write_report": ("unmask.report.page", "write_report"),
}

__all__ = [
    "Layer",
    "Lineage",
    "blame",
    "compare",
    "load_recipe",
    "open",
    "open_layers",
    "resolve_recipe",
    "run",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in _PLACES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    module, path = _PLACES[name]
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
