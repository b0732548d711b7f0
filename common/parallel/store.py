"""Small values between ranks while they start: who holds what, and the least of what each has. No step comes here.

Every rank asks the same questions in the same order; the n-th question of one rank meets the n-th of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import msgspec
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store

START_LIMIT_S = 600.0  # weights of one rank may come from a slower disk than another's
_LOOK_S = 1.0


class Rendezvous:
    """`check`: called now and then while it waits; raises where there is no use in waiting on."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        check: Callable[[], None] = lambda: None,
        limit_s: float = START_LIMIT_S,
    ) -> None:
        self.store = store
        self._rank = rank
        self._size = size
        self._check = check
        self._limit_s = limit_s
        self._asked = 0

    def prefixed(self, name: str) -> Store:
        """A room of its own in the store."""
        return PrefixStore(name, self.store)

    def share(self, value: object) -> list[object]:
        """What every rank gave, in the order of ranks. `TimeoutError` names the rank that did not come."""
        self._asked += 1
        put(self.store, f"{self._asked}/{self._rank}", msgspec.msgpack.encode(value))
        return [msgspec.msgpack.decode(self._wait(rank)) for rank in range(self._size)]

    def least(self, values: Sequence[int]) -> list[int]:
        """The least of all ranks, place by place."""
        given = [msgspec.convert(v, list[int]) for v in self.share(list(values))]
        return [min(column) for column in zip(*given, strict=True)]

    def _wait(self, rank: int) -> bytes:
        key, deadline = f"{self._asked}/{rank}", time.monotonic() + self._limit_s
        while True:
            self._check()
            try:
                self.store.wait([key], timedelta(seconds=_LOOK_S))
            except RuntimeError:  # torch's only word for a time that is over
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} has not come to a start within {self._limit_s:.0f} s") from None
                continue
            found: bytes = self.store.get(key)
            return found


def put(store: Store, key: str, value: bytes) -> None:
    """A value is bytes in both directions, whatever the stub of the store's says."""
    store.set(key, value)  # type: ignore[arg-type]


def file_store(path: str, size: int) -> Store:
    """Of processes of one machine; `path` lies in a folder that nobody else can write to."""
    return FileStore(path, size)


def thread_store() -> Store:
    """Of threads of one process."""
    return HashStore()
