"""One order on the reader's side: which events may come next, what has been read, what may be used.

    PLACED --OrderAccepted--> ACCEPTED --OrderStarted--> STARTED --OrderExtent*, OrderFinished--> FINISHED

An event that does not fit raises KVTransferError; the session turns that into a failed order. Nothing here
moves bytes or emits commands: positions come in as extents, turn verified by `verify`, and `num_verified`
says up to where all groups together can supply the sequence.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from common.errors import KVTransferError
from common.kvcache.layout import TAIL_GROUP, GroupSpec, Retention
from common.kvtransfer.orders import OrderAccepted, OrderExtent, OrderFinished, OrderStarted
from common.kvtransfer.plan import window_start
from common.kvtransfer.reads import Planned
from common.types import EmbeddingHandle
from common.types.prefix import extend_chain, hash_at


class OrderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """KV of positions [start_position, len(token_ids)) wanted from `peer` for sequence `seq_id`.

    `chain` are the prefix hashes of the sequence as far as they are known, root first. `remaining_s` is the
    time left, 0 for no limit of its own.
    """

    seq_id: int
    peer: int
    request_id: str
    token_ids: tuple[int, ...]
    chain: Sequence[bytes]
    start_position: int
    adapter_id: str = ""
    cache_salt: str = ""
    embeddings: tuple[EmbeddingHandle, ...] = ()
    priority: int = 0
    remaining_s: float = 0.0
    traceparent: str = ""


class Stage(enum.Enum):
    PLACED = "placed"
    ACCEPTED = "accepted"
    STARTED = "started"
    FINISHED = "finished"


class Coverage:
    """A set of positions, kept as disjoint sorted runs."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        """Add positions [start, end); touching runs become one."""
        runs = []
        for a, b in self._runs:
            if b < start or a > end:
                runs.append((a, b))
            else:
                start, end = min(start, a), max(end, b)
        bisect.insort(runs, (start, end))
        self._runs = runs

    def covers(self, start: int, end: int) -> bool:
        return start >= end or any(a <= start and end <= b for a, b in self._runs)

    @property
    def last_end(self) -> int:
        """End of the run that goes furthest, 0 if empty."""
        return self._runs[-1][1] if self._runs else 0

    def end_from(self, start: int) -> int:
        """End of the run that holds `start`; `start` itself if none does."""
        return next((b for a, b in self._runs if a <= start <= b), start)


@dataclass
class GroupIntake:
    """Progress in one group. `need` is the first position that a complete hand-off must bring."""

    spec: GroupSpec
    need: int
    received: Coverage = field(default_factory=Coverage)
    verified: Coverage = field(default_factory=Coverage)


@dataclass
class Reading:
    """A planned read of one extent; `deadline` is set when it begins."""

    extent: OrderExtent
    plan: Planned
    read_id: int = 0
    deadline: float = math.inf


@dataclass
class ReadStats:
    nbytes: int = 0
    read_seconds: float = 0.0
    remote_cached_tokens: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0


class Intake:
    """State of one order. `groups` are the reader's groups that the source supplies."""

    def __init__(self, order_id: int, spec: OrderSpec, groups: Sequence[GroupSpec], now: float) -> None:
        self.num_tokens = len(spec.token_ids)
        if not 0 <= spec.start_position < self.num_tokens:
            raise ValueError(f"start_position {spec.start_position} is outside {self.num_tokens} tokens")
        self.order_id = order_id
        self.spec = spec
        self.stage = Stage.PLACED
        self.lease_id = 0
        self.ended = False
        self.last_progress = now
        self.last_own = now  # progress of this order, not of its worker alone
        self.last_event = now
        self.expires_at = now + spec.remaining_s if spec.remaining_s else math.inf
        self.stats = ReadStats()
        self.pending: list[Reading] = []
        self.reads: dict[int, Reading] = {}
        self._media = tuple((e.position, e.media_hash) for e in spec.embeddings)
        self._chain = list(spec.chain)  # the rest is hashed when the order is accepted, which nobody waits for
        self._groups = {g.name: GroupIntake(g, self._need(g)) for g in groups}

    def _need(self, group: GroupSpec) -> int:
        start = self.spec.start_position
        if group.retention is Retention.SNAPSHOT:
            return self.num_tokens - 1
        if group.retention is Retention.WINDOW:
            return max(start, window_start(group, self.num_tokens))
        return start

    # -- events --

    def on_accepted(self, event: OrderAccepted) -> None:
        self._expect(Stage.PLACED, event)
        self.stage = Stage.ACCEPTED
        extend_chain(self._chain, self.spec.token_ids, self._media)

    def on_started(self, event: OrderStarted) -> None:
        self._expect(Stage.ACCEPTED, event)
        if not event.lease_id:
            raise KVTransferError("an order started without a lease", param="lease_id")
        self.stage = Stage.STARTED
        self.lease_id = event.lease_id
        own = self.spec.start_position
        self.stats.remote_cached_tokens = min(max(event.cached_tokens - own, 0), self.num_tokens - own)

    def on_extent(self, event: OrderExtent) -> bool:
        """Check an extent against this order; True if it is wanted (otherwise it is fine and ignored)."""
        self._expect(Stage.STARTED, event)
        self._expect_lease(event.lease_id)
        group = self._groups.get(event.group)
        if group is None:
            return False
        start, end = event.start_position, event.start_position + event.num_tokens
        low = self.num_tokens - 1 if group.spec.name == TAIL_GROUP else self.spec.start_position
        if not low <= start < end <= self.num_tokens:
            why = f"extent [{start}, {end}) of {event.group} is outside the order [{low}, {self.num_tokens})"
            raise KVTransferError(why, param="start_position")
        if start < group.received.last_end:
            why = f"extent [{start}, {end}) of {event.group} overlaps or precedes [.., {group.received.last_end})"
            raise KVTransferError(why, param="start_position")
        if event.prefix_hash != hash_at(self._chain, self.spec.token_ids, end, self._media):
            raise KVTransferError(f"extent [{start}, {end}) is of other tokens", param="prefix_hash")
        if group.spec.retention is Retention.SNAPSHOT and end != self.num_tokens:
            return False
        group.received.add(start, end)
        return True

    def on_finished(self, event: OrderFinished) -> None:
        self._expect(Stage.STARTED, event)
        self._expect_lease(event.lease_id)
        if event.num_tokens != self.num_tokens - self.spec.start_position:
            why = f"{event.num_tokens} tokens published, {self.num_tokens - self.spec.start_position} ordered"
            raise KVTransferError(why, param="num_tokens")
        for name, group in self._groups.items():
            if not group.received.covers(group.need, self.num_tokens):
                raise KVTransferError(f"the order finished with a gap in group {name}", param="start_position")
        self.stage = Stage.FINISHED
        self.stats.queue_ms, self.stats.compute_ms = event.queue_ms, event.compute_ms

    def _expect(self, stage: Stage, event: object) -> None:
        if self.stage is not stage:
            raise KVTransferError(f"{type(event).__name__} in stage {self.stage.value}", param="event")

    def _expect_lease(self, lease_id: int) -> None:
        if lease_id != self.lease_id:
            raise KVTransferError(f"lease {lease_id:#x} does not belong to the order", param="lease_id")

    # -- reads --

    def next_reading(self) -> Reading | None:
        """A planned read whose blocks no read of this order writes at the moment, taken out of the queue."""
        busy = {(r.extent.group, b) for r in self.reads.values() for b in r.plan.block_ids}
        for i, reading in enumerate(self.pending):
            if not any((reading.extent.group, b) in busy for b in reading.plan.block_ids):
                return self.pending.pop(i)
        return None

    def verify(self, reading: Reading) -> None:
        """The bytes of a read are there and their digests match."""
        extent = reading.extent
        end = extent.start_position + extent.num_tokens
        self._groups[extent.group].verified.add(reading.plan.first_position, end)

    @property
    def is_complete(self) -> bool:
        """All that the order must bring is verified and nothing of it is under way."""
        if self.stage is not Stage.FINISHED or self.reads or self.pending:
            return False
        return all(g.verified.covers(g.need, self.num_tokens) for g in self._groups.values())

    def num_verified(self) -> int:
        """Positions [0, n) of which every group holds what a query at n needs, outside blocks in flight.

        Positions below the order's start are the sequence's own; 0 if one of those is in a block in flight.
        The tail row is not counted.
        """
        count, start = self.num_tokens, self.spec.start_position
        for reading in self.reads.values():
            spec = self._groups[reading.extent.group].spec
            if spec.retention is not Retention.SNAPSHOT:
                count = min(count, reading.plan.first_position // spec.block_size * spec.block_size)
        if count < start:
            return 0
        for group in self._groups.values():
            if group.spec.retention is Retention.FULL:
                count = min(count, group.verified.end_from(start))
            elif group.spec.retention is Retention.WINDOW:
                count = min(count, max(group.verified.last_end, start))
        return count if all(self._supplies(g, count) for g in self._groups.values()) else start

    def _supplies(self, group: GroupIntake, count: int) -> bool:
        start = self.spec.start_position
        if count <= start or group.spec.name == TAIL_GROUP:
            return True
        if group.spec.retention is Retention.SNAPSHOT:
            return count == self.num_tokens and group.verified.covers(count - 1, count)
        low = start if group.spec.retention is Retention.FULL else max(start, count - group.spec.window + 1)
        return group.verified.covers(low, count)
