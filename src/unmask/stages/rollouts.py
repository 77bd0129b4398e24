"""From prompts to answers to scores: what every stage that learns from its own answers does first.

Answers stay token ids with the log-probabilities that the sampler saw; nothing is decoded and encoded
again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.generation.engine import Answer, generate
from unmask.model.decoder import Decoder
from unmask.model.loss import token_log_probs
from unmask.model.scorer import Scorer
from unmask.stages.batches import drawn, fingerprint, pad_right, sent
from unmask.stages.reward import scores
from unmask.training.parallel import ALONE, Ranks


class Source(NamedTuple):
    """Prompts as ids that end with the opened assistant turn, and the share of every rollout they get."""

    name: str
    prompts: Sequence[Sequence[int]]
    share: float


class Rollout(NamedTuple):
    """Prompts and what was answered to each; an answer's ids end with its stop token if it finished."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Answer]


# One score an answer (B,), float32 on the CPU; NaN for one that was cut, if the judge has no opinion of it.
# A reward model here; a checker of results fits as well.
Reward = Callable[[Rollout], Tensor]


class Prompts:
    """Prompts of several sources mixed in fixed shares; a rollout's are a pure function of its index."""

    def __init__(self, sources: Sequence[Source], *, room: int, seed: int) -> None:
        """`room`: what the context leaves for a prompt. UserError for a longer one or an empty source."""
        for source in sources:
            if not source.prompts:
                raise UserError(
                    f"source {source.name!r} of [rl] has no prompt. Check its path and rl.prompt_tokens."
                )
            longest = max(map(len, source.prompts))
            if longest > room:
                raise UserError(
                    f"source {source.name!r} of [rl] has a prompt of {longest} tokens; the context leaves "
                    f"{room} for it. Lower rl.prompt_tokens or rl.answer_tokens, or raise `context`."
                )
        self.sources, self.seed = sources, seed
        held = [(source.name, fingerprint(source.prompts), source.share) for source in sources]
        self.data = {name: digest for name, digest, _ in held}
        self.fingerprint = hash_json([seed, held])

    @property
    def mean_length(self) -> float:
        """Mean length of a rollout's prompts, in tokens."""
        whole = sum(source.share for source in self.sources)
        means = [sum(map(len, source.prompts)) / len(source.prompts) for source in self.sources]
        return sum(source.share / whole * mean for source, mean in zip(self.sources, means, strict=True))

    def draw(self, rollout: int, n: int) -> list[Sequence[int]]:
        sizes = [len(source.prompts) for source in self.sources]
        shares = [source.share for source in self.sources]
        return [self.sources[i].prompts[row] for i, row in drawn(rollout, n, sizes, shares, self.seed)]


def fitting(prompts: Sequence[Sequence[int]], room: int) -> tuple[list[Sequence[int]], int]:
    """The prompts of at most `room` tokens, and how many were dropped."""
    kept = [prompt for prompt in prompts if len(prompt) <= room]
    return kept, len(prompts) - len(kept)


def answered(
    policy: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    answer_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    rows: int = 64,
    ranks: Ranks = ALONE,
) -> Rollout:
    """The policy's answers at temperature 1 without top-k or top-p: what is sampled is what is trained.

    Of several ranks each writes its share of them, and all get the whole.
    """
    mine = ranks.share(range(len(prompts)))
    answers = generate(
        policy,
        [prompts[i] for i in mine],
        max_new_tokens=answer_tokens,
        stop_ids=stop_ids,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=seed,
        streams=mine,
        rows=rows,
    )
    return Rollout(prompts, ranks.gathered(answers))


def judged(reward: Reward, rollout: Rollout, ranks: Ranks = ALONE) -> Tensor:
    """Its scores (B,), float32 on the CPU. Of several ranks each judges its share, and all get the whole."""
    mine = Rollout(ranks.share(rollout.prompts), ranks.share(rollout.answers))
    return torch.tensor(ranks.gathered(reward(mine).tolist()), dtype=torch.float32)


class RewardModel:
    """Score of an answer = the reward model's, centred; NaN for an answer that was cut.

    The reward model learned from conversations that end, so its opinion of half an answer is never asked
    for.
    """

    def __init__(self, model: Scorer, micro_tokens: int) -> None:
        self.model, self.micro_tokens = model, micro_tokens

    def __call__(self, rollout: Rollout) -> Tensor:
        result = torch.full((len(rollout.answers),), torch.nan)
        whole = [i for i, answer in enumerate(rollout.answers) if answer.finished]
        texts = [[*rollout.prompts[i], *rollout.answers[i].ids] for i in whole]
        result[whole] = scores(self.model, texts, self.micro_tokens)
        return result


def score_spread(
    policy: Decoder,
    reward: Reward,
    prompts: Sequence[Sequence[int]],
    *,
    answer_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    rows: int,
    ranks: Ranks = ALONE,
) -> float:
    """Standard deviation of the score between two answers of the policy to the same prompt.

    The root of the mean of (difference)² / 2 over the prompts that got two scores; NaN where none did.
    """
    twice = [*prompts, *prompts]
    said = answered(
        policy, twice, answer_tokens=answer_tokens, stop_ids=stop_ids, seed=seed, rows=rows, ranks=ranks
    )
    first_B, second_B = judged(reward, said, ranks).double().chunk(2)
    return ((first_B - second_B) ** 2 / 2).nanmean().sqrt().item()


def check(rollout: Rollout, scores_B: Tensor) -> dict[str, str]:
    """What is wrong with a rollout from which little can be learned: kind → sentence, empty if all is well.

    Raises UserError for scores that are not numbers: from those everything can be lost. NaN for an answer that
    was cut is none: the judge has no opinion of it.
    """
    n = len(scores_B)
    whole = [i for i, answer in enumerate(rollout.answers) if answer.finished]
    unjudged_B = scores_B.isnan() & torch.tensor([not answer.finished for answer in rollout.answers])
    broken = int((~(scores_B.isfinite() | unjudged_B)).sum())
    if broken:
        raise UserError(
            f"the reward of {broken} of {n} answers is not a finite number: the reward model's training "
            "diverged, or its weights are damaged. Redo it (`--from reward`), with a lower reward.lr."
        )
    found = {}
    if not whole:
        found["truncated"] = f"none of {n} answers stops by itself, so the judge has no opinion of any"
    elif len(whole) > 1 and bool((scores_B[whole] == scores_B[whole[0]]).all()):
        found["constant"] = (
            f"all of {len(whole)} whole answers get the same reward: there is nothing to prefer"
        )
    if whole and all(len(rollout.answers[i].ids) == 1 for i in whole):
        found["empty"] = f"all of {len(whole)} whole answers are empty: the policy stops at once"
    return found


class Actions(NamedTuple):
    """Rows of a forward pass and the N actions in them, row by row.

    `ids_BT` is each prompt and answer without the last token, after which nothing is chosen. An action is
    read one position earlier, where it was chosen: `before_N` are these positions in the flattened (B·T),
    `taken_N` the tokens chosen. `tokens` are all that the rows hold, without padding.
    """

    ids_BT: Tensor
    before_N: Tensor
    taken_N: Tensor
    tokens: int


def actions(rollout: Rollout, rows: Sequence[int], device: torch.device) -> Actions:
    """Every token of these rows' answers as an action, stop tokens included; nothing of a prompt is one."""
    prompts, answers = [rollout.prompts[row] for row in rows], [rollout.answers[row].ids for row in rows]
    read = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    ids_BT, _ = pad_right(read, device)
    before = [
        b * ids_BT.shape[1] + len(prompt) - 1 + i
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for i in range(len(answer))
    ]
    taken = [token for answer in answers for token in answer]
    return Actions(
        ids_BT,
        sent(torch.tensor(before), device),
        sent(torch.tensor(taken), device),
        sum(map(len, read)),
    )


def log_probs(model: Decoder, actions: Actions) -> Tensor:
    """ln π(action) (N,) float32 at temperature 1; logits are made where actions were chosen, nowhere else."""
    hidden_ND = model.hidden(actions.ids_BT, at_N=actions.before_N)
    return token_log_probs(hidden_ND, model.head, actions.taken_N)
