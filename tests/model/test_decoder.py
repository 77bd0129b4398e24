"""The decoder against transformers, against itself with a cache and with packed rows, and at its start."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, decoder, token_ids

from unmask.model import weights
from unmask.model.cache import Cache
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum

transformers = pytest.importorskip("transformers")
each_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@each_family
def test_a_saved_model_opens_in_transformers_with_equal_logits(config: ModelConfig, tmp_path: Path) -> None:
    model, ids = decoder(config), token_ids(2, 40)
    weights.save(tmp_path, model)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == config.architecture
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@each_family
def test_a_model_saved_by_transformers_loads_with_equal_logits(config: ModelConfig, tmp_path: Path) -> None:
    ours, ids = decoder(config), token_ids(2, 40)
    (tmp_path / "ours").mkdir()
    weights.save(tmp_path / "ours", ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = weights.load(tmp_path / "theirs")
    assert isinstance(loaded, Decoder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@each_family
def test_hidden_states_and_gradients_at_chosen_positions_are_those_of_all_positions(
    config: ModelConfig,
) -> None:
    model, ids = decoder(config).double(), token_ids(3, 20)
    at = torch.tensor([0, 7, 19, 20, 45, 59])
    grads = []
    for hidden in (model.hidden(ids, at_N=at), model.hidden(ids).flatten(0, 1)[at]):
        assert hidden.shape == (6, config.hidden_size)
        model.zero_grad()
        hidden.square().sum().backward()
        grads.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@each_family
def test_gradients_equal_those_of_transformers(config: ModelConfig, tmp_path: Path) -> None:
    model, ids = decoder(config), token_ids(2, 24)
    weights.save(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs(ids, labels=ids).loss.backward()
    hidden = model.hidden(ids[:, :-1])
    loss = cross_entropy_sum(hidden.flatten(0, 1), model.head, ids[:, 1:].flatten())
    (loss / (2 * 23)).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=2e-5)


@each_family
def test_cached_decoding_of_unequal_prompts_equals_the_full_forward_pass(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(4, 30)
    lengths = torch.tensor([7, 1, 12, 4])
    cache = Cache(config, 4, 30, torch.float32, "cpu")
    rows = torch.arange(4)
    with torch.no_grad():
        full = model(ids)
        prompt = model(ids[:, :12], cache=cache)
        cache.advance(lengths)
        torch.testing.assert_close(prompt[rows, lengths - 1], full[rows, lengths - 1], rtol=1e-4, atol=1e-4)
        for _ in range(3):  # one token at a time, over what the padding left behind
            at = cache.lengths_B
            step = model(ids[rows, at][:, None], cache=cache)
            torch.testing.assert_close(step[:, 0], full[rows, at], rtol=1e-4, atol=1e-4)
            cache.advance(1)
        at = cache.lengths_B[:, None] + torch.arange(5)  # several tokens onto a cache that holds some
        step = model(ids[rows[:, None], at], cache=cache)
        torch.testing.assert_close(step, full[rows[:, None], at], rtol=1e-4, atol=1e-4)


def test_rows_of_a_cache_can_be_kept_and_replaced() -> None:
    model, ids = decoder(), token_ids(4, 16)
    config = model.config
    cache = Cache(config, 3, 16, torch.float32, "cpu")
    with torch.no_grad():
        full = model(ids)
        model.hidden(ids[:3, :6], cache=cache)
        cache.advance(torch.tensor([6, 4, 5]))
        cache.select(torch.tensor([2, 0]))
        assert cache.rows == 2
        newcomer = Cache(config, 1, 9, torch.float32, "cpu")
        model.hidden(ids[3:, :8], cache=newcomer)
        newcomer.advance(8)
        cache.put(torch.tensor([1]), newcomer)
        step = model(ids[[2, 3], cache.lengths_B][:, None], cache=cache)
    torch.testing.assert_close(step[:, 0], full[[2, 3], [5, 8]], rtol=1e-4, atol=1e-4)


@each_family
def test_packed_documents_give_the_logits_and_the_loss_of_each_alone(config: ModelConfig) -> None:
    model, ids = decoder(config), token_ids(2, 24)
    cuts = [[0, 5, 16, 24], [0, 11, 12, 24]]
    documents, positions = torch.empty(2, 24, dtype=torch.int64), torch.empty(2, 24, dtype=torch.int64)
    for row, edges in enumerate(cuts):
        for number, (start, stop) in enumerate(pairwise(edges)):
            documents[row, start:stop] = number
            positions[row, start:stop] = torch.arange(stop - start)
    hidden = model.hidden(ids, positions_BT=positions, documents_BT=documents)
    counts = torch.ones(2, 24, dtype=torch.bool)
    targets = ids.roll(-1, 1)
    alone = torch.zeros(())
    for row, edges in enumerate(cuts):
        for start, stop in pairwise(edges):
            counts[row, stop - 1] = False
            own = model.hidden(ids[row : row + 1, start:stop])
            torch.testing.assert_close(hidden[row : row + 1, start:stop], own, rtol=1e-5, atol=1e-5)
            alone = alone + cross_entropy_sum(own[0, :-1], model.head, ids[row, start + 1 : stop])
    packed = cross_entropy_sum(hidden[counts], model.head, targets[counts])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_a_token_sees_nothing_after_itself() -> None:
    model, ids = decoder(), token_ids(1, 20)
    changed = ids.clone()
    changed[0, 11] = 5 + (ids[0, 11] == 5)
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[0, :11], after[0, :11])
    assert not torch.equal(before[0, 11:], after[0, 11:])


def test_hidden_states_are_the_same_bits_with_and_without_gradients() -> None:
    model, ids = decoder(), token_ids(2, 20)
    with torch.no_grad():
        measured = model.hidden(ids)
    assert torch.equal(model.hidden(ids), measured)


@pytest.mark.parametrize("depth", [1, 4, 6, 12])
def test_the_loss_at_the_start_is_the_logarithm_of_the_vocabulary(depth: int) -> None:
    config = ModelConfig.from_depth(depth, vocabulary=4096, context=128)
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(depth))
    ids = torch.randint(0, 4096, (2, 129), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.hidden(ids[:, :-1])
        loss = cross_entropy_sum(hidden.flatten(0, 1), model.head, ids[:, 1:].flatten()) / 256
    assert abs(loss.item() / math.log(4096) - 1) < 0.02


def test_a_layers_matrices_start_by_their_inputs_and_what_writes_into_the_residual_stream_smaller() -> None:
    model = Decoder(ModelConfig.from_depth(8, vocabulary=512, context=16))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        expected = 0.32 / math.sqrt(parameter.shape[1]) if "layers" in name else 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected /= math.sqrt(16)
        assert abs(parameter.std().item() / expected - 1) < 0.03, name
        assert abs(parameter.mean().item()) < expected / 10, name


def test_the_initial_weights_are_a_function_of_the_seed() -> None:
    models = [Decoder(CONFIGS["smollm"]) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    hashes = [weights.tensor_hashes(model) for model in models]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_bfloat16_model_stays_close_to_its_float32_self_and_its_angles_are_not_rounded() -> None:
    config = ModelConfig(**{**CONFIGS["qwen3"].__dict__, "max_position_embeddings": 5000})
    model, ids = decoder(config, spread=0.05), token_ids(1, 12)
    late = torch.arange(4000, 4012)[None]
    with torch.no_grad():
        exact = model.hidden(ids, positions_BT=late)
        rounded = model.to(torch.bfloat16).hidden(ids, positions_BT=late)
    assert rounded.dtype is torch.bfloat16
    # At position 4,000 a table of angles in bfloat16 would be off by up to 8 radians: no likeness at all.
    assert torch.nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.999


def test_a_model_in_float64_computes_in_float64() -> None:
    model, ids = decoder(), token_ids(1, 12)
    with torch.no_grad():
        single, double = model(ids), model.double()(ids)
    assert double.dtype is torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_a_cache_is_not_read_at_chosen_positions() -> None:
    model, ids = decoder(CONFIGS["qwen3"]), token_ids(2, 4)
    with pytest.raises(AssertionError, match="at its end"):
        model.hidden(ids, cache=model.new_cache(2, 8), at_N=torch.tensor([1]))


class Kept:
    """Bytes that are kept for backward while it is open."""

    def __enter__(self) -> "Kept":
        self.bytes = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.bytes += tensor.nbytes
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit_and_keep_a_third_at_most(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    model, ids = decoder(config).to(dtype), token_ids(3, 20)
    found, kept = [], []
    for recompute in (False, True):
        model.model.recompute = recompute
        model.zero_grad()
        with Kept() as keeping:
            hidden = model.hidden(ids, at_N=torch.tensor([3, 40]))
        hidden.float().square().sum().backward()
        found.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        kept.append(keeping.bytes)
    for whole, again in zip(*found, strict=True):
        assert torch.equal(whole, again)
    assert kept[1] < kept[0] / 3
