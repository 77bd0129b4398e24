"""The colours of the layers: one table for the terminal, the page and the figures.

A layer's place in the lineage decides its colour, so that a layer looks the same everywhere. A colour
never stands alone: each has a mark and an underline of its own. The hues of the first four stay apart for
people who do not see red or green (simulated after Machado et al. 2009). `terminal` has a contrast of at
least 3.8 : 1 on black and on white alike, as a program cannot know which it is; `light` and `dark` have
4.5 : 1 on their page.
"""

from typing import NamedTuple


class LayerColour(NamedTuple):
    terminal: str  # readable on a dark and on a light ground
    light: str  # for a light page
    dark: str  # for a dark page
    mark: str  # one character of width 1
    underline: str  # a CSS text-decoration-style


LAYER_COLOURS: tuple[LayerColour, ...] = (
    LayerColour("#2b7fd4", "#1a64b0", "#68aef2", "■", "solid"),
    LayerColour("#c46a00", "#b35c00", "#f0a04b", "▲", "double"),
    LayerColour("#12936b", "#0a7f5b", "#5ad6a8", "●", "dotted"),
    LayerColour("#b8579f", "#a8428c", "#e58fcb", "◆", "dashed"),
    LayerColour("#7a7f1f", "#6d7000", "#c9c95a", "▼", "wavy"),
)

# Below the noise floor, or no layer of language (a reward model).
NO_LAYER = LayerColour("#808080", "#6b6f76", "#9aa0a8", "·", "none")


def layer_colour(place: int) -> LayerColour:
    """The colour of the layer at this place of the lineage: 0 the oldest, -1 none; it repeats at the end."""
    return LAYER_COLOURS[place % len(LAYER_COLOURS)] if place >= 0 else NO_LAYER
