"""The command line: bad input is one sentence with what, where and what to do; exit status 2, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.cli import inspect
from unmask.cli.chat import read_line
from unmask.cli.main import main
from unmask.probes.probe import Finding


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    return int(left.value.code or 0), told.out + told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "tinny"], ["tinny", "Did you mean 'tiny'?"]),
        (["run", "tiny", "--set", "sft.token=5"], ["sft.token", "Did you mean 'sft.tokens'?"]),
        (["run", "tiny", "--from", "stf"], ["stf", "Did you mean 'sft'?"]),
        (["run", "tiny", "--device", "quantum"], ["quantum", "cpu"]),
        (["run", "absent.toml"], ["absent.toml"]),
        (["log", "nowhere"], ["nowhere", "no such directory"]),
        (["diff", "nowhere", "nowhere"], ["nowhere"]),
        (["diff", "a", "b", "--device", "tpu"], ["unknown device 'tpu'"]),
        (["blame", "a", "hello", "--device", "tpu"], ["unknown device 'tpu'"]),
        (["blame", "nowhere", "Hello!"], ["nowhere"]),
        (["blame", "nowhere"], ["a model and a prompt"]),
        (["chat", "nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_a_sentence(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = said(monkeypatch, capsys, *arguments)
    assert status == 2, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_doctor_names_machine_and_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = said(monkeypatch, capsys, "doctor")
    assert status == 0
    assert "torch" in text
    assert "float" in text  # the precision that is used


def test_help_lists_every_command_on_one_screen() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "unmask.cli.main", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("run", "plan", "report", "log", "diff", "blame", "chat", "doctor"):
        assert f" {command} " in told.stdout
    assert len(told.stdout.splitlines()) <= 40


@pytest.mark.parametrize(
    ("metric", "value", "low", "high"),
    [("js", 0.017071, 0.016312, 0.017943), ("kl_child_parent", 0.0741, 0.0709, 0.0780)],
)
def test_a_line_of_diff_fits_a_terminal_of_80_columns(
    metric: str, value: float, low: float, high: float, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Finding(
        probe="T1-2", metric=metric, group="tokens 11–20", child="rl", parent="sft", text_source="P sample", n=64,
        n_unit="prompt", value=value, unit="nats/token", ci95=(low, high), floor_numeric=2.14e-05,
        verdict="above the numeric floor",
    )  # fmt: skip
    inspect._print_diff([found])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    [row] = [line for line in lines if metric in line]
    assert row.endswith(" 2.1e-05 yes")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_lacks_a_character_gets_another(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unmask.cli.main", "doctor"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=True,
    )
    assert b"unmask" in done.stdout and not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_takes_no_more_is_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "unmask.cli.main", "doctor"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("unmask: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")]
)
def test_too_little_memory_is_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("unmask.cli.main.app", fail)
    status, text = said(monkeypatch, capsys)
    assert status == 2
    assert text.startswith("unmask: not enough memory")
    monkeypatch.setattr(
        "unmask.cli.main.app", lambda: (_ for _ in ()).throw(RuntimeError("a single memory location"))
    )
    with pytest.raises(RuntimeError, match="memory location"):
        main()


def test_diff_tells_the_whole_of_a_change_and_not_its_parts() -> None:
    def found(metric: str, group: str | None) -> Finding:
        return Finding(
            probe="T1-2", metric=metric, group=group, child="rl", value=None, unit="1", verdict="abstain: n"
        )

    told = [(metric, group) for metric in ("kl_child_parent", "shifted", "bits_per_byte", "early_share")
            for group in (None, "part") if inspect._in_brief(found(metric, group))]  # fmt: skip
    assert told == [
        ("kl_child_parent", None),
        ("shifted", None),
        ("bits_per_byte", None),
        ("bits_per_byte", "part"),
    ]


def test_an_output_that_is_closed_is_no_trouble() -> None:
    command = f"{sys.executable} -m unmask.cli.main --version >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr


LONG = "experiments/of/the/year/with/a/name/that/is/long/seed"


def test_layers_that_go_by_their_paths_are_told_apart_in_what_blame_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = [f"{LONG}{i}[/b]" for i in range(3)]  # closes a style that nobody opened
    parts = [-2.0, 0.5, 0.5]
    token = {"id": 1, "text": "Hi", "logprob": -1.0, "parts": parts, "credits": parts, "layer": None}
    inspect._print_blame({
        "layers": names, "tokens": [token], "nats": parts, "logprob": -1.0, "floor": 0.1,
        "alone": dict.fromkeys(names, "東京 – Kabul"), "plain": "",
    })  # fmt: skip
    told = "".join(capsys.readouterr().out.split())
    for i in range(3):
        assert told.count(f"seed{i}[/b]") >= 2  # in the legend, and beside what it says alone


def test_json_of_blame_survives_a_terminal_that_lacks_its_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        def to_json(self) -> dict[str, str]:
            return {"answer": "東京"}

    monkeypatch.setattr("unmask.lineage.open_layers", lambda paths, device: [])
    monkeypatch.setattr("unmask.probes.blame.blame", lambda *a, **k: Told())
    status, text = said(monkeypatch, capsys, "blame", "runs/tiny", "Hello", "--json")
    assert status == 0
    assert text.isascii() and json.loads(text) == {"answer": "東京"}


def test_a_chat_whose_input_is_closed_is_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(EOFError):
        read_line("> ")


def test_ctrl_c_is_answered_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.training.machine.describe", interrupted)
    monkeypatch.setattr(sys, "argv", ["unmask", "doctor"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert "unmask: stopped. A run goes on" in capsys.readouterr().err
