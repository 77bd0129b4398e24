"""The house: a file imports only from its own folder or from floors below it, and there are no circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unmask

PACKAGE = Path(unmask.__file__).parent
# Room → floor. A folder is one room; a file that stands alone is a room of its own.
FLOORS = {
    "errors": -1,  # under everything, the other files of floor 0 too
    "files": 0, "progress": 0, "colours": 0,
    "recipe": 1, "delta": 1, "text": 1, "model": 1,
    "lineage": 2, "training": 2, "generation": 2,
    "stages": 3,
    "probes": 4,
    "report": 5, "serving": 5,
    "pipeline": 6,
    "cli": 7, "__init__": 7, "__main__": 8,
}  # fmt: skip


def room(module_parts: tuple[str, ...]) -> str:
    return module_parts[0] if module_parts else "__init__"


def imports(path: Path) -> set[str]:
    """Rooms of unmask that a file imports, at module level or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names = [
                f"{node.module}.{alias.name}" if node.module == "unmask" else str(node.module)
                for alias in node.names
            ]
        for name in names:
            parts = name.split(".")
            if parts[0] == "unmask" and len(parts) > 1:
                found.add(parts[1])
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_its_own_room_or_lower_floors(path: Path) -> None:
    own = room(path.relative_to(PACKAGE).with_suffix("").parts)
    assert own in FLOORS, f"{own} has no floor: put it on one in this table"
    for other in imports(path):
        assert other == own or FLOORS[other] < FLOORS[own], f"{path.name} ({own}) may not import {other}"


@pytest.mark.parametrize("lower", ["unmask.files", "unmask.recipe", "unmask.delta", "unmask.cli.main"])
def test_importing_a_lower_floor_loads_nothing_above_it(lower: str) -> None:
    code = f"import sys, {lower}; print('\\n'.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    floor = FLOORS[lower.split(".")[1]]
    for name in loaded:
        parts = name.split(".")
        if parts[0] == "unmask" and len(parts) > 1:
            assert FLOORS[parts[1]] <= floor, f"importing {lower} loaded {name}"
    if lower == "unmask.cli.main":
        assert "torch" not in loaded, "`unmask --help` must not pay for torch"
