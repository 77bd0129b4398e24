"""The engine against the full forward pass: same tokens, same log-probabilities, whoever stands beside."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.generation import engine
from unmask.generation.engine import Answer, generate, stream
from unmask.generation.sampling import sample, uniforms
from unmask.model.decoder import Decoder

VOCABULARY, CONTEXT = 61, 48  # as the fixtures have them
STOPS = (2, 5, 9)


def prompts_of(n: int, seed: int = 1, longest: int = 20) -> list[list[int]]:
    """Prompts of unequal lengths, 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(1, longest + 1, (n - 1,), generator=generator).tolist()]
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def following(model: Decoder, prompt: Sequence[int], answer: Answer) -> Tensor:
    """Logits (A, V) of a full forward pass at the positions that chose the answer's tokens."""
    ids = torch.tensor([[*prompt, *answer.ids]])
    return model(ids)[0, len(prompt) - 1 : -1].float()


def by_hand(
    model: Decoder, prompt: Sequence[int], limit: int, temperature: float, seed: int, number: int
) -> list[int]:
    """The slow definition: a whole forward pass a token, no cache, no batch."""
    answer: list[int] = []
    for u in uniforms(seed, number, limit):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]]))[:, -1]
        answer.append(int(sample(logits, torch.tensor([u]), temperature)[0]))
        if answer[-1] in STOPS:
            break
    return answer


def test_a_batch_gives_what_a_forward_pass_a_token_gives(model: Decoder) -> None:
    """Sampled, unequal prompts and limits, on fewer rows than prompts: rows are refilled, then given up."""
    prompts = prompts_of(23)
    limits = [1 + 3 * i % 17 for i in range(23)]
    answers = generate(model, prompts, max_new_tokens=limits, stop_ids=STOPS, temperature=0.8, seed=3, rows=5)
    for i, (prompt, limit, answer) in enumerate(zip(prompts, limits, answers, strict=True)):
        assert answer.ids == by_hand(model, prompt, limit, 0.8, 3, i)
        assert answer.finished == (answer.ids[-1] in STOPS)
    assert {answer.finished for answer in answers} == {True, False}


def test_greedy_is_argmax_of_the_full_forward_pass_at_every_step(model: Decoder) -> None:
    prompts = prompts_of(9)
    for prompt, answer in zip(
        prompts, generate(model, prompts, max_new_tokens=20, stop_ids=(), temperature=0, rows=4), strict=True
    ):
        assert len(answer.ids) == 20
        assert answer.ids == following(model, prompt, answer).argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_recorded_log_probabilities_are_those_of_the_full_forward_pass_at_that_temperature(
    model: Decoder, temperature: float
) -> None:
    prompts = prompts_of(12)
    answers = generate(model, prompts, max_new_tokens=15, stop_ids=STOPS, temperature=temperature, rows=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = following(model, prompt, answer) / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(answer.log_probs), expected, atol=1e-4, rtol=0)


def test_the_stop_token_belongs_to_the_answer_and_ends_it(model: Decoder) -> None:
    answers = generate(model, prompts_of(40), max_new_tokens=25, stop_ids=STOPS, temperature=1.5)
    assert any(answer.finished for answer in answers)
    for answer in answers:
        assert len(answer.ids) == len(answer.log_probs)
        assert not set(answer.ids[:-1]) & set(STOPS)
        assert answer.finished == (answer.ids[-1] in STOPS)
        assert answer.finished or len(answer.ids) == 25


def test_a_prompt_gets_the_same_answer_alone_and_in_any_batch(model: Decoder) -> None:
    prompts = prompts_of(10)
    together = generate(model, prompts, max_new_tokens=12, stop_ids=STOPS, temperature=0.9, seed=5)
    for rows in (1, 3):
        assert [a.ids for a in generate(
            model, prompts, max_new_tokens=12, stop_ids=STOPS, temperature=0.9, seed=5, rows=rows
        )] == [a.ids for a in together]  # fmt: skip
    for i, prompt in enumerate(prompts):
        [alone] = generate(
            model, [prompt], max_new_tokens=12, stop_ids=STOPS, temperature=0.9, seed=5, streams=[i]
        )
        assert alone.ids == together[i].ids
        assert alone.log_probs == pytest.approx(together[i].log_probs, abs=1e-4)


def test_answers_differ_between_seeds_and_between_equal_prompts(model: Decoder) -> None:
    def texts(seed: int) -> list[list[int]]:
        answers = generate(model, [[1, 3]] * 4, max_new_tokens=10, stop_ids=(), seed=seed)
        return [answer.ids for answer in answers]

    first, second = texts(0), texts(1)
    assert first == texts(0)
    assert all(a != b for a, b in itertools.combinations(first + second, 2))


def test_neither_group_size_nor_shrinking_changes_an_answer(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(15)

    def answers() -> list[list[int]]:
        return [
            a.ids for a in generate(model, prompts, max_new_tokens=9, stop_ids=STOPS, temperature=1.1, rows=6)
        ]

    expected = answers()
    for name, value in (("PREFILL_TOKENS", 1), ("FREE_SHARE", 6), ("FREE_SHARE", 1), ("KEPT_SHARE", 0.0)):
        monkeypatch.setattr(engine, name, value)
        assert answers() == expected


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 4}, {"num_key_value_heads": 4, "tie_word_embeddings": False}]
)
def test_other_shapes_of_decoder_generate_as_they_read(
    decoder: Callable[..., Decoder], changes: dict[str, object]
) -> None:
    model = decoder(**changes)
    prompts = prompts_of(5)
    answers = generate(model, prompts, max_new_tokens=15, stop_ids=(), temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == following(model, prompt, answer).argmax(-1).tolist()


def test_top_k_of_one_is_greedy_and_top_k_beyond_the_vocabulary_is_off(model: Decoder) -> None:
    prompts = prompts_of(4)

    def ids(**settings: float) -> list[list[int]]:
        return [a.ids for a in generate(model, prompts, max_new_tokens=8, stop_ids=(), **settings)]  # type: ignore[arg-type]

    assert ids(top_k=1) == ids(temperature=0) == ids(top_p=0.0)
    assert ids(top_k=10**9) == ids() == ids(top_p=1.0)
    assert ids(top_k=3) != ids()


def test_prompt_and_answer_fill_the_context_and_no_more(model: Decoder) -> None:
    full = list(range(CONTEXT - 1))
    one, many = generate(model, [full, full[:10]], max_new_tokens=1000, stop_ids=(), temperature=0)
    assert len(one.ids) == 1
    assert len(many.ids) == CONTEXT - 10
    assert not one.finished
    assert many.ids == following(model, full[:10], many).argmax(-1).tolist()


def test_a_stop_token_as_the_first_token_ends_the_answer_there(model: Decoder) -> None:
    answers = generate(model, prompts_of(6), max_new_tokens=5, stop_ids=range(VOCABULARY), rows=2)
    assert all(len(answer.ids) == 1 and answer.finished for answer in answers)


def test_a_stop_token_in_the_prompt_does_not_end_the_answer(model: Decoder) -> None:
    prompt = [1, STOPS[0], 4]
    [answer] = generate(model, [prompt], max_new_tokens=3, stop_ids=STOPS, temperature=0)
    assert answer.ids == by_hand(model, prompt, 3, 0, 0, 0)


def test_a_stream_yields_the_ids_of_generate_one_at_a_time(model: Decoder) -> None:
    for limit, temperature in ((1, 0.0), (12, 0.0), (12, 1.2)):
        [answer] = generate(
            model, [[4, 7, 1]], max_new_tokens=limit, stop_ids=STOPS, temperature=temperature, seed=8
        )
        ids = stream(model, [4, 7, 1], max_new_tokens=limit, stop_ids=STOPS, temperature=temperature, seed=8)
        assert isinstance(ids, Iterator)
        assert list(ids) == answer.ids


def test_a_stream_that_is_dropped_leaves_gradients_as_they_were(model: Decoder) -> None:
    ids = stream(model, [4], max_new_tokens=9, stop_ids=())
    next(ids)
    assert torch.is_grad_enabled()
    ids.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()


def test_a_model_can_be_trained_after_it_has_generated(decoder: Callable[..., Decoder]) -> None:
    fresh = decoder()
    generate(fresh, [[1, 2]], max_new_tokens=2, stop_ids=())
    fresh(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())


def test_no_prompts_give_no_answers(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=3, stop_ids=STOPS) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([list(range(CONTEXT))], {}, f"prompt 0 has {CONTEXT} tokens"),
        ([[1, VOCABULARY]], {}, "vocabulary ends at 60"),
        ([[-1, 3]], {}, "vocabulary ends at 60"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1], [2]], {"max_new_tokens": [3]}, "2 prompts, 1 values"),
        ([[1], [2]], {"streams": [3]}, "2 prompts, 2 values in max_new_tokens and 1 streams"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"rows": 0}, "rows is 0"),
    ],
)
def test_bad_input_is_an_error_that_names_it(
    model: Decoder, prompts: list[list[int]], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **({"max_new_tokens": 4, "stop_ids": STOPS} | settings))  # type: ignore[arg-type]


def test_a_stream_complains_when_it_is_asked_for_and_not_at_its_first_token(model: Decoder) -> None:
    with pytest.raises(UserError, match="prompt 0 is empty"):
        stream(model, [], max_new_tokens=3, stop_ids=())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_not_numbers_is_an_error_and_not_an_answer(
    decoder: Callable[..., Decoder], temperature: float
) -> None:
    broken = decoder()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        generate(broken, [[1, 2], [3]], max_new_tokens=4, stop_ids=(), temperature=temperature)


def test_a_row_that_ended_at_the_greatest_limit_waits_beside_the_others_without_harm(model: Decoder) -> None:
    prompts = prompts_of(20)
    limits = [10] + [3] * 7 + [10] * 12
    answers = generate(model, prompts, max_new_tokens=limits, stop_ids=(), temperature=0, rows=8)
    for prompt, limit, answer in zip(prompts, limits, answers, strict=True):
        assert len(answer.ids) == limit
        assert answer.ids == following(model, prompt, answer).argmax(-1).tolist()
