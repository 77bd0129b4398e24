"""What can go wrong in a way that the person at the keyboard can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input or a bad surrounding. The message says what was wrong, where, and what to do."""


class Interrupted(Exception):
    """A signal asked us to stop; the state was saved, and the same command goes on from there."""


def nearest(name: str, valid: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """The end of an error message about an unknown name: " Did you mean 'x'?", or "" if none is close."""
    close = get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f" Did you mean '{prefix}{close[0]}'?" if close else ""
