"""Requests that wait, in fair order: deficit round robin between keys by tokens, within three priorities.

    offer -> waiting -> taken, when the caller has room for it
                    `-> dropped: the queue of its priority is full and its key has the most waiting; or withdrawn

Plain data: no clock, no network. A priority below 0 is served before 0, and 0 before those above; each has a queue of
its own, bounded in requests. Each round gives every waiting key the same number of tokens to spend, so that a key
with few or small requests does not wait behind one that sends many or large ones. When a queue is full, the last
request of the key with most tokens waiting makes room: one key alone cannot keep the others out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

QUANTUM: Final = 1024  # tokens of a round


class Waiter:
    """One request. `cost` in tokens, `seqs` sequences it will run; `settle(None)` is its turn, else why not."""

    __slots__ = ("cost", "flow", "give_up_s", "level", "queued", "seqs", "settle", "since_s")

    def __init__(
        self,
        flow: str,
        cost: int,
        seqs: int,
        priority: int,
        *,
        since_s: float,
        give_up_s: float,
        settle: Callable[[Exception | None], None],
    ) -> None:
        self.flow = flow
        self.cost = cost
        self.seqs = seqs
        self.level = (priority > 0) - (priority < 0) + 1
        self.since_s = since_s
        self.give_up_s = give_up_s
        self.settle = settle
        self.queued = False


class _Flow:
    """What waits of one key."""

    __slots__ = ("cost", "deficit", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Waiter] = deque()
        self.deficit = 0
        self.cost = 0


class _Level:
    """The queue of one priority; `flows` in the order of the round."""

    def __init__(self) -> None:
        self.flows: dict[str, _Flow] = {}
        self.size = 0

    def head(self) -> Waiter:
        """Whose turn it is. Rounds are run until one key can pay; those that pay nobody are run in one go."""
        flow = next(iter(self.flows.values()))
        while flow.deficit < flow.waiting[0].cost:
            rounds = min(-(-(f.waiting[0].cost - f.deficit) // QUANTUM) for f in self.flows.values())
            if rounds > 1:
                for each in self.flows.values():
                    each.deficit += (rounds - 1) * QUANTUM
            for name in list(self.flows):
                flow = self.flows[name]
                flow.deficit += QUANTUM
                if flow.deficit >= flow.waiting[0].cost:
                    break
                self.flows[name] = self.flows.pop(name)  # to the end of the round
        return flow.waiting[0]

    def add(self, waiter: Waiter) -> None:
        flow = self.flows.setdefault(waiter.flow, _Flow())
        flow.waiting.append(waiter)
        waiter.queued = True
        flow.cost += waiter.cost
        self.size += 1

    def take(self, waiter: Waiter) -> None:
        """The head: its key pays, and goes to the end of the round when it cannot pay for its next one."""
        flow = self.flows[waiter.flow]
        flow.deficit -= waiter.cost
        self.remove(waiter)
        if flow.waiting and flow.deficit < flow.waiting[0].cost:
            self.flows[waiter.flow] = self.flows.pop(waiter.flow)

    def remove(self, waiter: Waiter) -> None:
        flow = self.flows[waiter.flow]
        if flow.waiting[0] is waiter:
            flow.waiting.popleft()
        else:
            flow.waiting.remove(waiter)
        flow.cost -= waiter.cost
        waiter.queued = False
        self.size -= 1
        if not flow.waiting:
            del self.flows[waiter.flow]  # and its deficit: a key that waits for nothing saves nothing up


class FairQueue:
    """All that waits. `limit`: requests of one priority."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._levels = (_Level(), _Level(), _Level())

    def __len__(self) -> int:
        return sum(level.size for level in self._levels)

    def __iter__(self) -> Iterator[Waiter]:
        for level in self._levels:
            for flow in level.flows.values():
                yield from flow.waiting

    def sizes(self) -> tuple[int, int, int]:
        high, normal, low = (level.size for level in self._levels)
        return high, normal, low

    def offer(self, waiter: Waiter) -> Waiter | None:
        """Queue it; returns who has to go for it, itself if its key has most waiting; None if there was room."""
        level = self._levels[waiter.level]
        level.add(waiter)
        if level.size <= self._limit:
            return None
        heaviest = max(level.flows.values(), key=lambda flow: flow.cost)
        out = heaviest.waiting[-1]
        level.remove(out)
        return out

    def head(self) -> Waiter | None:
        return next((level.head() for level in self._levels if level.size), None)

    def take(self, waiter: Waiter) -> None:
        """The head leaves the queue for its turn."""
        self._levels[waiter.level].take(waiter)

    def remove(self, waiter: Waiter) -> None:
        self._levels[waiter.level].remove(waiter)

    def ahead(self, flow: str, cost: int, priority: int) -> int:
        """Tokens that will be served before a request of `flow` that comes now.

        All of the priorities above; of its own, from each key no more than what this key will have had by then.
        """
        level = (priority > 0) - (priority < 0) + 1
        above = sum(f.cost for each in self._levels[:level] for f in each.flows.values())
        flows = self._levels[level].flows
        mine = cost + (flows[flow].cost if flow in flows else 0)
        others = sum(min(f.cost, mine) for name, f in flows.items() if name != flow)
        return above + others + mine - cost
