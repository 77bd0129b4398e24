"""A small tokenizer of ours, trained on text made here, for the tests of this folder."""

import random
from functools import cache

from unmask.text.tokenizer import Tokenizer

_SYLLABLES = [consonant + vowel for consonant in "bdfglmnprst" for vowel in ("a", "e", "io", "ou")]


def _words() -> list[str]:
    draw = random.Random(0)
    made = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)]
    return [*made, "the", "river", "who's", "they'll", "o'clock"]


WORDS = _words()


def sentences(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    ends = [" «naïve» 🙂", " 日本語", "\n\n  ", " --", "!?", ""]
    return [
        f"{' '.join(draw.choices(WORDS, k=12))}, {draw.randint(0, 3000)}{draw.choice(ends)}" for _ in range(n)
    ]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(sentences(300), 700)
