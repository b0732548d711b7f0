"""What each request has produced and the router has not taken over yet.

    open -> (rows ...) -> ended (a finish on every choice, or one failure) -> acknowledged or too old: dropped

The log outlives a broken stream: a router that comes back says where it stands and gets the rest again.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.types import ChoiceDelta, Failure, RequestStats, TokenLogprobs


@dataclass(eq=False, slots=True)
class RequestLog:
    """Unacknowledged output of one request."""

    slot: int
    router_id: str
    request_id: str
    open_choices: set[int]
    created_at: float
    traceparent: str = ""
    rows: defaultdict[int, list[ChoiceDelta]] = field(default_factory=lambda: defaultdict(list))
    stats: RequestStats | None = None
    prompt_logprobs: TokenLogprobs | None = None
    failure: Failure | None = None
    ended_at: float = 0.0  # 0 while it runs

    def add(self, delta: ChoiceDelta, now: float) -> None:
        self.rows[delta.choice].append(delta)
        if delta.finish is not None:
            self.open_choices.discard(delta.choice)
            if not self.open_choices:
                self.ended_at = now

    def fail(self, failure: Failure, now: float) -> None:
        self.failure = failure
        self.ended_at = now

    def ack(self, choice: int, next_position: int) -> None:
        """Everything of `choice` below `next_position` has arrived."""
        rows = self.rows.get(choice)
        if rows:
            del rows[: bisect.bisect_left(rows, True, key=lambda d: _reaches_past(d, next_position))]

    @property
    def all_acked(self) -> bool:
        """Ended, and every row was acknowledged."""
        if not self.ended_at or self.failure is not None:
            return False
        return not any(self.rows.values())

    def replay(self, choice: int, next_position: int) -> Iterator[ChoiceDelta]:
        """Rows from `next_position` on; what precedes it in a row is cut off."""
        for delta in self.rows.get(choice, ()):
            if _reaches_past(delta, next_position):
                yield _cut(delta, next_position)


def _reaches_past(delta: ChoiceDelta, next_position: int) -> bool:
    """Does a row say more than the tokens below `next_position`? An end without a token does, right behind them.

    A vector takes a position.
    """
    count = len(delta.token_ids) + bool(delta.vector)
    end = delta.position + count
    return end > next_position or (end == next_position and not count)


def _cut(delta: ChoiceDelta, start: int) -> ChoiceDelta:
    skip = start - delta.position
    if skip <= 0:
        return delta
    lp = delta.logprobs
    if lp is not None:
        n = lp.top_n * skip
        lp = TokenLogprobs(lp.token_logprobs[skip:], lp.top_n, lp.top_ids[n:], lp.top_logprobs[n:])
    return ChoiceDelta(
        choice=delta.choice,
        position=start,
        token_ids=delta.token_ids[skip:],
        finish=delta.finish,
        stop_token_id=delta.stop_token_id,
        logprobs=lp,
    )
