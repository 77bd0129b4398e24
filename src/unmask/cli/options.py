"""Options that several commands share."""

from typing import Annotated

import typer

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps. Default: the GPU if there is one.")
]
