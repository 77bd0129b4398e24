"""`unmask chat`: talk to every layer of a model in the terminal, one at a time or all side by side."""

import codecs
import contextlib
import itertools
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from unmask.cli.chat_lines import All, Command, Say, Switch, Temperature, Word, Wrong, parse
from unmask.colours import layer_colour
from unmask.errors import UserError
from unmask.generation.engine import stream
from unmask.lineage import Layer
from unmask.probes.forward import prompt_ids
from unmask.progress import UNPRINTABLE
from unmask.progress import console as result_console
from unmask.text.chat import Message

COLUMN = 26  # cells a layer needs to stand beside the others
HELP = (
    ("/all WORDS", "every layer answers, side by side; the talk goes on with the answer of the current one"),
    ("/all", "every layer answers what you said last"),
    ("/new", "forget the conversation"),
    ("/temperature X", "0: always the likeliest token; 1: as the layer learned it"),
    ("/help", "this"),
    ("/quit", "leave (so does Ctrl-D); Ctrl-C stops an answer"),
)


def pieces(ids: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """The text of ids as they come, safe to print: "" while a character of several bytes is incomplete.

    Control tokens have no text. Control characters become U+FFFD: a model may say the bytes that clear a screen.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for id in ids:
        yield decoder.decode(token_bytes[id] if id < len(token_bytes) else b"").translate(UNPRINTABLE)
    yield decoder.decode(b"", final=True).translate(UNPRINTABLE)


def chat(
    layers: Sequence[Layer],
    *,
    plain: Collection[str] = (),
    temperature: float = 0.7,
    max_new_tokens: int = 200,
    seed: int | None = None,
    console: Console | None = None,
    read: Callable[[str], str] | None = None,
) -> None:
    """Talk until /quit or the end of input. The newest layer answers first.

    `plain`: names of layers that never saw the chat template; they continue the conversation as plain text,
    a line a turn, as does a layer whose tokenizer has no template. `read`: a prompt to show → a line, EOFError
    at the end; by default from standard input, with plain lines and no prompts if that is no terminal.
    """
    if not layers:
        raise UserError("there is no language model to talk to")
    talk = Talk(layers, plain, temperature, max_new_tokens, seed, console or result_console())
    talk.run(read or read_line)


def read_line(prompt: str) -> str:
    """A line of standard input: with a prompt, editing and a history on a terminal, without elsewhere."""
    if sys.stdin is None:  # closed by whoever started us
        raise EOFError
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # its import alone gives input() its powers
            import readline  # noqa: F401
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


class Reply:
    """A layer's answer, piece by piece as it is iterated; `text` holds what was said so far."""

    def __init__(
        self, place: int, layer: Layer, ids: Sequence[int], limit: int, temperature: float, seed: int
    ) -> None:
        self.place, self.layer = place, layer
        self.text, self.newest = "", -1
        self.ids = stream(
            layer.model,
            ids,
            max_new_tokens=limit,
            stop_ids=layer.tokenizer.stop_ids,
            temperature=temperature,
            seed=seed,
        )

    def __iter__(self) -> Iterator[str]:
        for piece in pieces(self._noted(), self.layer.tokenizer.token_bytes):
            piece = piece if self.text else piece.lstrip()
            self.text += piece
            yield piece

    def _noted(self) -> Iterator[int]:
        for id in self.ids:
            self.newest = id
            yield id

    @property
    def ending(self) -> str:
        """What to add for a reader of the whole: that it is empty, or has not stopped by itself."""
        if self.newest in self.layer.tokenizer.stop_ids:
            return "" if self.text else "(says nothing)"
        return " […]"


class Talk:
    """One conversation that all layers share, and who answers next."""

    def __init__(
        self,
        layers: Sequence[Layer],
        plain: Collection[str],
        temperature: float,
        max_new_tokens: int,
        seed: int | None,
        console: Console,
    ) -> None:
        self.layers, self.console = layers, console
        self.plain = [layer.name in plain or not layer.tokenizer.chat_template for layer in layers]
        self.current = len(layers) - 1
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.messages: list[Message] = []
        self.seeds = itertools.count(secrets.randbits(48) if seed is None else seed)

    def run(self, read: Callable[[str], str]) -> None:
        names = [layer.name for layer in self.layers]
        if self.console.is_terminal:
            labels = Text("   ").join(self.label(place) for place in range(len(names)))
            self.console.print(labels, Text("   /help"), sep="")
            self.introduce()
        while True:
            try:
                command = parse(read(f"{names[self.current]}> "), names)
                if command == Word("quit"):
                    return
                self.obey(command)
            except EOFError:
                if self.console.is_terminal:
                    self.console.print()
                return
            except KeyboardInterrupt:
                if not self.console.is_terminal:
                    raise
                self.note("\n/quit or Ctrl-D leaves.")
            except UnicodeDecodeError:
                self.note("That line is not UTF-8 text and was left out.")
            except UserError as error:
                self.note(str(error))

    def obey(self, command: Command) -> None:
        match command:
            case Say(text):
                self.talk(text)
            case All(text):
                self.compare(text)
            case Switch(place):
                self.current = place
                self.introduce()
            case Temperature(value):
                self.temperature = value
                self.note(f"Temperature {value:g}.")
            case Wrong(message):
                self.note(message)
            case Word("new"):
                self.messages = []
                self.note("The conversation is forgotten.")
            case Word("help"):
                self.help()

    def talk(self, text: str) -> None:
        """The current layer answers."""
        asked = [*self.messages, _user(text)]
        reply = self.reply(self.current, asked, next(self.seeds))
        with self.stoppable():
            self.write(reply)
        self.keep(asked, reply)

    def compare(self, text: str) -> None:
        """Every layer answers, with the same random numbers; the conversation keeps the current one's answer."""
        asked = [*self.messages, _user(text)] if text else self.messages[:-1]
        if not asked:
            self.note("Nothing was said yet: /all WORDS")
            return
        seed = next(self.seeds)
        replies = [self.reply(place, asked, seed) for place in range(len(self.layers))]
        with self.stoppable():
            if self.console.is_terminal and self.console.width >= COLUMN * len(replies):
                self.write_columns(replies)
            else:
                for reply in replies:
                    self.write(reply)
        if text:
            self.keep(asked, replies[self.current])

    def reply(self, place: int, asked: Sequence[Message], seed: int) -> Reply:
        """A layer's answer to come. The oldest turns are left out where the context is too short for all."""
        layer = self.layers[place]
        context = layer.model.config.max_position_embeddings
        room = min(self.max_new_tokens, context // 4)
        ids: list[int] = []
        for left_out in range(0, len(asked), 2):
            ids = prompt_ids(layer.tokenizer, asked[left_out:], template=not self.plain[place])
            if len(ids) + room <= context:
                break
        if left_out:
            self.note(f"{layer.name} reads {context} tokens: the oldest {left_out} turns are left out.")
        return Reply(place, layer, ids, self.max_new_tokens, self.temperature, seed)

    def keep(self, asked: list[Message], reply: Reply) -> None:
        """Go on from this answer; from before the question if it is empty, as turns must alternate."""
        if answer := reply.text.rstrip():
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def write(self, reply: Reply) -> None:
        if self.console.is_terminal:
            self.console.print(self.label(reply.place), end="  ")
        else:
            self.console.out(f"{reply.layer.name}: ", end="", highlight=False)
        try:
            for piece in reply:
                self.console.out(piece, end="", highlight=False)
            self.console.print(Text(reply.ending, "dim"), end="")
        finally:
            self.console.print()

    def write_columns(self, replies: Sequence[Reply]) -> None:
        with Live(self.columns(replies), console=self.console, auto_refresh=False) as live:
            for _ in itertools.zip_longest(*replies):  # a token of each at a time
                live.update(self.columns(replies), refresh=True)
            live.update(self.columns(replies, ended=True), refresh=True)

    def columns(self, replies: Sequence[Reply], ended: bool = False) -> Table:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for place in range(len(replies)):
            table.add_column(self.label(place), ratio=1)
        table.add_row(*(Text(reply.text).append(reply.ending if ended else "", "dim") for reply in replies))
        return table

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Ctrl-C ends what stands inside and nothing else, where a person watches."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.console.is_terminal:
                raise
            self.note("Stopped.")

    def label(self, place: int) -> Text:
        colour = layer_colour(place)
        return Text(f"{colour.mark} {self.layers[place].name}", f"bold {colour.terminal}")

    def note(self, message: str) -> None:
        self.console.print(Text(message, "dim"))

    def introduce(self) -> None:
        self.console.print(self.label(self.current), Text(" answers.", "dim"), end="")
        how = " It never saw the chat template and continues what you write as plain text."
        self.note(how if self.plain[self.current] else "")

    def help(self) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_row(" ".join(f"/{layer.name}" for layer in self.layers), "who answers from now on")
        for command, meaning in HELP:
            table.add_row(Text(command), Text(meaning))
        self.console.print(table)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
