"""The Python API: every name loads on first use, and importing the package loads nothing heavy."""

import subprocess
import sys

import pytest

import unmask


@pytest.mark.parametrize("name", unmask.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert callable(getattr(unmask, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = unmask.nonsense


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, unmask; print('torch' in sys.modules, 'unmask.lineage' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]
