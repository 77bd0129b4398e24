"""The terminal chat: what a line asks for, what is shown, and what the conversation remembers."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from unmask.cli import chat as module
from unmask.cli.chat import chat, pieces
from unmask.cli.chat_lines import All, Say, Switch, Temperature, Word, Wrong, parse
from unmask.errors import UserError
from unmask.lineage import Layer
from unmask.text.chat import render
from unmask.text.tokenizer import Tokenizer

NAMES = ["base", "sft", "rl"]


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("What is it?", Say("What is it?")),
        ("  padded \n", Say("padded")),
        ("//etc is a path", Say("/etc is a path")),
        ("half / half", Say("half / half")),
        ("", Word("nothing")),
        (" \t\n", Word("nothing")),
        ("/base", Switch(0)),
        ("/rl", Switch(2)),
        ("/SFT", Switch(1)),
        ("/s", Switch(1)),
        ("/all", All("")),
        ("/all  Who are you? ", All("Who are you?")),
        ("/a hi", All("hi")),
        ("/new", Word("new")),
        ("/help", Word("help")),
        ("/q", Word("quit")),
        ("/temperature 0.3", Temperature(0.3)),
        ("/temperature 0", Temperature(0.0)),
        ("/t 2", Temperature(2.0)),
    ],
)
def test_a_line_asks_for(line: str, asked: object) -> None:
    assert parse(line, NAMES) == asked


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/bsae", "no /bsae. Did you mean 'base'?"),
        ("/", "no /."),
        ("/rl hello", "takes nothing after it"),
        ("/temperature", "a number of 0 or more"),
        ("/temperature -1", "a number of 0 or more"),
        ("/temperature nan", "a number of 0 or more"),
        ("/temperature inf", "a number of 0 or more"),
        ("/temperature warm", "a number of 0 or more"),
    ],
)
def test_a_line_that_asks_for_nothing_known_is_answered_with_what_to_do(line: str, said: str) -> None:
    found = parse(line, NAMES)
    assert isinstance(found, Wrong)
    assert said in found.message


def test_a_shortened_name_that_two_share_is_refused_and_a_whole_one_is_not() -> None:
    assert parse("/sft", ["sft", "sft-2"]) == Switch(0)
    assert isinstance(parse("/sf", ["sft", "sft-2"]), Wrong)
    assert parse("/my", ["base", "my model"]) == Switch(1)


@given(st.text(), st.lists(st.text(), unique=True))
def test_any_line_asks_for_something(line: str, names: list[str]) -> None:
    found = parse(line, names)
    assert not isinstance(found, Switch) or 0 <= found.layer < len(names)


@given(st.text(), st.integers(1, 4))
def test_pieces_add_up_to_the_text_whatever_the_tokens_cut_and_none_ends_in_half_a_character(
    text: str, size: int
) -> None:
    data = text.encode("utf-8", "replace")
    tokens = [data[i : i + size] for i in range(0, len(data), size)]
    found = list(pieces(range(len(tokens)), tokens))
    assert "".join(found) == data.decode().translate(module.UNPRINTABLE)
    assert len(found) == len(tokens) + 1


def test_an_incomplete_character_is_held_back_and_shown_as_broken_only_at_the_end() -> None:
    euro = "€".encode()
    assert list(pieces([0, 1, 2], [euro[:1], euro[1:2], euro[2:]])) == ["", "", "€", ""]
    assert list(pieces([0, 1], [b"a", euro[:2]])) == ["a", "", "�"]


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    assert "".join(pieces([0], [b"a\x1b[2Jb\rc\x07\x9b\tz\n"])) == "a�[2Jb�c��\tz\n"
    assert "".join(pieces([0], ["\x9b31m".encode()])) == "�31m"


def test_control_tokens_and_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert "".join(pieces([0, 1, 99, 1], [b"", b"x"])) == "xx"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran to the cat. "] * 20, 300)


class Stage:
    """Layers whose answers are given, in place of models; `heard` keeps what each was asked."""

    def __init__(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, context: int = 1000) -> None:
        self.tokenizer = tokenizer
        self.heard: list[tuple[str, list[int], dict[str, Any]]] = []
        self.says = {name: f"I am {name}." for name in NAMES}
        self.stopped_at: str | None = None
        models: Sequence[Any] = [
            SimpleNamespace(name=name, config=SimpleNamespace(max_position_embeddings=context))
            for name in NAMES
        ]
        self.layers = [Layer(name, model, tokenizer) for name, model in zip(NAMES, models, strict=True)]
        monkeypatch.setattr(module, "stream", self.stream)

    def stream(self, model: Any, ids: Sequence[int], **settings: Any) -> Iterator[int]:
        self.heard.append((model.name, list(ids), settings))
        return self._ids(model.name, settings["max_new_tokens"])

    def _ids(self, name: str, limit: int) -> Iterator[int]:
        ids = [*self.tokenizer.encode(self.says[name]), self.tokenizer.turn_end]
        for place, id in enumerate(ids[:limit]):
            if name == self.stopped_at and place == 3:
                raise KeyboardInterrupt
            yield id

    def session(self, *lines: str, width: int = 100, terminal: bool = False, **settings: Any) -> str:
        out, waiting = StringIO(), iter(lines)

        def read(prompt: str) -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        console = Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False)
        chat(self.layers, console=console, read=read, **settings)
        return out.getvalue()

    def conversation(self, place: int = -1) -> list[int]:
        return self.heard[place][1]


@pytest.fixture
def stage(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tokenizer, monkeypatch)


def turns(tokenizer: Tokenizer, *said: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return render(tokenizer, messages, open_turn=True).ids


def test_without_a_terminal_answers_are_plain_lines_after_the_layers_name(stage: Stage) -> None:
    stage.says["rl"] = "One.\nTwo: café €."
    assert stage.session("Hello") == "rl: One.\nTwo: café €.\n"


def test_the_newest_layer_answers_until_another_is_named(stage: Stage) -> None:
    out = stage.session("a", "/base", "b", "/sft", "c")
    assert [name for name, *_ in stage.heard] == ["rl", "base", "sft"]
    for line in ("rl: I am rl.", "base: I am base.", "sft: I am sft."):
        assert line in out


def test_all_layers_share_one_conversation_and_new_forgets_it(stage: Stage, tokenizer: Tokenizer) -> None:
    stage.session("a", "/sft", "b", "/new", "c")
    assert stage.conversation(0) == turns(tokenizer, "a")
    assert stage.conversation(1) == turns(tokenizer, "a", "I am rl.", "b")
    assert stage.conversation(2) == turns(tokenizer, "c")


def test_all_asks_every_layer_the_same_and_keeps_the_current_ones_answer(
    stage: Stage, tokenizer: Tokenizer
) -> None:
    stage.session("/sft", "/all who?", "next")
    assert [name for name, *_ in stage.heard] == ["base", "sft", "rl", "sft"]
    assert stage.conversation(0) == stage.conversation(1) == stage.conversation(2) == turns(tokenizer, "who?")
    assert len({settings["seed"] for *_, settings in stage.heard[:3]}) == 1
    assert stage.conversation(3) == turns(tokenizer, "who?", "I am sft.", "next")


def test_all_alone_asks_what_was_said_last_again_and_changes_nothing(
    stage: Stage, tokenizer: Tokenizer
) -> None:
    out = stage.session("/all", "who?", "/all", "next")
    assert "Nothing was said yet" in out
    assert [name for name, *_ in stage.heard] == ["rl", "base", "sft", "rl", "rl"]
    assert stage.conversation(1) == stage.conversation(3) == turns(tokenizer, "who?")
    assert stage.conversation(4) == turns(tokenizer, "who?", "I am rl.", "next")


def test_a_wide_terminal_shows_all_answers_side_by_side_and_a_narrow_one_stacked(stage: Stage) -> None:
    stage.says["base"] = "the cat sat on the mat " * 4
    wide = stage.session("/all who?", terminal=True, width=100)
    assert any("I am sft." in line and "I am rl." in line for line in wide.splitlines())
    assert any(all(name in line for name in ("■ base", "▲ sft", "● rl")) for line in wide.splitlines())
    narrow = stage.session("/all who?", terminal=True, width=60)
    assert "▲ sft  I am sft." in narrow
    assert not any("I am sft." in line and "I am rl." in line for line in narrow.splitlines())


def test_plain_layers_continue_the_conversation_without_the_template(
    stage: Stage, tokenizer: Tokenizer
) -> None:
    out = stage.session("a", "/base", "b", plain=["base"])
    assert "never saw the chat template" in out
    assert stage.conversation(1) == [tokenizer.end_of_text, *tokenizer.encode("a\nI am rl.\nb\n")]


def test_temperature_is_seven_tenths_until_it_is_changed(stage: Stage) -> None:
    stage.session("a", "/temperature 0", "b")
    assert [settings["temperature"] for *_, settings in stage.heard] == [0.7, 0.0]


def test_every_answer_has_random_numbers_of_its_own_and_a_seed_repeats_them(stage: Stage) -> None:
    for seed in (5, 5, None, None):
        stage.session("a", "b", seed=seed)
    seeds = [settings["seed"] for *_, settings in stage.heard]
    assert seeds[0:2] == seeds[2:4]
    assert len(set(seeds[2:])) == 6


def test_the_oldest_turns_are_left_out_when_the_context_is_full_and_that_is_said(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tokenizer, monkeypatch, context=len(turns(tokenizer, "a", "I am rl.", "b")) + 10)
    out = stage.session("a", "b", "c", max_new_tokens=10)
    assert stage.conversation(1) == turns(tokenizer, "a", "I am rl.", "b")
    assert stage.conversation(2) == turns(tokenizer, "b", "I am rl.", "c")
    assert "the oldest 2 turns are left out" in out


def test_an_answer_that_was_cut_is_marked_and_an_empty_one_is_named_and_forgotten(
    stage: Stage, tokenizer: Tokenizer
) -> None:
    stage.says["sft"] = ""
    out = stage.session("a", "/sft", "b", "/rl", "c", max_new_tokens=2)
    assert "[…]" in out
    assert "sft: (says nothing)" in out
    kept = tokenizer.decode(tokenizer.encode("I am rl.")[:2]).rstrip()
    assert stage.conversation(2) == turns(tokenizer, "a", kept, "c")


def test_ctrl_c_stops_the_answer_keeps_what_was_said_and_goes_on(stage: Stage, tokenizer: Tokenizer) -> None:
    stage.stopped_at = "rl"
    kept = tokenizer.decode(tokenizer.encode("I am rl.")[:3]).rstrip()
    out = stage.session("a", "/all b", "/sft", "c", terminal=True)
    assert out.count("Stopped.") == 2
    assert stage.conversation(-1) == turns(tokenizer, "a", kept, "b", kept, "c")
    assert "I am sft." in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h")  # the cursor is shown as often as it was hidden


def test_ctrl_c_where_nobody_watches_ends_the_program(stage: Stage) -> None:
    stage.stopped_at = "rl"
    with pytest.raises(KeyboardInterrupt):
        stage.session("a")


def test_an_error_is_said_and_the_talk_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Iterator[int]:
        raise UserError("prompt 0 has 9 tokens, and a context of 8 leaves no room")

    monkeypatch.setattr(module, "stream", refuse)
    assert stage.session("a", "/nonsense", "b").count("leaves no room") == 2


def test_help_names_every_layer_and_command(stage: Stage) -> None:
    out = stage.session("/help")
    for word in ("/base", "/sft", "/rl", "/all WORDS", "/new", "/temperature X", "/help", "/quit", "Ctrl-C"):
        assert word in out


def test_no_layers_are_an_error() -> None:
    with pytest.raises(UserError, match="no language model"):
        chat([])


SESSION = """
import torch
from unmask.cli.chat import chat
from unmask.lineage import Layer
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.text.tokenizer import Tokenizer

tokenizer = Tokenizer.train(["the cat sat on the mat and the dog ran to the cat. "] * 20, 300)
if ENDLESS:
    tokenizer.stop_ids = ()
config = ModelConfig.from_depth(1, vocabulary=tokenizer.rows, context=4000)
layers = []
for seed, name in enumerate(["base", "sft", "rl"]):
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    layers.append(Layer(name, model, tokenizer))
chat(layers, plain=["base"], seed=0, max_new_tokens=LIMIT)
print("left in peace")
"""


def command(limit: int, endless: bool) -> list[str]:
    return [sys.executable, "-c", SESSION.replace("LIMIT", str(limit)).replace("ENDLESS", str(endless))]


def test_a_session_through_pipes_with_real_models() -> None:
    lines = "Hello\n/base\nthe cat\n/all the dog\n/temperature 0\n\n/sft\nhm\n"
    done = subprocess.run(command(9, False), input=lines, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = [
        line.partition(":")[0]
        for line in done.stdout.splitlines()
        if line.startswith(("base:", "sft:", "rl:"))
    ]
    assert said == ["rl", "base", "base", "sft", "rl", "sft"]
    assert done.stdout.endswith("left in peace\n")
    assert "\x1b" not in done.stdout.replace("�", "")


def test_a_session_on_a_terminal_survives_ctrl_c_in_mid_answer() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(3900, True), stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        # Whoever runs the tests in the background of a shell hands on that Ctrl-C is to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(follower)
    seen, deadline = "", time.monotonic() + 120

    def read_more() -> None:
        nonlocal seen
        assert time.monotonic() < deadline, seen
        if select.select([leader], [], [], 0.2)[0]:
            seen += os.read(leader, 65536).decode("utf-8", "replace")

    def wait_for(text: str, after: int = 0) -> None:
        while text not in seen[after:]:
            read_more()

    try:
        wait_for("rl> ")
        for line in (b"Hello\n", b"/all hello\n"):
            at = len(seen)
            os.write(leader, line)
            while len(seen) < at + 300:  # well into the answer
                read_more()
            process.send_signal(signal.SIGINT)
            wait_for("Stopped.", at)
            wait_for("rl> ", seen.index("Stopped.", at))
        os.write(leader, b"\x04")
        wait_for("left in peace")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") > 0
    assert "Traceback" not in seen
