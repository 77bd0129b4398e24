"""Merges are canonical, and tiktoken is used exactly where it must agree with `tokenizers`."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizer import sentences, tokenizer

from unmask.text.bpe import BYTE_CHARACTERS, canonical_merges, fast_ranks, merged, to_bytes, to_characters
from unmask.text.tokenizer import CONTROL, PATTERN, Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]


def content(of: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    of.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))


def test_byte_characters_are_those_of_the_library() -> None:
    assert sorted(BYTE_CHARACTERS) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    every = "".join(map(chr, range(0x800)))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert "".join(piece for piece, _ in level.pre_tokenize_str(every)) == to_characters(every.encode())
    assert to_bytes(to_characters(bytes(range(256)))) == bytes(range(256))


def test_each_token_has_the_one_merge_that_its_own_bytes_lead_to() -> None:
    # "abc" is (ab, c) and could have been (a, bc): ab has the lower rank, so bc never forms there.
    assert canonical_merges([*BYTES, b"ab", b"bc", b"abc"])[-1] == (b"ab", b"c")
    assert canonical_merges([*BYTES, b"bc", b"ab", b"abc"])[-1] == (b"a", b"bc")


def test_a_token_that_no_merges_reach_gets_none_and_is_no_part_of_others() -> None:
    assert canonical_merges([*BYTES, b"xyz", b"xy", b"xyzw"]) == [(b"x", b"y")]


def test_merging_takes_the_lowest_rank_then_the_leftmost() -> None:
    ranks = {token: id for id, token in enumerate([*BYTES, b"aa", b"ab"])}
    assert merged(b"aaaab", ranks) == [b"aa", b"aa", b"b"]
    ranks[b"ab"] = 0
    assert merged(b"aaaab", ranks) == [b"aa", b"a", b"ab"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=14), min_size=1, max_size=12),
    st.lists(st.text("abc ", max_size=30), min_size=1, max_size=20),
)
def test_trained_on_anything_both_libraries_agree(corpus: list[str], texts: list[str]) -> None:
    """Few letters make many ways to the same token."""
    ours = Tokenizer.train(corpus, 300)
    assert ours._fast is not None
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours._content))
    encoded = [ids.tolist() for ids in ours.encode_batch(texts)]
    assert encoded == [encoding.ids for encoding in theirs.encode_batch(texts)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=14), min_size=1, max_size=12))
def test_the_merges_that_are_rebuilt_are_those_that_the_trainer_made(corpus: list[str]) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, initial_alphabet=["a", "b"], show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    in_order = [to_bytes(token) for token in sorted(model["vocab"], key=model["vocab"].__getitem__)]
    merges = [(left.encode(), right.encode()) for left, right in model["merges"]]
    assert len(set(map(b"".join, merges))) == len(merges), (
        "two merges for one token: not to be rebuilt as they are"
    )
    assert canonical_merges(in_order) == merges


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(normalizer={"type": "NFC"}),
        lambda c: c["model"].update(ignore_merges=True),
        lambda c: c["model"]["merges"].reverse(),
        lambda c: c["model"]["merges"].append(c["model"]["merges"][0]),
        lambda c: c["model"]["vocab"].pop(BYTE_CHARACTERS[0xFF]),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|."),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda c: c["pre_tokenizer"].update(pretokenizers=c["pre_tokenizer"]["pretokenizers"][1:]),
        lambda c: c["added_tokens"].append({**c["added_tokens"][0], "content": "the", "special": False}),
    ],
)
def test_whatever_could_make_a_difference_keeps_tiktoken_away(change: Any, tmp_path: Path) -> None:
    plain = content(tokenizer(), tmp_path)
    assert fast_ranks(plain, PATTERN, set(CONTROL))
    changed = copy.deepcopy(plain)
    change(changed)
    assert fast_ranks(changed, PATTERN, set(CONTROL)) is None


def test_a_token_that_its_own_bytes_do_not_make_keeps_tiktoken_away(tmp_path: Path) -> None:
    """tiktoken would take the word "qzj" whole; the listed merges never reach it."""
    changed = content(tokenizer(), tmp_path)
    vocab, merges = changed["model"]["vocab"], changed["model"]["merges"]
    for made, merge in (("qz", ["q", "z"]), ("zj", ["z", "j"]), ("qzj", ["q", "zj"])):
        vocab[made] = len(vocab)
        merges.append(merge)
    assert fast_ranks(changed, PATTERN, set(CONTROL)) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), "utf-8")
    ids = Tokenizer.load(tmp_path).encode("qzj")
    assert [Tokenizer.load(tmp_path).token_bytes[id] for id in ids] == [b"qz", b"j"]


def test_a_tokenizer_of_two_merges_for_a_token_encodes_as_the_library_does(tmp_path: Path) -> None:
    changed = content(tokenizer(), tmp_path)
    vocab, merges = changed["model"]["vocab"], changed["model"]["merges"]
    for made, merge in (("qz", ["q", "z"]), ("zj", ["z", "j"]), ("qzj", ["qz", "j"])):
        vocab[made] = len(vocab)
        merges.append(merge)
    merges.append(["q", "zj"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), "utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded._fast is None
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ["qzj", "qqzjzj", *sentences(20, seed=5)]:
        assert loaded.encode(text) == theirs.encode(text).ids
