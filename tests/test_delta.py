"""The stage delta, the exact divergences, their sampled estimators, and the dial."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask import delta
from unmask.errors import UserError

LN2 = math.log(2)


def logits(rows: int = 5, vocabulary: int = 40, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def targets(rows: int = 5, vocabulary: int = 40) -> Tensor:
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(9))


# ------------------------------------------------------------------------------------- log-probabilities, deltas


def test_log_probs_are_those_of_float64_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, t = logits(), targets()
    whole = delta.log_probs(z, t)
    assert whole.dtype is torch.float32
    torch.testing.assert_close(
        whole.double(), z.double().log_softmax(-1)[torch.arange(5), t], rtol=0, atol=1e-6
    )
    monkeypatch.setattr(delta, "CHUNK", 80)  # two rows of 40
    assert torch.equal(delta.log_probs(z, t), whole)


def test_bfloat16_logits_get_a_float32_log_softmax() -> None:
    z = logits().bfloat16()
    assert torch.equal(delta.log_softmax(z), z.float().log_softmax(-1))
    assert delta.log_probs(z, targets()).dtype is torch.float32
    assert delta.log_softmax(z.double()).dtype is torch.float64


def test_no_rows_give_no_numbers() -> None:
    z, t = logits(0), targets(0)
    assert delta.log_probs(z, t).shape == (0,)
    assert delta.divergences(z, z).js_T.shape == (0,)


log_p = st.floats(-80, -(2.0**-24), width=32)  # float32's log-softmax gives nothing nearer to 0, but 0


@given(st.lists(log_p, min_size=2, max_size=5), st.integers(2, 10**6))
def test_the_parts_sum_exactly_to_the_last_log_probability_and_the_credits_to_it_plus_ln_v(
    values: list[float], vocabulary: int
) -> None:
    log_probs = [torch.tensor([value]) for value in values]
    parts = delta.deltas(log_probs)
    assert len(parts) == len(values)
    assert torch.stack(parts).sum(0) == log_probs[-1].double()
    assert parts[0] == log_probs[0].double()
    credits = delta.credits(parts, vocabulary)
    assert torch.stack(credits).sum().item() == pytest.approx(values[-1] + math.log(vocabulary), abs=1e-13)
    assert credits[1:] == parts[1:]


def test_a_base_that_knows_nothing_has_no_credit() -> None:
    uniform = delta.log_probs(torch.zeros(1, 64), torch.tensor([5]))
    credits = delta.credits(delta.deltas([uniform, torch.tensor([0.0])]), 64)
    torch.testing.assert_close(
        torch.cat(credits), torch.tensor([0.0, math.log(64)]).double(), atol=1e-6, rtol=0
    )


def test_the_winner_is_the_largest_credit_the_lower_on_a_tie_and_none_below_the_floor() -> None:
    credits = [torch.tensor([1.0, 0.2, -3.0, 2.0, 0.1]), torch.tensor([0.5, 0.4, -1.0, 2.0, 0.1])]
    assert delta.winner(credits, 0.3).tolist() == [0, 1, -1, 0, -1]
    assert delta.winner(credits, -2.0).tolist() == [0, 1, 1, 0, 0]


# ------------------------------------------------------------------------------------------------- divergences


def test_divergences_of_a_pair_worked_out_by_hand() -> None:
    child, parent = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log() + 7
    found = delta.divergences(child, parent)
    for value in (found.kl_child_parent_T, found.kl_parent_child_T):
        assert value.item() == pytest.approx(0.25 * LN2, abs=1e-6)  # 0.5 ln 2 + 0.25 ln ½
    # Against m = (3/8, 1/4, 3/8): each side ½ ln(4/3) + ¼ ln(2/3).
    assert found.js_T.item() == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3), abs=1e-6)
    for value in (found.entropy_child_T, found.entropy_parent_T):
        assert value.item() == pytest.approx(1.5 * LN2, abs=1e-6)


def test_the_two_directions_are_told_apart() -> None:
    child, parent = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    found = delta.divergences(child, parent)
    assert found.kl_child_parent_T.item() == pytest.approx(
        0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6
    )
    assert found.kl_parent_child_T.item() == pytest.approx(
        0.5 * math.log(1 / 1.8) + 0.5 * math.log(5), abs=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identical_models_are_exactly_zero_apart(dtype: torch.dtype) -> None:
    z = logits(50, 3000, scale=10).to(dtype)
    found = delta.divergences(z, z.clone())
    for value in (found.kl_child_parent_T, found.kl_parent_child_T, found.js_T):
        assert torch.equal(value, torch.zeros(50, dtype=value.dtype))
    assert torch.equal(found.entropy_child_T, found.entropy_parent_T)
    rank, tied = delta.shift(z, z)
    assert torch.equal(rank, torch.ones(50, dtype=torch.int64))
    assert dtype is torch.bfloat16 or not tied.any()


def exact(child: Tensor, parent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = child.double().log_softmax(-1), parent.double().log_softmax(-1)
    m = torch.logaddexp(a, b) - LN2
    return (
        (a.exp() * (a - b)).sum(-1),
        (b.exp() * (b - a)).sum(-1),
        ((a.exp() * (a - m)).sum(-1) + (b.exp() * (b - m)).sum(-1)) / 2,
    )


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 0.01, 1.0, 30.0]), st.sampled_from([0.0, 50.0]))
def test_float32_divergences_equal_float64_even_where_the_models_are_close(
    seed: int, apart: float, offset: float
) -> None:
    child = logits(20, 500, seed) + offset
    parent = child + apart * torch.randn(20, 500, generator=torch.Generator().manual_seed(seed + 1))
    found = delta.divergences(child, parent)
    values = (found.kl_child_parent_T, found.kl_parent_child_T, found.js_T)
    for value, expected in zip(values, exact(child, parent), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-4, atol=1e-7)
        assert (value >= 0).all()
    assert (found.js_T <= LN2 + 1e-6).all()


def test_hopeless_disagreement_is_large_but_finite() -> None:
    child, parent = torch.tensor([[500.0, -500.0, 0.0]]), torch.tensor([[-500.0, 500.0, 0.0]])
    found = delta.divergences(child, parent)
    assert found.kl_child_parent_T.item() == found.kl_parent_child_T.item() == 1000
    assert found.js_T.item() == pytest.approx(LN2)


def test_divergences_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    child, parent = logits(seed=1), logits(seed=2)
    whole = delta.divergences(child, parent)
    monkeypatch.setattr(delta, "CHUNK", 80)
    parts = delta.divergences(child, parent)
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(parts).values(), strict=True))


# ----------------------------------------------------------------------------------------- sampled estimators


def test_the_estimators_of_ratios_worked_out_by_hand() -> None:
    ratio = torch.tensor([0.0, LN2, -LN2])
    torch.testing.assert_close(delta.k1(ratio), torch.tensor([0.0, LN2, -LN2]))
    torch.testing.assert_close(delta.k2(ratio), torch.tensor([0.0, LN2**2 / 2, LN2**2 / 2]))
    torch.testing.assert_close(delta.k3(ratio), torch.tensor([0.0, LN2 - 0.5, 1 - LN2]))


@pytest.mark.parametrize("estimator", [delta.k1, delta.k3])
def test_the_mean_over_many_samples_from_the_child_is_the_exact_kl(estimator: object) -> None:
    child, parent = logits(1, 12, 1, scale=1.0).double(), logits(1, 12, 2, scale=1.0).double()
    expected = delta.divergences(child, parent).kl_child_parent_T.item()
    ids = torch.multinomial(
        child.softmax(-1)[0], 400_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    ratio = (child.log_softmax(-1) - parent.log_softmax(-1))[0, ids]
    samples: Tensor = estimator(ratio)  # type: ignore[operator]
    error = samples.std().item() / math.sqrt(len(ids))
    assert abs(samples.mean().item() - expected) < 4 * error
    assert error < 0.01 * expected


def test_k3_varies_less_than_k1_where_the_models_are_close_and_is_never_negative() -> None:
    child = logits(1, 50, scale=1.0)
    parent = child + 0.05 * logits(1, 50, 5, scale=1.0)
    ratio, p = (child.log_softmax(-1) - parent.log_softmax(-1))[0], child.softmax(-1)[0]

    def variance(x: Tensor) -> Tensor:
        return (p * x.square()).sum() - (p * x).sum().square()

    assert variance(delta.k3(ratio)) < 0.01 * variance(delta.k1(ratio))
    assert (delta.k3(torch.linspace(-20, 20, 4001)) >= 0).all()


def test_as_losses_k1_has_no_gradient_k2_that_of_the_kl_and_k3_that_of_the_opposite_kl() -> None:
    child = logits(1, 12, 1, scale=1.0).double().requires_grad_()
    parent = logits(1, 12, 2, scale=1.0).double().log_softmax(-1)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, child, retain_graph=True)[0]

    log_p = child.log_softmax(-1)
    drawn = log_p.exp().detach()  # the weight of each token among samples, which has no gradient
    kl_child_parent = (log_p.exp() * (log_p - parent)).sum()
    kl_parent_child = (parent.exp() * (parent - log_p)).sum()
    expected = [torch.zeros_like(child), gradient(kl_child_parent), gradient(kl_parent_child)]
    for estimator, wanted in zip((delta.k1, delta.k2, delta.k3), expected, strict=True):
        torch.testing.assert_close(
            gradient((drawn * estimator(log_p - parent)).sum()), wanted, atol=1e-12, rtol=1e-9
        )


# ------------------------------------------------------------------------------------------------------- ranks


def test_ranks_count_what_is_strictly_higher_and_ties_apart() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert [x.tolist() for x in delta.token_rank(z, torch.tensor([1, 2]))] == [[3, 1], [1, 3]]
    assert [x.tolist() for x in delta.token_rank(z, torch.tensor([0, 0]))] == [[1, 1], [0, 3]]


def test_shift_is_the_rank_under_the_parent_of_the_childs_choice() -> None:
    child = torch.tensor([[0.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    parent = torch.tensor([[7.0, 2.0, 3.0], [7.0, 2.0, 3.0]])
    assert delta.shift(child, parent).rank_T.tolist() == [3, 1]


# -------------------------------------------------------------------------------------------------------- dial

ZS = [logits(seed=seed) for seed in (1, 2, 3)]


def test_the_dials_ends_are_the_finished_model_and_the_base_bit_for_bit() -> None:
    base, sft, rl = (delta.log_softmax(z) for z in ZS)
    assert torch.equal(delta.mix(ZS[0], ZS[1:], (1, 1)), rl)
    assert torch.equal(delta.mix(ZS[0], ZS[1:], (1.0, 0.0)), sft)
    assert torch.equal(delta.mix(ZS[0], ZS[1:], (0, 0)), base)
    assert torch.equal(delta.mix(ZS[0], [], ()), base)


weight = st.floats(-2, 3, width=32)


@given(weight, weight)
def test_the_dial_is_the_base_plus_weighted_deltas_renormalised(a: float, b: float) -> None:
    base, sft, rl = (z.double().log_softmax(-1) for z in ZS)
    expected = (base + a * (sft - base) + b * (rl - sft)).log_softmax(-1)
    torch.testing.assert_close(delta.mix(ZS[0], ZS[1:], (a, b)).double(), expected, rtol=1e-5, atol=1e-4)


def test_the_dial_takes_logits_and_log_probabilities_alike() -> None:
    from_logits = delta.mix(ZS[0], ZS[1:], (0.5, 1.5))
    shifted = delta.mix(ZS[0] + 5, [delta.log_softmax(z) for z in ZS[1:]], (0.5, 1.5))
    torch.testing.assert_close(from_logits, shifted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_logits.exp().sum(-1), torch.ones(5))


def test_a_dial_without_a_weight_for_each_layer_is_refused() -> None:
    with pytest.raises(UserError, match="2 layers above the base take as many weights, not 1"):
        delta.mix(ZS[0], ZS[1:], (1.0,))
