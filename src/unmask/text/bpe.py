"""Byte-pair merges: the one list of merges that a vocabulary has, and whether two encoders must agree on it.

`tokenizers` merges the pairs that are listed, in the order of the list. tiktoken has no list: it merges any
two neighbours whose bytes together are a token, the lowest id first, and takes a word that is a token
whole. Both give the same ids for every text if each token has exactly one merge, those come in the order of
the ids of what they make, and each token's own bytes encode to that token. For then the tokens inside a
stretch that no merge crosses change as they do for the stretch alone, so whoever reaches a token's bytes as
two neighbours reaches them as the pair of its merge; and a word that is a token ends as that token in both.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from tokenizers import models


def _byte_characters() -> list[str]:
    """GPT-2's character for each byte: printable ones stand for themselves, others for U+0100 and up."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def to_bytes(token: str) -> bytes:
    """The bytes of a token as tokenizer.json spells it. ValueError if it is no byte-level token."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError as error:
        raise ValueError(f"token {token!r} is not spelled in byte-level characters") from error


def to_characters(token: bytes) -> str:
    return "".join([BYTE_CHARACTERS[byte] for byte in token])


def canonical_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges of a vocabulary whose tokens come in the order of their ids, all single bytes among them.

    A token's merge joins the two tokens that its bytes are after all merges of lower ids. A token whose
    bytes are then still in three parts or more cannot be reached, and has no merge.
    """
    ranks: dict[bytes, int] = {token: id for id, token in enumerate(tokens) if len(token) == 1}
    merges = []
    for id, token in enumerate(tokens):
        if len(token) > 1:
            parts = merged(token, ranks)
            if len(parts) == 2:
                ranks[token] = id
                merges.append((parts[0], parts[1]))
    return merges


def merged(text: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """`text` after all merges into tokens of `ranks`: always the lowest rank next, of equals the leftmost."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        candidates = [
            (ranks[pair], i) for i in range(len(parts) - 1) if (pair := parts[i] + parts[i + 1]) in ranks
        ]
        if not candidates:
            return parts
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def fast_ranks(content: Mapping[str, Any], pattern: str, control: Set[str]) -> dict[bytes, int] | None:
    """tiktoken's ranks for a tokenizer.json, or None where the two might encode some text differently."""
    model = content["model"]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    others = any(token["content"] not in control for token in content.get("added_tokens") or ())
    if content.get("normalizer") or others or any(model.get(option) for option in options):
        return None
    if not _splits_by(content["pre_tokenizer"], pattern):
        return None
    vocab = {token: id for token, id in model["vocab"].items() if token not in control}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    made = ["".join(merge) for merge in merges]
    if not set(BYTE_CHARACTERS) <= vocab.keys() or not set(made) <= vocab.keys():
        return None
    ids = [vocab[token] for token in made]
    if ids != sorted(set(ids)):  # two merges for one token, or not in the order of ids
        return None
    bpe = models.BPE(vocab=vocab, merges=merges)
    if any([part.id for part in bpe.tokenize(token)] != [id] for token, id in zip(made, ids, strict=True)):
        return None
    return {to_bytes(token): vocab[token] for token in (*BYTE_CHARACTERS, *made)}


def _splits_by(pre_tokenizer: Mapping[str, Any], pattern: str) -> bool:
    """Whether words are cut by exactly this pattern, then spelled in byte-level characters as they are."""
    parts = pre_tokenizer.get("pretokenizers") or []
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return False
    split, level = parts
    return (
        split["pattern"] == {"Regex": pattern}
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and not level["add_prefix_space"]
        and not level["use_regex"]
    )
