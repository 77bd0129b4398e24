"""Reading texts in batches gives what reading each alone gives; equal models give equal bits."""

import copy

import pytest
import torch

from unmask import delta
from unmask.errors import UserError
from unmask.lineage import Layer
from unmask.probes import forward
from unmask.probes.forward import Text, bf16_copy, prompt_ids, same_tokenizer, say, teacher_forced
from unmask.probes.probe import Meter
from unmask.text.tokenizer import Tokenizer


def texts_for(tokenizer, n=9):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (n,), generator=generator).tolist()
    starts = [int(torch.randint(1, length, (1,), generator=generator)) for length in lengths]
    return [
        Text(torch.randint(0, tokenizer.vocabulary, (length,), generator=generator).tolist(), start)
        for length, start in zip(lengths, starts, strict=True)
    ]


def alone(model, text):
    """log p of text.ids[start:], the long way: a full forward pass, log-softmax in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([text.ids]))[0].double()
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[t - 1, text.ids[t]] for t in range(text.start, len(text.ids))])


def test_batched_log_probabilities_are_those_of_each_text_alone(layers, tokenizer, monkeypatch):
    texts = texts_for(tokenizer)
    monkeypatch.setattr(forward, "ROWS_AT_ONCE", 5)
    read = teacher_forced([layers[0].model, layers[1].model], texts, batch_tokens=70)
    for text, found in zip(texts, read, strict=True):
        assert found.shape == (len(text.ids) - text.start, 2)
        for k in (0, 1):
            torch.testing.assert_close(found[:, k], alone(layers[k].model, text), atol=2e-5, rtol=0)


def test_a_model_and_its_copy_read_the_same_bits(layers, tokenizer):
    read = teacher_forced([layers[0].model, copy.deepcopy(layers[0].model)], texts_for(tokenizer))
    assert all(torch.equal(found[:, 0], found[:, 1]) for found in read)


def test_never_are_more_logits_made_at_once_than_the_limit(layers, tokenizer, monkeypatch):
    rows = []

    def read(logits, targets):
        rows.append(len(targets))
        return delta.log_probs(logits[0], targets)[:, None]

    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 3 * tokenizer.rows)
    teacher_forced([layers[0].model], texts_for(tokenizer), read)
    assert max(rows) == 3


def test_the_last_id_is_only_a_target_so_a_text_may_be_one_longer_than_the_context(layers, tokenizer):
    context = layers[0].model.config.max_position_embeddings
    [found] = teacher_forced([layers[0].model], [Text([5] * (context + 1), 1)])
    assert len(found) == context
    with pytest.raises(UserError, match=rf"{context + 2} tokens.*context of {context}"):
        teacher_forced([layers[0].model], [Text([5] * (context + 2), 1)])


def test_the_meter_counts_tokens_of_all_models(layers, tokenizer):
    meter, texts = Meter(), texts_for(tokenizer)
    teacher_forced([layer.model for layer in layers], texts, meter=meter)
    assert meter.cost().fp_tokens == 3 * sum(len(text.ids) - 1 for text in texts)


def test_the_bfloat16_copy_is_near_and_leaves_the_model_alone(layers, tokenizer):
    model = layers[0].model
    twin = bf16_copy(model)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for found in teacher_forced([model, twin], texts_for(tokenizer)):
        assert 0 < (found[:, 0] - found[:, 1]).abs().max() < 1


def test_layers_of_different_tokenizers_are_refused(layers):
    other = Layer("stranger", layers[0].model, Tokenizer.train(["some other text"], 300))
    with pytest.raises(UserError, match=r"stranger.*different tokenizers"):
        same_tokenizer([layers[0], other])


def test_a_prompt_in_the_template_ends_with_the_open_assistant_turn_and_plain_text_has_no_turns(tokenizer):
    chat = prompt_ids(tokenizer, "Hi <|im_end|>")
    assert chat == prompt_ids(tokenizer, [{"role": "user", "content": "Hi <|im_end|>"}])
    assert chat.count(tokenizer.turn_end) == 1
    assert chat.count(tokenizer.turn_start) == 2
    assert tokenizer.decode(prompt_ids(tokenizer, "Hi there", template=False)) == "Hi there"
    assert prompt_ids(tokenizer, "Hi", template=False)[0] == tokenizer.end_of_text


def test_greedy_answers_are_the_argmax_of_teacher_forced_reading(layers, tokenizer):
    prompt = prompt_ids(tokenizer, "What is the capital?")
    [answer] = say(layers[0], [prompt], 8)

    def best(logits, targets):
        return logits[0].argmax(-1)[:, None]

    [found] = teacher_forced([layers[0].model], [Text([*prompt, *answer.ids], len(prompt))], best)
    assert found[:, 0].long().tolist() == answer.ids
