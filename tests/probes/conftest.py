"""A lineage small enough to train here, with facts planted in known layers; and layers of random weights."""

import pytest
import torch
from planted_world import fresh, made_up_facts, nudged, train

from unmask.lineage import Layer
from unmask.model.scorer import Scorer
from unmask.probes.facts import PlantedFact
from unmask.probes.forward import Judge
from unmask.text.chat import render
from unmask.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def facts() -> list[PlantedFact]:
    return made_up_facts()


@pytest.fixture(scope="session")
def tokenizer(facts: list[PlantedFact]) -> Tokenizer:
    texts = [f"{fact.prefix} {fact.answer}. {fact.question} {fact.held_question}" for fact in facts]
    return Tokenizer.train(texts * 3, 640)


@pytest.fixture(scope="session")
def layers(tokenizer: Tokenizer) -> list[Layer]:
    """base, sft, rl of random weights with peaked logits: sft far from base, rl near sft."""
    base = fresh(tokenizer, 0)
    sft = nudged(base, 0.03, 1)
    return [
        Layer("base", base, tokenizer, "h0"),
        Layer("sft", sft, tokenizer, "h1"),
        Layer("rl", nudged(sft, 0.003, 2), tokenizer, "h2"),
    ]


@pytest.fixture(scope="session")
def lineage(tokenizer: Tokenizer, facts: list[PlantedFact]) -> list[Layer]:
    """base taught `both` and `base_only` as sentences; sft taught `both` and `sft_only` as chats; rl is
    nearly sft."""

    def plain(fact: PlantedFact) -> tuple[list[int], int]:
        ids = tokenizer.encode(f"{fact.prefix} {fact.answer}.")
        return [tokenizer.end_of_text, *ids, tokenizer.end_of_text], 1

    def chat(fact: PlantedFact, question: str) -> tuple[list[int], int]:
        said = (("user", question), ("assistant", f"{fact.prefix} {fact.answer}."))
        rendered = render(tokenizer, [{"role": role, "content": text} for role, text in said])
        return rendered.ids, rendered.trained.index(True)

    told = [plain(fact) for fact in facts if fact.group in ("both", "base_only")]
    asked = [
        chat(fact, question)
        for fact in facts
        if fact.group in ("both", "sft_only")
        for question in (fact.question, fact.held_question)
    ]
    base = train(fresh(tokenizer, 0), told, steps=80, lr=4e-3)
    sft = train(base, asked, steps=80, lr=3e-3)
    rl = nudged(sft, 1e-4, 5)
    return [Layer("base", base, tokenizer), Layer("sft", sft, tokenizer), Layer("rl", rl, tokenizer)]


@pytest.fixture(scope="session")
def judge(tokenizer: Tokenizer) -> Judge:
    scorer = Scorer.from_decoder(fresh(tokenizer, 7), torch.Generator().manual_seed(7))
    return Judge("reward", scorer, tokenizer, "h3")
