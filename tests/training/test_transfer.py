"""Rates that are derived from the width carry over widths: the coordinate check of Yang et al., arXiv 2203.03466."""

import importlib.util
import math
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_what_a_few_steps_change_does_not_grow_with_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all matrices drawn from N(0, 0.02), as GPT-2's, the last hidden state would move as width^0.47 here."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("coordinates", BENCH / "coordinates.py")
    coordinates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coordinates)
    narrow, wide = (coordinates.moved(width, depth=2, steps=5) for width in (128, 512))
    grows = {name: math.log(wide[name] / narrow[name]) / math.log(4) for name in narrow}
    # The first block's output is mostly the embedding, whose rate falls as 1/width for the sake of the head it is, too.
    assert abs(grows["block 1"]) < 0.35
    assert abs(grows["logits"]) < 0.35
