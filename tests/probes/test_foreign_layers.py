"""Families that only transformers knows are blamed and compared like our own."""

import copy

import pytest
import torch

from unmask.errors import UserError
from unmask.lineage import Layer, open_layers
from unmask.probes.blame import blame
from unmask.probes.compare import Texts, compare
from unmask.text.sources import Document
from unmask.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Layer]:
    """A GPT-2 and a child of it, saved by transformers with a tokenizer beside them."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.rows,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=96,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name in ("base", "child"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    return open_layers([folder / "base", folder / "child"])


def test_the_parts_of_a_blame_sum_to_the_log_probability_that_transformers_gives(
    pair: list[Layer], tokenizer: Tokenizer
) -> None:
    found = blame(pair, "What is the capital of Mepa?", max_new_tokens=6)
    ids = [*found.prompt_ids, *(token.id for token in found.tokens)]
    with torch.no_grad():
        log_p = pair[1].model(torch.tensor([ids])).log_softmax(-1)[0]
    for at, token in enumerate(found.tokens, len(found.prompt_ids)):
        assert sum(token.parts) == pytest.approx(float(log_p[at - 1, ids[at]]), abs=1e-4)
        assert token.id == int(log_p[at - 1].argmax())  # greedy, so what was said is what is likeliest


def test_a_model_differs_from_its_child_and_not_from_itself(pair: list[Layer]) -> None:
    texts = Texts(
        [[{"role": "user", "content": "Where is Mepa?"}], [{"role": "user", "content": "Hello"}]],
        [Document(f"Mepa is the capital of {i}", "made up") for i in range(3)],
    )
    same = compare([pair[0], Layer("twin", pair[0].model, pair[0].tokenizer)], texts)
    other = compare(pair, texts)

    [nothing], [something] = (
        [f.value for f in found if f.metric == "kl_child_parent" and f.text_source == "N"]
        for found in (same, other)
    )
    assert nothing == 0
    assert something is not None
    assert something > 0.01


def test_without_a_template_prompts_are_answered_as_plain_text(
    pair: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts([[{"role": "user", "content": "Where is Mepa?"}]] * 2, [])
    bare = [Layer(layer.name, layer.model, copy.copy(layer.tokenizer)) for layer in pair]
    for layer in bare:
        layer.tokenizer.chat_template = ""
    with pytest.raises(UserError, match=r"no chat template.*--plain"):
        compare(bare, texts)
    found = compare(bare, texts, template=False)
    answers = [f for f in found if f.text_source == "A sample"]
    assert answers
    assert {f.template for f in answers} == {"plain"}
