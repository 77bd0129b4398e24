"""The processes that train one model together, which torchrun starts: who they are, what each does, what they add up.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 -m unmask run tiny

Every rank holds the whole model (or some rows of every weight: shard.py) and goes through the same steps. A step's
micro-batches are dealt out, and since they are a pure function of the step every rank knows what all of them count.
Gradients are added up once a step, in float32, after the last micro-batch; then all ranks take the same step, and stay
equal bit for bit. Files are the leader's.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store, _get_default_store

from unmask.errors import UserError
from unmask.training.pulse import Pulse
from unmask.training.signals import end_in_peace

T = TypeVar("T")
# Of a sum; torch's own 30 minutes would keep a cluster waiting for a rank that hangs.
TIMEOUT = timedelta(minutes=5)
PATIENCE = timedelta(days=7)  # with the leader, while it prepares text
_BUCKET = 2**24  # numbers that are sent at once


class Ranks:
    """One process among `size`. Alone (size 1) it sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1, pulse: Pulse | None = None) -> None:
        self.rank, self.size = rank, size
        self._turns, self._pulse = 0, pulse

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Those of a step's micro-batches, or of a rollout's prompts, that are this rank's: maybe none."""
        return batches[self.rank :: self.size]

    def add_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Every `grad` becomes the sum of all ranks' own. One that no rank has stays None."""
        if self.size == 1:
            return
        tensors = list(parameters.values())
        device = tensors[0].device
        there = torch.tensor([t.grad is not None for t in tensors], dtype=torch.int32, device=device)
        with self.together():
            dist.all_reduce(there, dist.ReduceOp.MAX)
        wanted = [t for t, some in zip(tensors, there.tolist(), strict=True) if some]
        for tensor in wanted:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        for bucket in _buckets(wanted):
            self.add([t.grad for t in bucket if t.grad is not None])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Each of these, of one dtype and device, becomes the sum of all ranks' own; they are sent as one."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self.together():
            dist.all_reduce(flat)
        for tensor, summed in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def gathered(self, mine: Sequence[T]) -> list[T]:
        """What each rank made of its `share` of something, put together in the order of the whole."""
        if self.size == 1:
            return list(mine)
        everyone: list[list[T]] = [[]] * self.size
        with self.together():
            dist.all_gather_object(everyone, list(mine))
        turns = range(max(map(len, everyone)))
        return [theirs[turn] for turn in turns for theirs in everyone if turn < len(theirs)]

    def add_numbers(self, numbers: Mapping[str, float], counted: Mapping[str, int]) -> dict[str, float]:
        """Sums by name over all ranks, in their order; a rank may lack a name.

        Raises UserError where ranks have `counted` differently: then they are not in the same step of the same data.
        """
        if self.size == 1:
            return dict(numbers)
        everyone: list[tuple[dict[str, float], dict[str, int]]] = [({}, {})] * self.size
        with self.together():
            dist.all_gather_object(everyone, (dict(numbers), dict(counted)))
        counts = [theirs for _, theirs in everyone]
        if other := [rank for rank, theirs in enumerate(counts) if theirs != counts[0]]:
            raise UserError(
                f"ranks 0 and {other[0]} have different batches: they count {counts[0]} and {counts[other[0]]}. Is it "
                "the same code, recipe and text on all machines?"
            )
        sums: dict[str, float] = {}
        for each, _ in everyone:
            for name, number in each.items():
                sums[name] = sums.get(name, 0.0) + number
        return sums

    def any(self, *mine: bool) -> list[bool]:
        """Of each, whether it is so on any rank."""
        if self.size == 1:
            return list(mine)
        flags = torch.tensor(
            mine, dtype=torch.int32, device="cuda" if dist.get_backend() == "nccl" else "cpu"
        )
        with self.together():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def told(self, word: str) -> str:
        """The leader's word, on all ranks."""
        if self.size == 1:
            return word
        words = [word]
        with self.together():
            dist.broadcast_object_list(words)
        return words[0]

    def beating(self) -> AbstractContextManager[None]:
        """What is inside is a step: one of them that stands still in it ends all."""
        return nullcontext() if self._pulse is None else self._pulse.beating()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """What is inside is done by the leader, then by the others, who find what it wrote; then all go on."""
        if self.size == 1:
            yield
            return
        store, self._turns = _get_default_store(), self._turns + 1
        turn = f"unmask/turn {self._turns}"
        if not self.leader:
            self._wait(store, turn)
        yield
        if self.leader:
            store.set(turn, "done")
        store.set(f"{turn} by {self.rank}", "done")
        for rank in range(self.size):
            self._wait(store, f"{turn} by {rank}")

    def _wait(self, store: Store, key: str) -> None:
        with self.together():
            store.wait([key], PATIENCE)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever is inside sends or waits: a rank that is lost is said to be."""
        try:
            yield
        except RuntimeError as error:  # a connection that closed, or TIMEOUT
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise  # too little memory, or a mistake
            # Its first word says where in gloo, its second sentence what may be the matter in general.
            end_in_peace()
            words = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]
            raise UserError(
                f"rank {self.rank} has lost another one ({words}). torchrun says which rank failed first. "
                "Start the same command again: it goes on from the last snapshot."
            ) from None


ALONE = Ranks()


@contextmanager
def joined(device: str | None = None) -> Iterator[tuple[Ranks, str | None]]:
    """This process among those that torchrun started, or alone; and its device, on a machine with several GPUs."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(), device
        return
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device and device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    rank, size = dist.get_rank(), dist.get_world_size()
    pulse = Pulse(rank, size, Ranks(rank, size).told(uuid4().hex)) if size > 1 else None
    try:
        yield Ranks(rank, size, pulse), device
    finally:
        if pulse is not None:
            pulse.end()
        dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, each of at most _BUCKET numbers or of one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
