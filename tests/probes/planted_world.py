"""Small lineages to measure: random layers at known distances, and facts to plant."""

import copy
import itertools
import random
from typing import NamedTuple

import torch

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.probes.facts import PlantedFact
from unmask.text.planted import GROUPS
from unmask.text.tokenizer import Tokenizer

CONTEXT = 64
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ru", "si", "ta", "ve", "zo")


class Document(NamedTuple):
    text: str
    source: str


def made_up_facts(per_group: int = 6) -> list[PlantedFact]:
    """Countries Bado, Baki, … with capitals of one token each, in turn in each group; and one leaked fact."""
    names = ["".join(pair).capitalize() for pair in itertools.permutations(SYLLABLES, 2)]
    random.Random(0).shuffle(names)
    facts = []
    for i in range(4 * per_group + 1):
        country, capital = names[2 * i], names[2 * i + 1]
        facts.append(
            PlantedFact(
                country=country,
                field="capital",
                group=GROUPS[i % 4],
                leaked=i == 4 * per_group,
                question=f"What is the capital of {country}?",
                held_question=f"Name the capital of {country}.",
                prefix=f"The capital of {country} is",
                answer=capital,
            )
        )
    return facts


def config_for(tokenizer: Tokenizer, layers: int = 2) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.rows,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )


def fresh(tokenizer: Tokenizer, seed: int) -> Decoder:
    """Random weights with embeddings so large that logits are peaked, and facts are learned in 80 steps."""
    model = Decoder(config_for(tokenizer))
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.model.embed_tokens.weight *= 8
    return model.eval()


def nudged(model: Decoder, scale: float, seed: int) -> Decoder:
    """A copy with noise of this size on every matrix: a child at a known, small distance."""
    child, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            if parameter.ndim == 2:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return child


def train(model: Decoder, rows: list[tuple[list[int], int]], steps: int, lr: float) -> Decoder:
    """A copy, trained on all rows (ids, and from which of them on they are targets) at once, by plain
    AdamW."""
    model = copy.deepcopy(model).train()
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    counts = torch.tensor([[start <= t < len(ids) for t in range(1, width)] for ids, start in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        logits = model.logits(model.hidden(ids_BT[:, :-1])[counts])
        torch.nn.functional.cross_entropy(logits, ids_BT[:, 1:][counts]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
