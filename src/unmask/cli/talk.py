"""`unmask chat`: talk to every layer in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.options import Device

Model = Annotated[
    Path, typer.Argument(help="A run, as runs/tiny, or a checkpoint: its whole lineage can be talked to.")
]


def chat(
    model: Model,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 is greedy; so small a model then repeats itself.")
    ] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    seed: Annotated[int | None, typer.Option(help="For the same answers again.")] = None,
    device: Device = None,
) -> None:
    """Talk to the model; /base, /sft, /rl switch the layer, /all asks all of them."""
    from unmask.cli.chat import chat as talk
    from unmask.lineage import Lineage
    from unmask.training.machine import pick_device

    lineage = Lineage.open(model)
    plain = [layer.name for layer in lineage.layers if layer.kind == "pretrain"]  # it never saw the template
    layers = lineage.load(device=str(pick_device(device)))
    talk(layers, plain=plain, temperature=temperature, max_new_tokens=max_tokens, seed=seed)
