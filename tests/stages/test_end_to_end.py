"""All four stages after one another, from made-up text to a policy that was nudged."""

from dataclasses import replace
from pathlib import Path

import torch
from small_models import CONFIG, CPU

from unmask.progress import Progress
from unmask.stages import examples, ppo, pretrain, reward, rollouts, sft
from unmask.text.chat import render
from unmask.text.shards import build
from unmask.text.tokenizer import Tokenizer
from unmask.training import loop
from unmask.training.optimizer import OptimizerSettings

THINGS = ("cat", "dog", "bird", "fish", "horse", "cow")
CALM, LOUD = "it is a calm {}", "it is a LOUD {} !"
RULES = loop.Settings(warmup_tokens=0, decay_tokens=0)


def ask(thing: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is {thing}?"}]


def talk(thing: str, answer: str) -> list[dict[str, str]]:
    return [*ask(thing), {"role": "assistant", "content": answer.format(thing)}]


def test_base_sft_reward_and_rl_follow_from_one_another(tmp_path: Path) -> None:
    """SFT says both answers, people prefer the calm one, and after RL it is said more often, and still ends."""
    texts = [answer.format(thing) for thing in THINGS for answer in (CALM, LOUD)]
    tokenizer = Tokenizer.train(texts * 5, 300)
    shards = build(tmp_path / "shards", texts * 20, tokenizer)
    progress = Progress(quiet=True)
    common = {"settings": OptimizerSettings(lr=5e-3), "dtype": torch.float32, "seed": 1}
    amounts = {"batch_tokens": 384, "micro_tokens": 192}

    config = replace(CONFIG, vocab_size=tokenizer.rows, max_position_embeddings=64)
    base, *rest = pretrain.stage(
        config,
        [pretrain.Source("made up", shards, 1.0)],
        length=48,
        tokens=8_000,
        end_of_text=tokenizer.end_of_text,
        device=CPU,
        **amounts,
        **common,
    )
    outcome = loop.train(base, *rest, RULES, tmp_path / "base", progress, "base")
    assert outcome.metrics["loss"]["last"] < 3

    chats = [render(tokenizer, talk(thing, answer)) for thing in THINGS for answer in (CALM, LOUD)]
    mask, *rest = sft.stage(
        base,
        [sft.Source("chats", chats * 4, 1.0)],
        length=48,
        tokens=25_000,
        pad=tokenizer.pad,
        **amounts,
        **common,
    )
    loop.train(mask, *rest, RULES, tmp_path / "sft", progress, "sft")

    pairs = [examples.Ranking([talk(thing, CALM), talk(thing, LOUD)], [(0, 1)]) for thing in THINGS]
    compared, dropped = reward.tokenize(pairs * 20, tokenizer, 64)
    assert not dropped
    judge, *rest = reward.stage(mask, compared, tokens=10**6, **amounts, **common)
    outcome = loop.train(judge, *rest, RULES, tmp_path / "reward", progress, "reward")
    assert outcome.metrics["accuracy"]["last"] == 1
    reward.centre(judge, [text for pair in compared for text in pair.texts])

    prompts = [render(tokenizer, ask(thing), open_turn=True).ids for thing in THINGS]
    nudged, *rest = ppo.stage(
        mask,
        judge,
        [rollouts.Source("questions", prompts, 1.0)],
        ppo.PPOSettings(rollouts=12, answers=32, answer_tokens=28, epochs=2, kl=0.02),
        stop_ids=tokenizer.stop_ids,
        lr=1e-3,
        critic_lr=2e-3,
        dtype=torch.float32,
        seed=1,
    )
    loop.train(nudged, *rest, RULES, tmp_path / "rl", progress, "rl")

    def calm(policy: torch.nn.Module) -> tuple[float, float]:
        """Shares of sampled answers that are calm, and that end."""
        said = rollouts.answered(
            policy, prompts * 20, answer_tokens=28, stop_ids=tokenizer.stop_ids, seed=9
        ).answers
        texts = [tokenizer.decode(answer.ids) for answer in said]
        stopped = sum(answer.finished for answer in said)
        return sum("calm" in text for text in texts) / len(said), stopped / len(said)

    before, after = calm(mask), calm(nudged.policy)
    assert 0.2 < before[0] < 0.8
    assert after[0] > before[0] + 0.15
    assert after[1] > 0.8
