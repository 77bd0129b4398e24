"""Weight changes are exact, count tied weights once and split without remainder."""

import copy

import pytest
import torch

from unmask.lineage import Layer
from unmask.probes.weights_change import block_of, kind_of, weights_change


def by_key(findings):
    return {(f.metric, f.group, f.child, f.parent): f for f in findings}


def test_equal_weights_have_changed_by_exactly_nothing(layers):
    found = weights_change([layers[0], Layer("copy", copy.deepcopy(layers[0].model), layers[0].tokenizer)])
    assert {f.value for f in found} == {0.0}
    assert all(f.exact and f.ci95 is None and f.n is None for f in found)


def test_scaling_every_weight_by_a_hundredth_is_a_relative_change_of_a_hundredth_everywhere(layers):
    model = copy.deepcopy(layers[0].model).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter *= 1.01
    found = weights_change([Layer("a", model, layers[0].tokenizer), Layer("b", scaled, layers[0].tokenizer)])
    relative = [f for f in found if f.metric == "relative_weight_change"]
    assert [f.value for f in relative] == pytest.approx([0.01] * len(relative))
    assert {f.group for f in relative} >= {
        None,
        "attention",
        "feed-forward",
        "norms",
        "embedding",
        "block 0",
        "block 1",
    }


def test_the_norm_is_that_of_all_changes_written_in_one_line(layers):
    found = by_key(weights_change(layers))
    flat = [torch.cat([p.detach().flatten().double() for p in layer.model.parameters()]) for layer in layers]
    for parent, child in ((0, 1), (1, 2), (0, 2)):
        names = layers[child].name, layers[parent].name
        change = flat[child] - flat[parent]
        expected = float(change.norm() / flat[parent].norm())
        assert found["relative_weight_change", None, *names].value == pytest.approx(expected, rel=1e-12)
        assert found["largest_weight_change", None, *names].value == float(change.abs().max())


def test_shares_of_the_kinds_of_module_sum_to_one(layers):
    shares = [f for f in weights_change(layers[:2]) if f.metric == "share_of_weight_change"]
    assert sum(f.value for f in shares if not f.group.startswith("block")) == pytest.approx(1.0)


def test_models_of_other_shapes_have_no_such_distance_and_the_tensor_is_named(layers, tokenizer):
    from planted_world import config_for

    from unmask.model.decoder import Decoder

    deeper = Decoder(config_for(tokenizer, layers=3))
    [found] = weights_change([layers[0], Layer("deeper", deeper, tokenizer)])
    assert found.value is None
    assert found.verdict.startswith("abstain: they differ in shape at model.layers.2.")


def test_names_of_other_houses_find_their_kind_and_block():
    assert kind_of("transformer.h.11.attn.c_attn.weight") == "attention"
    assert block_of("transformer.h.11.attn.c_attn.weight") == "block 11"
    assert kind_of("model.layers.3.input_layernorm.weight") == "norms"
    assert kind_of("model.layers.3.self_attn.q_norm.weight") == "norms"
    assert kind_of("lm_head.weight") == "head"
    assert block_of("lm_head.weight") is None
