"""T1-6: how well each layer still predicts raw text, in bits a byte, and what the layers above the base
cost it."""

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from unmask.lineage import Layer
from unmask.probes.forward import Text, bf16_copy, dtype_of, same_tokenizer, teacher_forced
from unmask.probes.probe import Estimate, Finding, Floats, Meter, estimate, of, pairs, verdict, weighted_ratio
from unmask.text.tokenizer import Tokenizer

MANY = 24  # documents that share a source's bytes, where there are that many


class Document(Protocol):
    """Held-out text and the name of where it is from."""

    @property
    def text(self) -> str: ...
    @property
    def source(self) -> str: ...


class Passage(NamedTuple):
    """The beginning of a held-out document: what is scored, and what xz is given. Itself a Document."""

    text: str
    source: str

    @property
    def data(self) -> bytes:
        return self.text.encode()


def passages(documents: Iterable[Document], limit_bytes: int | None, seed: int = 0) -> list[Passage]:
    """At most `limit_bytes` of each source: documents in random order, each cut to a 24th of the limit,
    or to more where there are fewer documents. So the interval rests on many documents, however long
    the first one is."""
    by_source: dict[str, list[bytes]] = {}
    for document in documents:
        if document.text:
            by_source.setdefault(document.source, []).append(document.text.encode("utf-8", "replace"))
    chosen: list[Passage] = []
    for source, texts in sorted(by_source.items()):
        left = sum(map(len, texts)) if limit_bytes is None else limit_bytes
        most = left if limit_bytes is None else -(-limit_bytes // min(MANY, len(texts)))
        for i in np.random.default_rng(seed).permutation(len(texts)):
            # A cut inside a character would add bytes that no text has: the broken character is dropped.
            passage = Passage(texts[i][: min(most, left)].decode("utf-8", "ignore"), source)
            if passage.text:
                chosen.append(passage)
            left -= len(passage.data)
    return chosen


def windows(tokenizer: Tokenizer, text: str, window: int) -> list[Text]:
    """<|endoftext|> and the text in rows of window + 1 ids that share one id: every id of the text is
    scored once."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    return [Text(ids[i : i + window + 1], 1) for i in range(0, len(ids) - 1, window)]


def compression(
    layers: Sequence[Layer],
    documents: Iterable[Document],
    *,
    limit_bytes: int | None = 60_000,
    floor_bytes: int | None = 8_000,
    window: int | None = None,
    seed: int = 0,
) -> list[Finding]:
    """Bits a byte of each layer on held-out text by source, beside `xz -9e` on the same bytes, and each
    layer's change.

    bits a byte = Σ −ln p / (ln 2 · Σ bytes), in windows of the models' context without overlap, each
    document from its beginning after <|endoftext|>. Intervals redraw documents; a change is paired by
    document. `limit_bytes` is per source. The numeric floor is how far bfloat16 moves the same figure
    on up to `floor_bytes` of each source.
    """
    same_tokenizer(layers)
    meter = Meter()
    window = window or min(layer.model.config.max_position_embeddings for layer in layers)
    chosen = passages(documents, limit_bytes, seed)
    few = passages(chosen, floor_bytes, seed)
    bits, bits_few = _bits(layers, chosen, window, meter), _bits(layers, few, window, meter)
    rounded = _bits(layers, few, window, meter, bf16=True)
    findings: list[Finding] = []
    for source in sorted({passage.source for passage in chosen}):
        here = [i for i, passage in enumerate(chosen) if passage.source == source]
        here_few = [i for i, passage in enumerate(few) if passage.source == source]
        moved = (rounded - bits_few)[here_few].sum(0) / sum(len(few[i].data) for i in here_few)
        data = [chosen[i].data for i in here]
        findings += _of_source(layers, source, bits[here], data, moved, meter, seed)
    return findings


def _bits(
    layers: Sequence[Layer], chosen: Sequence[Passage], window: int, meter: Meter, *, bf16: bool = False
) -> Floats:
    """Bits that each layer needs for each passage: (passages, layers). Σ −ln p / ln 2 over its tokens."""
    models = [bf16_copy(layer.model) if bf16 else layer.model for layer in layers]
    rows: list[Text] = []
    owners: list[int] = []
    for i, passage in enumerate(chosen):
        texts = windows(layers[0].tokenizer, passage.text, window)
        rows += texts
        owners += [i] * len(texts)
    bits = np.zeros((len(chosen), len(layers)))
    for i, log_p in zip(owners, teacher_forced(models, rows, meter=meter), strict=True):
        bits[i] -= log_p.sum(0).numpy() / math.log(2)
    return bits


def _of_source(
    layers: Sequence[Layer],
    source: str,
    bits: Floats,
    data: Sequence[bytes],
    moved: Floats,
    meter: Meter,
    seed: int,
) -> Iterator[Finding]:
    """Findings on one source: bits (documents, layers) of its bytes; bfloat16 moves the layers' figures
    by `moved`."""
    sizes = np.array([len(each) for each in data])
    keys: dict[str, Any] = {
        "probe": "T1-6",
        "group": source,
        "text_source": "N",
        "template": "plain",
        "unit": "bits/byte",
        "cost": meter.cost(),
    }
    read = {**keys, "dtype": dtype_of(layers)}

    def a_byte(amounts: Floats) -> Estimate:
        return estimate(np.stack([amounts, sizes], 1), statistic=weighted_ratio, seed=seed)

    for i, layer in enumerate(layers):
        found = a_byte(bits[:, i]).fields("document")
        yield Finding(metric="bits_per_byte", floor_numeric=abs(moved[i]), **of(layer), **read, **found)
    packed = 8 * len(lzma.compress(b"".join(data), preset=9 | lzma.PRESET_EXTREME)) / sizes.sum()
    yield Finding(metric="bits_per_byte_xz", value=packed, exact=True, **of(layers[0]), **keys)
    for a, b in pairs(layers):
        change, floor = a_byte(bits[:, b] - bits[:, a]), abs(moved[b] - moved[a])
        word = verdict(change.ci95, numeric=floor)
        found = change.fields("document") | {"verdict": word}
        yield Finding(
            metric="bits_per_byte_change", floor_numeric=floor, **of(layers[b], layers[a]), **read, **found
        )
