"""A rank that stands still (stopped, or its machine is gone) is noticed in seconds and named, however long steps take.

While a step runs, a thread of each rank counts in torchrun's store. The leader looks at everyone's count, the others at
the leader's; who sees one stand still says whose, and ends, and then all end. A rank whose thread counts and whose step
waits for ever is not noticed here, but by the time limit of sums.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

BEAT, SILENCE = 2.0, 20.0  # seconds
_AWAY = "away"  # between steps: files are read and written then, and nobody knows how long that takes


class Pulse:
    """The thread of one rank; `beating` surrounds each step."""

    def __init__(self, rank: int, size: int, name: str) -> None:
        """`name`: the same on all ranks, and of this start alone, for torchrun's store may outlive it."""
        # A connection of its own: calls on that of the process group wait for each other.
        self._store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        keys = {each: f"unmask/pulse {name} {each}" for each in range(size)}
        self._mine, self._watched = keys[rank], [each for each in keys if each != rank] if rank == 0 else [0]
        self._keys = [keys[each] for each in self._watched]
        self._lock, self._count, self._stepping, self._over = threading.Lock(), 0, False, threading.Event()
        self._show(stepping=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextmanager
    def beating(self) -> Iterator[None]:
        self._show(stepping=True)
        try:
            yield
        finally:
            self._show(stepping=False)

    def end(self) -> None:
        self._over.set()
        self._thread.join(BEAT)

    def _show(self, stepping: bool) -> None:
        with self._lock:
            self._stepping = stepping
            self._store.set(self._mine, str(self._count) if stepping else _AWAY)

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            if self._stepping:
                self._store.set(self._mine, str(self._count))

    def _watch(self) -> None:
        try:
            self._store.wait(self._keys, timedelta(days=7))
            seen = dict.fromkeys(self._watched, (b"", time.monotonic()))
            looked = time.monotonic()
            while not self._over.wait(BEAT):
                # This process stood still itself, as the others may have.
                if time.monotonic() - looked > 2 * BEAT:
                    seen = dict.fromkeys(self._watched, (b"", time.monotonic()))
                # Rank 0 may hold the store: then a call waits for ever where that stands still.
                alarm = threading.Timer(SILENCE, _end_all, [0])
                alarm.daemon = True
                alarm.start()
                try:
                    self._beat()
                    counts = self._store.multi_get(self._keys)
                finally:
                    alarm.cancel()
                looked = time.monotonic()
                for rank, count in zip(self._watched, counts, strict=True):
                    if count != seen[rank][0] or count == _AWAY.encode():
                        seen[rank] = (count, looked)
                    elif looked - seen[rank][1] > SILENCE:
                        _end_all(rank)
        except RuntimeError:  # the store is gone, and so is who held it: the next sum will say so
            return


def _end_all(rank: int) -> None:
    """End this process, whose main thread waits in a sum and hears nothing; the others then lose it."""
    words = (
        f"\nunmask: rank {rank} has given no sign of life for {SILENCE:g} s, so this one ends too. "
        "Start the same command again: it goes on from the last snapshot.\n"
    )
    os.write(2, words.encode())
    os._exit(75)
