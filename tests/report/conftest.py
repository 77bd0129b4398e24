from pathlib import Path

import pytest
from fake_run import write_run

from unmask.report.page import write_report


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return write_run(tmp_path / "tiny")


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole page of the whole fake run, drawn once."""
    return write_report(write_run(tmp_path_factory.mktemp("whole") / "tiny"))
