"""Token traffic: one stream per router, cut off and taken up again without losing a token.

    router: absent -> ATTACHED <-> DETACHED (its stream broke; logs are kept `reattach_s`) -> dropped

Rows of an engine step are handed to each router's link and leave in one message; a link whose network is slow
collects rows of several steps in the next message. Nothing here ever waits for a router.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Iterable

from common.engine.messages import Cancel, Deltas, prompt_logprobs_nbytes
from common.types import ChoiceDelta, Clock, Failure, RequestStats, TokenLogprobs
from services.decode_worker.tokenlog import RequestLog

GENERATE_PREFIX = "generate:"
MAX_MESSAGE_ROWS = 512  # keeps the rows of a message far below gRPC's limit, with a vector of 64 KiB in each too
MAX_MESSAGE_NBYTES = 16 << 20  # of prompt logprobs in a message that holds more than one of them
MAX_BACKLOG_ROWS = 65536  # a router that falls this far behind is cut off: it reattaches and reads from the log


class Rows:
    """What waits to be sent on one link."""

    def __init__(self) -> None:
        self.deltas: list[tuple[int, ChoiceDelta]] = []
        self.failures: list[tuple[int, Failure]] = []
        self.stats: list[tuple[int, RequestStats]] = []
        self.prompt_logprobs: list[tuple[int, TokenLogprobs]] = []
        self.submitted: list[tuple[int, int | Failure]] = []  # (number, slot or why not) of the stream's submits

    def __len__(self) -> int:
        rows = len(self.deltas) + len(self.failures) + len(self.stats)
        return rows + len(self.prompt_logprobs) + len(self.submitted)

    def split(self, max_nbytes: int = MAX_MESSAGE_NBYTES) -> tuple[Rows, Rows]:
        """What fits into a message, and the rest: failures come last, and no row before its prompt's logprobs."""
        rest = Rows()
        count, nbytes = 0, 0
        for count, (_, logprobs) in enumerate(self.prompt_logprobs, 1):
            nbytes += prompt_logprobs_nbytes(len(logprobs.token_logprobs), logprobs.top_n)
            if nbytes > max_nbytes and count > 1:
                count -= 1
                break
        self.prompt_logprobs, rest.prompt_logprobs = self.prompt_logprobs[:count], self.prompt_logprobs[count:]
        if rest.prompt_logprobs:
            late = {slot for slot, _ in rest.prompt_logprobs}
            rest.deltas = [row for row in self.deltas if row[0] in late]
            self.deltas = [row for row in self.deltas if row[0] not in late]
        if len(self.deltas) > MAX_MESSAGE_ROWS:
            self.deltas, more = self.deltas[:MAX_MESSAGE_ROWS], self.deltas[MAX_MESSAGE_ROWS:]
            rest.deltas = more + rest.deltas
        if rest.deltas or rest.prompt_logprobs:
            self.failures, rest.failures = [], self.failures
        return self, rest


class Link:
    """One router's (or one Generate call's) end of the traffic."""

    def __init__(self, router_id: str, max_message_nbytes: int = MAX_MESSAGE_NBYTES) -> None:
        self.router_id = router_id
        self._max_message_nbytes = max_message_nbytes
        self.max_rows = MAX_BACKLOG_ROWS
        self.attached = False
        self.generation = 0  # of the stream: an older stream of the same router ends when a newer one attaches
        self.detached_at = 0.0
        self.rows = Rows()
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def take(self, generation: int) -> Rows | None:
        """Wait for rows (or a wake-up) and take a message full. None: the link belongs to another stream now."""
        await self._wake.wait()
        if generation != self.generation:
            return None
        rows, self.rows = self.rows.split(self._max_message_nbytes)
        if not self.rows:
            self._wake.clear()
        return rows

    def release(self, now: float) -> None:
        """Take the link from its stream; what was not sent is in the logs."""
        self.attached = False
        self.detached_at = now
        self.generation += 1
        self.discard()
        self.wake()

    def discard(self) -> None:
        self.rows = Rows()


class Streams:
    """Owns the logs of all requests and the links of all routers."""

    def __init__(
        self,
        send_cancel: Callable[[Cancel], None],
        reattach_s: float,
        clock: Clock,
        max_message_nbytes: int = MAX_MESSAGE_NBYTES,
    ) -> None:
        self._send_cancel = send_cancel
        self._max_message_nbytes = max_message_nbytes
        self._reattach_s = reattach_s
        self._clock = clock
        self._logs: dict[int, RequestLog] = {}
        self._links: dict[str, Link] = {}
        self._slots = itertools.count(1)

    def __len__(self) -> int:
        return sum(not log.ended_at for log in self._logs.values())

    def open(self, router_id: str, request_id: str, choices: Iterable[int], traceparent: str = "") -> RequestLog:
        """A log for a new request and the choices it runs; its slot is unique while this process lives."""
        log = RequestLog(next(self._slots), router_id, request_id, set(choices), self._clock.now(), traceparent)
        self._logs[log.slot] = log
        self._link(router_id)
        return log

    def forget(self, slot: int) -> None:
        """Drop a log, cancelling what still runs."""
        log = self._logs.pop(slot, None)
        if log is not None and not log.ended_at:
            self._send_cancel(Cancel((slot,)))

    def deliver(self, deltas: Deltas) -> list[RequestLog]:
        """Log a step's rows and hand them to their routers; returns the requests that ended by them."""
        now = self._clock.now()
        touched: set[Link] = set()
        for row in deltas.rows:
            if (log := self._logs.get(row.slot)) is not None:
                log.add(row.delta, now)
                link = self._links[log.router_id]
                link.rows.deltas.append((row.slot, row.delta))
                touched.add(link)
        for failure in deltas.failures:
            if (log := self._logs.get(failure.slot)) is not None:
                log.fail(failure.failure, now)
                self._push(log, touched).failures.append((failure.slot, failure.failure))
        for stats in deltas.stats:
            if (log := self._logs.get(stats.slot)) is not None:
                log.stats = stats.stats
                self._push(log, touched).stats.append((stats.slot, stats.stats))
        for prompt in deltas.prompt_logprobs:
            if (log := self._logs.get(prompt.slot)) is not None:
                log.prompt_logprobs = prompt.logprobs
                self._push(log, touched).prompt_logprobs.append((prompt.slot, prompt.logprobs))
        for link in touched:
            if link.attached:
                self._send(link)
            else:
                link.discard()  # the log has it; a reattaching router gets it from there
        slots = {r.slot for r in deltas.rows if r.delta.finish is not None} | {f.slot for f in deltas.failures}
        return [log for slot in slots if (log := self._logs.get(slot)) is not None and log.ended_at]

    def submitted(self, link: Link, generation: int, number: int, outcome: int | Failure) -> None:
        """An item of a stream's submits is answered; nobody hears of it if that stream has ended."""
        if link.attached and generation == link.generation:
            link.rows.submitted.append((number, outcome))
            self._send(link)

    def fail_all(self, failure: Failure) -> None:
        """The engine died: one terminal event for each request that ran."""
        now = self._clock.now()
        for log in self._logs.values():
            if log.ended_at:
                continue
            log.fail(failure, now)
            link = self._link(log.router_id)
            if link.attached:
                link.rows.failures.append((log.slot, failure))
                link.wake()

    def attach(self, router_id: str, positions: Iterable[tuple[int, int, int]]) -> tuple[Link, int, list[int]]:
        """Bind a stream: replay what (slot, choice, next position) lack. Returns link, generation, unknown slots."""
        link = self._link(router_id)
        link.discard()
        link.attached = True
        link.generation += 1
        unknown: list[int] = []
        replayed: set[int] = set()
        for slot, choice, next_position in positions:
            log = self._logs.get(slot)
            if log is None or log.router_id != router_id:
                unknown.append(slot)
                continue
            link.rows.deltas.extend((slot, d) for d in log.replay(choice, next_position))
            if slot not in replayed:
                replayed.add(slot)
                self._replay_extras(link, log)
        now = self._clock.now()
        for log in [x for x in self._logs.values() if x.router_id == router_id and x.slot not in replayed]:
            if now - log.created_at > self._reattach_s:
                self.forget(log.slot)
            elif log.rows or log.failure is not None:
                link.rows.deltas.extend((log.slot, d) for rows in log.rows.values() for d in rows)
                self._replay_extras(link, log)
        link.max_rows = MAX_BACKLOG_ROWS + len(link.rows)
        link.wake()
        return link, link.generation, sorted(set(unknown))

    def detach(self, link: Link, generation: int) -> None:
        """A stream ended; a newer one of the same router is left alone."""
        if link.generation == generation:
            link.release(self._clock.now())

    def ack(self, link: Link, positions: Iterable[tuple[int, int, int]]) -> None:
        for slot, choice, next_position in positions:
            log = self._log_of(link, slot)
            if log is not None:
                log.ack(choice, next_position)
                if log.all_acked:
                    del self._logs[slot]

    def cancel(self, link: Link, slot: int, choice: int | None) -> None:
        """The router wants no more of a request, or of one choice of it; what has ended stays as it is."""
        log = self._log_of(link, slot)
        if log is None:
            return
        if choice is None or log.open_choices == {choice}:
            self.forget(slot)
        elif choice in log.open_choices:
            self._send_cancel(Cancel((slot,), (choice,)))

    def sweep(self) -> None:
        """Drop what nobody came back for: called about once a second."""
        now = self._clock.now()
        for link in list(self._links.values()):
            if not link.attached and now - link.detached_at > self._reattach_s:
                for log in [x for x in self._logs.values() if x.router_id == link.router_id]:
                    if now - log.created_at > self._reattach_s:
                        self.forget(log.slot)
                if all(x.router_id != link.router_id for x in self._logs.values()):
                    del self._links[link.router_id]
        for log in [x for x in self._logs.values() if x.ended_at and now - x.ended_at > self._reattach_s]:
            del self._logs[log.slot]

    def private_link(self, router_id: str) -> Link:
        """The link of one Generate call, attached from the start."""
        assert router_id.startswith(GENERATE_PREFIX), router_id
        link = self._link(router_id)
        link.attached, link.max_rows = True, sys.maxsize
        return link

    def close_private(self, link: Link) -> None:
        for log in [x for x in self._logs.values() if x.router_id == link.router_id]:
            self.forget(log.slot)
        self._links.pop(link.router_id, None)

    def _log_of(self, link: Link, slot: int) -> RequestLog | None:
        log = self._logs.get(slot)
        return log if log is not None and log.router_id == link.router_id else None

    def _replay_extras(self, link: Link, log: RequestLog) -> None:
        if log.failure is not None:
            link.rows.failures.append((log.slot, log.failure))
        if log.stats is not None:
            link.rows.stats.append((log.slot, log.stats))
        if log.prompt_logprobs is not None:
            link.rows.prompt_logprobs.append((log.slot, log.prompt_logprobs))

    def _send(self, link: Link) -> None:
        if len(link.rows) > link.max_rows:
            link.release(self._clock.now())
        else:
            link.wake()

    def _push(self, log: RequestLog, touched: set[Link]) -> Rows:
        link = self._links[log.router_id]
        touched.add(link)
        return link.rows

    def _link(self, router_id: str) -> Link:
        link = self._links.get(router_id)
        if link is None:
            link = self._links[router_id] = Link(router_id, self._max_message_nbytes)
            link.detached_at = self._clock.now()
        return link
