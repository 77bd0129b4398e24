"""Preferences: pairs of conversations, one chosen over the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError
from unmask.text import order
from unmask.text.chat import Message, answered, begins_with_user, instruction_of, messages_of, under_system
from unmask.text.sources import Dropped, read_rows

_POOL = 50  # batches whose rows are sorted together


@dataclass(frozen=True)
class Pair:
    """Two conversations that end with the assistant's answers that were compared."""

    chosen: list[Message]
    rejected: list[Message]


def read_pairs(spec: str, dropped: Dropped | None = None) -> Iterator[Pair]:
    """The pairs of a source, in the formats of `to_pair`.

    Pairs that prefer nothing ("chosen equals rejected") or in which a side says nothing ("empty answer") are
    left out and counted in `dropped`. UserError, with file and line, for rows of no known format.
    """
    for where, row in read_rows(spec):
        pair = to_pair(row, where)
        if pair.chosen == pair.rejected:
            reason = "chosen equals rejected"
        elif not all(side[-1]["content"].strip() for side in (pair.chosen, pair.rejected)):
            reason = "empty answer"
        else:
            yield pair
            continue
        if dropped is not None:
            dropped[reason] += 1


def to_pair(row: Mapping[str, Any], where: str) -> Pair:
    """The pair that a row holds, in TRL's formats: `chosen` and `rejected`, texts or messages, after a common prompt or
    each with its own in it. The prompt is `prompt` (text or messages), or LLaMA-Factory's `conversations` or
    `messages`, Alpaca's `instruction` and `input`, or Orca's `question` where the sides are no whole chats. A column
    `system` stands before them."""
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"{where}: a preference needs chosen and rejected; the row has {sorted(row)}.")
    prompt: list[Message] = []
    talk = next((key for key in ("conversations", "messages") if row.get(key)), None)
    own = all(
        begins_with_user(messages_of(row[key], where, key, "assistant")) for key in ("chosen", "rejected")
    )
    if row.get("prompt"):
        prompt = messages_of(row["prompt"], where, "prompt", "user")
    elif talk is not None and not own:
        prompt = messages_of(row[talk], where, talk)
        while prompt and prompt[-1]["role"] == "assistant":  # one of the answers
            prompt.pop()
    elif any(row.get(key) for key in ("instruction", "question", "input")) and not own:
        prompt = instruction_of(row, where)
    elif "prompt" in row and isinstance(row["chosen"], str):  # refused, or a question without words
        prompt = messages_of(row["prompt"], where, "prompt", "user")
    sides = []
    for key in ("chosen", "rejected"):
        side = under_system(answered(prompt, row, key, where), row, where)
        if side[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: {key} ends with {side[-1]['role']}; it must end with the assistant's answer."
            )
        sides.append(side)
    return Pair(*sides)


def similar_batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """One epoch's batches of indices, such that the members of a batch have similar lengths and little is
    padding.

    The shuffled indices are sorted by length within pools of many batches, cut into batches (the last one
    may be smaller), and the batches are shuffled. A pure function of its arguments.
    """
    shuffled = order.permutation(seed, epoch, len(lengths))
    pool = _POOL * batch
    in_order = [
        sorted(shuffled[i : i + pool].tolist(), key=lengths.__getitem__)
        for i in range(0, len(shuffled), pool)
    ]
    ranked = np.array([index for indices in in_order for index in indices], dtype=np.int64)
    batches = [ranked[i : i + batch] for i in range(0, len(ranked), batch)]
    return [batches[i] for i in order.permutation(seed + 1, epoch, len(batches))]
