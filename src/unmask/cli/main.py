"""The `unmask` command: registers the commands and turns what can go wrong into one sentence and an exit status."""

import io
import os
import sys
from typing import Annotated

import typer

import unmask
from unmask.cli import build, inspect, system, talk
from unmask.errors import Interrupted, UserError
from unmask.progress import speaks

app = typer.Typer(
    name="unmask",
    help="Train a language model layer by layer, and see what each layer did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command, panel in (
    (build.run, "Build"),
    (build.plan, "Build"),
    (build.text, "Build"),
    (build.report, "Build"),
    (inspect.log, "Look"),
    (inspect.diff, "Look"),
    (inspect.blame, "Look"),
    (talk.chat, "Talk"),
    (system.doctor, "System"),
):
    app.command(rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        print(f"unmask {unmask.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Exit status: 0 done, 1 the answer is no (a chain that does not hold), 2 bad input, 75 stopped and saved."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks becomes a question mark
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # None: closed by whoever started us
                sys.stdout.flush()
    except UserError as error:
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        if speaks():
            print(f"unmask: {stopped}", file=sys.stderr)
        sys.exit(75)
    except SystemExit as left:
        if left.code == 130:  # Ctrl-C, of which typer makes this; it has ended the line
            print(
                "unmask: stopped. A run goes on from what is there when it is started again", file=sys.stderr
            )
        raise
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch_memory_error())
        if not known and "can't allocate memory" not in str(
            error
        ):  # torch's words on a CPU, where it has no class
            raise
        print(
            f"unmask: not enough memory ({error or 'MemoryError'}). Take a smaller model, shorter texts, or "
            "(run) fewer micro_tokens.",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:  # of standard output: what else is written says what it was
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader left, as `| head` does
            sys.exit(1)
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(2)


def torch_memory_error() -> type[BaseException]:
    """What torch raises for a GPU; only where torch was loaded can it have been raised."""
    torch = sys.modules.get("torch")
    error: type[BaseException] = torch.OutOfMemoryError if torch else MemoryError
    return error


if __name__ == "__main__":
    main()
