"""Packages whose files are data: the extra `demo` brings text, facts and ratings for the recipe `tiny`."""

from importlib.util import find_spec
from pathlib import Path

from unmask.errors import UserError


def demo_package(module: str) -> Path:
    """The folder of an installed package of the extra `demo`, found without importing it.

    Raises UserError with the command that installs it, if it is not there.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package {module.replace('_', '-')}, whose data this recipe uses, is not installed:"
            " pip install 'unmask[demo]'"
        )
    return Path(spec.origin).parent
