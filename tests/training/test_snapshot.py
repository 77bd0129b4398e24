"""Snapshots on disk: whole or absent, checked, the last two kept."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.errors import UserError
from unmask.training import snapshot
from unmask.training.parallel import Ranks

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "scalar": torch.tensor(3.5),
    "wide": torch.tensor([1e-300], dtype=torch.float64),
    "short": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
}


def read(directory: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = snapshot.latest(directory, said.append)
    return found.step if found else None, said


def test_tensors_and_scalars_come_back_as_they_were(tmp_path: Path) -> None:
    meta = {"seconds": 0.1 + 0.2, "name": "é", "list": [1, None]}
    snapshot.save(tmp_path, 7, TENSORS, meta, Ranks())
    found = snapshot.latest(tmp_path, say=pytest.fail)
    assert found is not None
    assert (found.step, found.meta) == (7, meta)
    tensors = {name: torch.full_like(tensor, 7) for name, tensor in TENSORS.items()}
    found.read_into(tensors)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        snapshot.save(tmp_path, step, TENSORS, {}, Ranks())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_00001000"]
    assert read(tmp_path) == (1000, [])


def test_nothing_there_is_no_snapshot(tmp_path: Path) -> None:
    assert read(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    snapshot.save(tmp_path, 1, TENSORS, {"a": 1}, Ranks())
    snapshot.save(tmp_path, 2, TENSORS, {"a": 2}, Ranks())
    file = tmp_path / "step_00000002" / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        file.write_bytes({"flipped": flipped, "cut": data[:-1], "empty": b""}[damage])
    step, said = read(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert "step_00000002 is damaged" in said[0]
    assert name in said[0]


def test_the_manifest_of_another_snapshot_does_not_fit(tmp_path: Path) -> None:
    snapshot.save(tmp_path, 1, TENSORS, {"a": 1}, Ranks())
    snapshot.save(tmp_path, 2, TENSORS, {"a": 2}, Ranks())
    manifest = "manifest.json"
    (tmp_path / "step_00000002" / manifest).write_bytes((tmp_path / "step_00000001" / manifest).read_bytes())
    assert read(tmp_path)[0] == 1


def test_a_damaged_snapshot_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        snapshot.save(tmp_path, step, TENSORS, {}, Ranks())
    for step in (2, 3):
        (tmp_path / f"step_0000000{step}" / "meta.json").write_text("?")
    assert read(tmp_path)[0] is None
    snapshot.save(tmp_path, 2, TENSORS, {}, Ranks())
    assert read(tmp_path) == (2, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_one_of_a_newer_format_is_an_error_that_says_so(tmp_path: Path) -> None:
    snapshot.save(tmp_path, 1, TENSORS, {}, Ranks())
    manifest = tmp_path / "step_00000001" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2, and this unmask reads up to 1"):
        read(tmp_path)


def test_random_states_survive_json() -> None:
    def draw() -> list[float]:
        return [random.gauss(), float(np.random.randn()), float(torch.randn(()))]  # noqa: NPY002

    draw()  # gauss and randn keep a second number for later: it must be kept too
    states = json.loads(json.dumps(snapshot.random_states()))
    first = [draw() for _ in range(3)]
    draw()
    said: list[str] = []
    snapshot.restore_random_states(states, said.append)
    assert [draw() for _ in range(3)] == first
    assert not said


def test_a_snapshot_from_a_machine_with_other_devices_is_taken_up_and_that_is_said() -> None:
    states = snapshot.random_states()
    more = len(states["cuda"]) + 1
    said: list[str] = []
    snapshot.restore_random_states(states | {"cuda": [states["torch"]] * more}, said.append)
    assert len(said) == 1
    assert f"with {more} CUDA devices, here are {more - 1}" in said[0]
