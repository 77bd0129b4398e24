"""Bits a byte: exact where the answer is known, each token once, the same bytes as xz."""

import copy
import math
import random
import shutil
import string
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_world import Document

from unmask.lineage import Layer
from unmask.probes.compression import compression, passages, windows

TEXTS = [
    "The capital of Bado is Kilu. " * 20,
    "Ünïcode 🙂 and more of it. " * 9,
    "Short.",
    "What is it? " * 30,
]


def documents():
    return [Document(text, ("one", "two")[i % 2]) for i, text in enumerate(TEXTS)]


def pick(findings, metric, group, child, parent=None):
    [found] = [
        f for f in findings if (f.metric, f.group, f.child, f.parent) == (metric, group, child, parent)
    ]
    return found


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token(layers, tokenizer):
    model = copy.deepcopy(layers[0].model)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    found = compression([Layer("flat", model, tokenizer)], documents(), limit_bytes=None)
    for source, texts in (("one", TEXTS[::2]), ("two", TEXTS[1::2])):
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        size = sum(len(text.encode()) for text in texts)
        expected = tokens * math.log2(tokenizer.rows) / size
        assert pick(found, "bits_per_byte", source, "flat").value == pytest.approx(expected, rel=1e-6)


def test_bits_are_those_of_one_long_reading_of_each_document(layers, tokenizer):
    text = "The capital of Bado is Kilu. What is it?"
    [found] = [
        f
        for f in compression(layers[:1], [Document(text, "one")], limit_bytes=None)
        if f.metric == "bits_per_byte"
    ]
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    with torch.no_grad():
        log_p = layers[0].model(torch.tensor([ids]))[0].double().log_softmax(-1)
    nats = -sum(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)))
    assert found.value == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)
    assert found.verdict == "abstain: n = 1"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.integers(1, 20))
def test_every_token_is_scored_once_and_no_window_is_longer_than_asked(tokenizer, text, window):
    rows = windows(tokenizer, text, window)
    assert [id for row in rows for id in row.ids[row.start :]] == tokenizer.encode(text)
    assert all(2 <= len(row.ids) <= window + 1 for row in rows)


@given(st.lists(st.text(max_size=60), max_size=40), st.integers(1, 300))
def test_passages_are_beginnings_of_documents_within_the_limit(texts, limit):
    chosen = passages([Document(text, "one") for text in texts], limit)
    assert sum(len(passage.data) for passage in chosen) <= limit
    sound = [text.encode("utf-8", "replace").decode() for text in texts]
    assert all(passage.text and any(text.startswith(passage.text) for text in sound) for passage in chosen)


def test_a_limit_is_spread_over_many_documents_and_no_limit_takes_all():
    long = [Document(f"{i} " * 1000, "one") for i in range(30)]
    assert len(passages(long, 2400)) == 24
    assert len(passages(long, None)) == 30
    assert {len(passage.data) for passage in passages(long[:3], 2400)} == {800}


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the xz command")
def test_xz_is_what_the_command_makes_of_the_same_bytes(layers):
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(400)]
    text = " ".join(draw.choices(words, k=3000))  # of which `xz -9` without `e` makes something else
    found = pick(
        compression(layers[:1], [Document(text, "one")], limit_bytes=None), "bits_per_byte_xz", "one", "base"
    )
    packed, other = (
        subprocess.run(
            ["xz", preset, "-T1", "-c"], input=text.encode(), capture_output=True, check=True
        ).stdout
        for preset in ("-9e", "-9")
    )
    assert len(packed) != len(other)
    assert found.exact
    assert found.value == pytest.approx(8 * len(packed) / len(text), abs=1e-9)


def test_a_change_is_the_difference_of_the_levels_and_nothing_for_a_copy(layers):
    copied = Layer("copy", copy.deepcopy(layers[1].model), layers[1].tokenizer)
    found = compression([layers[0], layers[1], copied], documents() * 3)
    change = pick(found, "bits_per_byte_change", "one", "sft", "base")
    levels = [pick(found, "bits_per_byte", "one", name).value for name in ("base", "sft")]
    assert change.value == pytest.approx(levels[1] - levels[0])
    assert change.ci95[0] <= change.value <= change.ci95[1]
    nothing = pick(found, "bits_per_byte_change", "one", "copy", "sft")
    assert (nothing.value, nothing.ci95) == (0.0, (0.0, 0.0))
    assert nothing.verdict.startswith("not distinguishable")
    assert all(f.floor_numeric is not None for f in found if not f.exact)
