"""Copies within a text, and what of the text that is measured on was trained on: counted, not removed.

A copy has the same words in the same order, whatever their case, marks and spaces. A near copy shares most of its runs
of five words with an earlier document (MinHash, Broder 1997, and locality-sensitive hashing, of the library
`datasketch`, so an estimate). A text that is measured on was seen if a run of 13 of its words stands in a text that is
trained on (Brown et al., arXiv 2005.14165, appendix C); one of fewer than 8 words says nothing by that.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from unmask.errors import UserError

RUN, SHORTEST = 13, 8  # words
SHINGLE = 5  # words
COMPARED = 50_000  # documents of a source, its first: each takes 11 kB of memory
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class Copies:
    """Counts documents as they come: `exact` copies of earlier ones and, among the first COMPARED, `near` ones."""

    def __init__(self, similar: float = 0.8) -> None:
        """`similar`: the share of runs of five words (Jaccard) from which on a document is a near copy."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError("near copies are looked for by datasketch: pip install 'unmask[text]'") from None
        self._hash, self._similar = MinHash, similar
        # It is to find nearly all that are similar; which of those are is told by their whole sketches.
        self._index = MinHashLSH(threshold=similar - 0.2, num_perm=128, weights=(0.2, 0.8))
        self._sketches: dict[int, Any] = {}
        self._seen: set[bytes] = set()
        self.documents = self.exact = self.near = 0

    def add(self, text: str) -> None:
        self.documents += 1
        found = words(text)
        same = " ".join(found) or text.strip()  # a text without a word is itself
        digest = blake2b(same.encode("utf-8", "replace"), digest_size=16).digest()
        if digest in self._seen:
            self.exact += 1
            return
        self._seen.add(digest)
        if len(found) < SHINGLE or self.documents > COMPARED:
            return
        sketch = self._hash(num_perm=128, seed=1)
        sketch.update_batch(list({" ".join(run).encode("utf-8", "replace") for run in runs(found, SHINGLE)}))
        like = (self._sketches[other] for other in self._index.query(sketch))
        self.near += any(sketch.jaccard(other) >= self._similar for other in like)
        self._index.insert(self.documents, sketch)
        self._sketches[self.documents] = sketch


@dataclass
class Seen:
    """Of the texts of one kind that are measured on: how many there are, are too short to tell, were seen in training,
    and one of these; how many different runs of words each has, added up, and how many of these were seen."""

    texts: int = 0
    short: int = 0
    seen: int = 0
    example: str = ""
    runs: int = 0
    seen_runs: int = 0


class Overlap:
    """Reads what is trained on, and tells what of the texts that are measured on stands in it."""

    def __init__(self, measured_on: Mapping[str, Sequence[str]]) -> None:
        """`measured_on`: texts by kind. They are kept in memory; what is trained on is not."""
        self.kinds = {kind: Seen(len(texts)) for kind, texts in measured_on.items()}
        self._texts: list[tuple[str, str]] = []  # kind, text
        self._where: dict[tuple[str, ...], list[int]] = {}  # a run of words → the texts it stands in
        self._lengths: set[int] = set()
        self._found: set[int] = set()
        self._read: set[tuple[str, ...]] = set()  # runs that were seen
        for kind, texts in measured_on.items():
            for text in texts:
                found = words(text)
                if len(found) < SHORTEST:
                    self.kinds[kind].short += 1
                    continue
                self._texts.append((kind, text))
                length = min(RUN, len(found))
                self._lengths.add(length)
                for run in set(runs(found, length)):
                    self.kinds[kind].runs += 1
                    self._where.setdefault(run, []).append(len(self._texts) - 1)

    def read(self, text: str) -> None:
        """One document that is trained on."""
        found = words(text)
        for length in self._lengths:
            for run in runs(found, length):
                if run in self._where and run not in self._read:
                    self._read.add(run)
                    for place in self._where[run]:
                        self._count(place)

    def _count(self, place: int) -> None:
        kind, text = self._texts[place]
        self.kinds[kind].seen_runs += 1
        if place not in self._found:
            self._found.add(place)
            self.kinds[kind].seen += 1
            self.kinds[kind].example = self.kinds[kind].example or text


def runs(found: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every run of `length` words."""
    return zip(*(found[i:] for i in range(length)), strict=False)
