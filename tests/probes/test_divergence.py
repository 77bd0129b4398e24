"""Distances between layers: exact where the answer is known, averaged as defined, each text with its
own floor."""

import copy
import math

import numpy as np
import pytest
import torch
from planted_world import Document

from unmask.generation.engine import Answer
from unmask.lineage import Layer
from unmask.probes import divergence as module
from unmask.probes.divergence import divergence, spread
from unmask.probes.forward import Text, prompt_ids
from unmask.probes.profile import (
    COLUMNS,
    ENTROPY_PARENT,
    JS,
    KL_CHILD_PARENT,
    KL_PARENT_CHILD,
    RANK,
    TIES,
    early_share,
    half_life,
    mean_of,
    read_pairs,
    share_of,
)

NEUTRAL = [Document("The capital of Bado is Kilu. " * k, "one") for k in (1, 3, 2)]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [
        prompt_ids(tokenizer, f"What is the capital of {name}?") for name in ("Bado", "Kilu", "Meno", "Paru")
    ]


@pytest.fixture(scope="module")
def found(layers, prompts):
    return divergence(layers, prompts, NEUTRAL, max_new_tokens=12, floor_limit=2)


def pick(findings, metric, child, parent, source, group=None):
    keys = (metric, child, parent, source, group)
    [one] = [f for f in findings if (f.metric, f.child, f.parent, f.text_source, f.group) == keys]
    return one


def rows(kl, rank=None):
    array = np.zeros((len(kl), COLUMNS))
    array[:, KL_CHILD_PARENT] = kl
    if rank is not None:
        array[:, RANK] = rank
    return array


def test_what_is_read_of_three_token_distributions_is_what_a_pocket_calculator_gives():
    parent, child = [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]
    read = read_pairs([(0, 1)])(
        [torch.tensor([parent]).log(), torch.tensor([child]).log()], torch.tensor([0])
    )[0]
    middle = [(p + q) / 2 for p, q in zip(parent, child, strict=True)]

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    assert read[KL_CHILD_PARENT] == pytest.approx(kl(child, parent), abs=1e-6)
    assert read[KL_PARENT_CHILD] == pytest.approx(kl(parent, child), abs=1e-6)
    assert read[JS] == pytest.approx((kl(child, middle) + kl(parent, middle)) / 2, abs=1e-6)
    assert read[ENTROPY_PARENT] == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert read[RANK] == 2  # the child's second token: one token scores strictly higher, one ties with it
    assert read[TIES] == 1


def test_a_layer_and_its_copy_differ_by_exactly_nothing(layers, prompts):
    copied = Layer("copy", copy.deepcopy(layers[0].model), layers[0].tokenizer)
    found = divergence([layers[0], copied], prompts, NEUTRAL, max_new_tokens=8, floor_limit=2)
    distances = [f for f in found if f.metric in ("kl_child_parent", "kl_parent_child", "js")]
    assert {f.text_source for f in distances} == {"A greedy", "A sample", "P sample", "N"}
    assert {f.value for f in distances} == {0.0}
    assert {f.ci95 for f in distances} == {(0.0, 0.0)}
    assert {f.value for f in found if f.metric == "unshifted"} == {100.0}
    assert {f.value for f in found if f.metric in ("marginal", "shifted")} == {0.0}
    assert all(f.verdict.startswith("not distinguishable") for f in distances)
    [undefined] = [f for f in found if f.metric == "depth_half_life"]
    assert undefined.value is None
    assert undefined.verdict.startswith("abstain")


def test_every_pair_has_every_distance_on_every_text_with_n_interval_and_floor(found):
    for child, parent in (("sft", "base"), ("rl", "sft"), ("rl", "base")):
        for source in ("A greedy", "A sample", "P sample", "N"):
            for metric in ("kl_child_parent", "kl_parent_child", "js", "unshifted", "marginal", "shifted"):
                one = pick(found, metric, child, parent, source)
                assert one.floor_numeric is not None
                assert one.n == (3 if source == "N" else 4)
                assert one.n_unit == ("document" if source == "N" else "prompt")
                assert one.ci95[0] <= one.value <= one.ci95[1]
                assert one.template == ("plain" if source == "N" else "chat")
                assert (one.child_hash, one.parent_hash) == tuple(
                    {"base": "h0", "sft": "h1", "rl": "h2"}[name] for name in (child, parent)
                )


def test_means_are_over_tokens_in_a_document_and_then_over_documents(layers, tokenizer, found):
    means = []
    for document in NEUTRAL:
        ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(document.text)]])[:, :65]
        with torch.no_grad():
            log_p, log_q = (layers[k].model(ids)[0, :-1].double().log_softmax(-1) for k in (1, 0))
        means.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert pick(found, "kl_child_parent", "sft", "base", "N").value == pytest.approx(np.mean(means), rel=1e-4)


def test_shifts_sum_to_a_hundred_and_the_near_layer_shifts_less(found):
    for child, parent in (("sft", "base"), ("rl", "sft")):
        parts = [
            pick(found, m, child, parent, "A greedy").value for m in ("unshifted", "marginal", "shifted")
        ]
        assert sum(parts) == pytest.approx(100.0)
    far, near = (pick(found, "kl_child_parent", c, p, "N") for c, p in (("sft", "base"), ("rl", "sft")))
    assert far.value > 10 * near.value > 0
    assert far.verdict.startswith("above the numeric floor")


def test_the_numeric_floor_is_the_larger_distance_of_the_two_layers_from_their_bfloat16_copies(
    layers, tokenizer, found
):
    means = []
    for layer in layers[:2]:
        twin = copy.deepcopy(layer.model).to(torch.bfloat16)
        per_document = []
        for document in NEUTRAL[:2]:
            ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(document.text)]])[:, :65]
            with torch.no_grad():
                log_p = layer.model(ids)[0, :-1].double().log_softmax(-1)
                log_q = twin(ids)[0, :-1].double().log_softmax(-1)
            per_document.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        means.append(np.mean(per_document))
    floor = pick(found, "kl_child_parent", "sft", "base", "N").floor_numeric
    assert floor == pytest.approx(max(means), rel=2e-2)


def test_a_path_is_longer_than_its_chord_by_the_excess(found):
    whole, first, second = (
        pick(found, "kl_child_parent", c, p, "A sample").value
        for c, p in (("rl", "base"), ("sft", "base"), ("rl", "sft"))
    )
    assert pick(found, "kl_path_excess", "rl", "base", "A sample").value == pytest.approx(
        whole - first - second
    )


def test_the_stop_token_has_a_line_of_its_own_and_no_part_in_the_means(
    layers, tokenizer, prompts, monkeypatch
):
    stop, ids = tokenizer.turn_end, tokenizer.encode("The capital")
    answers = [
        Answer([*ids, stop], [0.0] * 9, True),
        Answer(ids, [0.0] * 9, False),
        Answer([stop], [0.0], True),
    ]
    monkeypatch.setattr(module, "say", lambda *_, **__: answers)
    found = divergence(layers[:2], prompts[:3], max_new_tokens=8)

    def kl(prompt, answer):
        with torch.no_grad():
            read = torch.tensor([[*prompt, *answer.ids]])
            log_p, log_q = (layers[k].model(read)[0].double().log_softmax(-1) for k in (1, 0))
        return (log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt) - 1 : -1].numpy()

    curves = [kl(prompt, answer) for prompt, answer in zip(prompts, answers, strict=False)]
    content = pick(found, "kl_child_parent", "sft", "base", "A sample")
    assert content.n == 2  # the answer that only stops has no content
    assert content.value == pytest.approx((curves[0][:-1].mean() + curves[1].mean()) / 2, rel=1e-4)
    stopped = pick(found, "kl_child_parent", "sft", "base", "A sample", "stop token")
    assert stopped.n == 2  # and the one that was cut has no stop
    assert stopped.value == pytest.approx((curves[0][-1] + curves[2][0]) / 2, rel=1e-4)
    whole = pick(found, "kl_child_parent_response", "sft", "base", "A sample")
    assert whole.value == pytest.approx((curves[0][:-1].sum() + curves[1].sum()) / 2, rel=1e-4)


def test_a_sample_is_of_the_child_where_it_is_called_a_and_of_the_parent_where_it_is_called_p(
    layers, tokenizer, prompts, monkeypatch
):
    words = {"base": tokenizer.encode("Kilu"), "sft": tokenizer.encode("The capital of Bado")}
    monkeypatch.setattr(
        module, "say", lambda layer, asked, *_, **__: [Answer(words[layer.name], [], False)] * len(asked)
    )
    found = divergence(layers[:2], prompts, floor_limit=1)
    for source, author in (("A greedy", "sft"), ("A sample", "sft"), ("P sample", "base")):
        means = []
        for prompt in prompts:
            ids = torch.tensor([[*prompt, *words[author]]])
            with torch.no_grad():
                log_p, log_q = (layers[k].model(ids)[0].double().log_softmax(-1) for k in (1, 0))
            means.append(float((log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt) - 1 : -1].mean()))
        value = pick(found, "kl_child_parent", "sft", "base", source).value
        assert value == pytest.approx(np.mean(means), rel=1e-4)


def test_half_life_and_early_share_of_a_curve_done_by_hand():
    assert half_life(rows([4.0, 1.0, 1.0, 1.0])) == 1
    assert half_life(rows([1.0, 1.0, 1.0, 1.0])) == 2
    assert half_life(rows([0.0, 0.0, 5.0])) == 3
    assert math.isnan(half_life(rows([0.0, 0.0])))
    assert early_share(rows([4.0, 1.0, 1.0, 2.0]), 1) == pytest.approx(0.5 - 0.25)
    assert early_share(rows([1.0] * 8), 3) == pytest.approx(0.0)
    assert math.isnan(early_share(rows([1.0, 1.0]), 3))


def test_shares_and_means_of_positions_count_from_one_and_are_missing_beyond_the_end():
    row = rows([1.0, 2.0, 3.0, 4.0, 5.0], rank=[1, 2, 3, 4, 1])
    assert [share_of(1, 1)(row), share_of(2, 3)(row), share_of(4, math.inf)(row)] == [40.0, 40.0, 20.0]
    assert mean_of(KL_CHILD_PARENT, 3, 5)(row) == 4.0
    assert mean_of(KL_CHILD_PARENT, 2, 2)(row) == 2.0
    assert math.isnan(mean_of(KL_CHILD_PARENT, 6, 10)(row))
    assert share_of(1, 1, 5, None)(row) == 100.0


def test_the_few_texts_that_the_floor_is_taken_from_include_the_longest():
    texts = [Text(range(n), 1) for n in (3, 9, 2, 30, 7)]
    assert [len(text.ids) for text in spread(texts, 1)] == [30]
    assert [len(text.ids) for text in spread(texts, 3)] == [30, 7, 2]
    assert len(spread(texts, 99)) == 5


def test_every_kl_has_a_numeric_floor(found):
    kls = [f for f in found if f.metric.startswith("kl_")]
    assert {f.group for f in kls} >= {None, "token 1", "tokens 6–10"}
    assert all(f.floor_numeric is not None and f.floor_numeric >= 0 for f in kls)
