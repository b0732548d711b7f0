"""The reader's side of the hand-off: orders placed with peers, extents read, verified and handed to the engine.

    order  place -> PLACED -> ACCEPTED -> STARTED -> FINISHED -> all verified -> Done
              `------------ event that does not fit, mismatch, time over, peer lost ---> Failed
              `------------ cancel -------------------------------------------------------> (no update)
    read   planned -> in flight -> OK: verified, blocks live again
                          `------> MISMATCH | FAILED | FENCED: order fails, blocks live again or free
    peer   connecting -> ready -> lost (data path gone; anew by the next peer_ready) -> gone
                `------> refused

When an order ends early, the engine goes on at once without the blocks in flight (it advances to `num_verified`,
then closes the sequence or detaches them); the blocks themselves come back only when the transport has ended
the read. A read that outlives its time is not forgotten but fenced: the endpoint is destroyed, which ends every
read on it and loses the peer.
DropOrder is emitted once when an order ends that the owner has not ended itself, ReleaseLease once when the
last read under the lease has ended. After `peer_gone` there is nobody to tell: leases run out by themselves.

Nothing here waits, sleeps or starts a thread: the engine loop calls in, and again at `next_deadline`.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.config.schema import HandoffConfig
from common.errors import KVTransferError, PeerLostError
from common.kvcache.layout import TAIL_GROUP, KVLayout
from common.kvtransfer.cache import CacheView
from common.kvtransfer.intake import Intake, OrderSpec, Reading, Stage
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderEvent,
    OrderExtent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PlaceOrder,
    ReaderCommand,
    ReleaseLease,
)
from common.kvtransfer.peers import Peers, Traffic
from common.kvtransfer.plan import check_extent, supplied_groups
from common.kvtransfer.reads import Reads, Wanted
from common.kvtransfer.transport import Endpoint, PeerDown, ReadResult, ReadStatus
from common.kvtransfer.updates import Done, Failed, HandoffCounters, HandoffUpdate, Progress, TailRead
from common.types import Clock, Failure, WorkerRef
from common.types.prefix import pack_tokens

REMEMBERED = 4096
LONGEST_TURN_S = 300.0  # that an order hears nothing of itself, while its worker computes others
_REASONS = {"prefix_hash": "prefix_hash", "seq_id": "closed"}  # field at fault -> Failed.reason

__all__ = [
    "Done",
    "Failed",
    "HandoffCounters",
    "HandoffReader",
    "HandoffUpdate",
    "OrderSpec",
    "Progress",
    "TailRead",
    "Traffic",
]


@dataclass
class _Ended:
    """What is remembered of an ended order; `may_start`: its lease, if it gets one, is not known yet."""

    peer: int
    may_start: bool


class HandoffReader:
    """Owns all orders, reads and peers of one reader, whose ranks all read with `reading`."""

    def __init__(
        self,
        layout: KVLayout,
        reading: Reads,
        cache: CacheView,
        clock: Clock,
        config: HandoffConfig,
        emit: Callable[[ReaderCommand], None],
    ) -> None:
        self._layout = layout
        self._reading = reading
        self._cache = cache
        self._clock = clock
        self._config = config
        self._emit = emit
        self._peers = Peers(layout, reading, clock, config, emit)
        self._order_ids = itertools.count(1)
        self._read_ids = itertools.count(1)
        self._orders: dict[int, Intake] = {}  # by order id, until ended
        self._by_seq: dict[int, int] = {}
        self._reads: dict[int, Intake] = {}  # by read id, until the transport ended it
        self._ended: OrderedDict[int, _Ended] = OrderedDict()
        self._updates: list[HandoffUpdate] = []
        self.counters = HandoffCounters()

    # -- peers --

    def peer_ready(
        self, peer: int, ref: WorkerRef, layout: KVLayout, endpoints: Sequence[Endpoint], lease_ttl_s: float
    ) -> None:
        """A peer's session is up: connect to its memory, or refuse it and name the field at fault.

        The verdict is emitted now or, if the transport needs a moment to say what it runs over, by a later `poll`.
        A number that is in use already is connected anew; what was under way there has failed.
        """
        if peer in self._peers:
            self._lose(peer, "peer_lost", "the peer was announced again", tell=False)
        self._peers.add(peer, ref, layout, endpoints, lease_ttl_s)

    def peer_gone(self, peer: int, reason: str) -> None:
        """A peer's session broke: its orders fail and its endpoint is destroyed. Unknown peers are ignored."""
        if peer in self._peers:
            self._peers[peer].session_up = False
            self._lose(peer, "peer_gone", reason, tell=False)
            self._peers.remove(peer)

    def usable(self, peer: int) -> bool:
        """Can an order be placed there now?"""
        return self._peers.usable(peer)

    # -- orders --

    def place(self, spec: OrderSpec) -> int:
        """Order KV; returns the order's id. The sequence holds live blocks for all of it, tail included.

        Raises PeerLostError if the peer is not usable, ValueError for a bad spec or a second order.
        """
        if spec.seq_id in self._by_seq:
            raise ValueError(f"sequence {spec.seq_id} has an order already")
        if not self.usable(spec.peer):
            raise PeerLostError(f"peer {spec.peer} is not usable")
        peer = self._peers[spec.peer]
        groups = [self._layout.group(name) for name in supplied_groups(peer.layout, self._layout)]
        order_id = next(self._order_ids)
        intake = Intake(order_id, spec, groups, self._clock.now())
        self._orders[order_id] = intake
        self._by_seq[spec.seq_id] = order_id
        self.counters.placed += 1
        self._emit(
            PlaceOrder(
                peer=spec.peer,
                order_id=order_id,
                request_id=spec.request_id,
                packed_tokens=pack_tokens(spec.token_ids),
                start_position=spec.start_position,
                adapter_id=spec.adapter_id,
                cache_salt=spec.cache_salt,
                embeddings=spec.embeddings,
                priority=spec.priority,
                remaining_s=spec.remaining_s,
                traceparent=spec.traceparent,
            )
        )
        return order_id

    def cancel(self, seq_id: int) -> None:
        """The sequence is not wanted any more: no update follows. Idempotent; call it before closing the sequence."""
        self._updates = [u for u in self._updates if u.seq_id != seq_id]
        order_id = self._by_seq.get(seq_id)
        if order_id is not None:
            self.counters.cancelled += 1
            self._end(self._orders[order_id], drop=True)

    def on_event(self, peer: int, event: OrderEvent) -> None:
        """Take what a peer says about an order. Whatever it says, it can at most fail that order."""
        intake = self._orders.get(event.order_id)
        if intake is None or intake.spec.peer != peer:
            self._late_event(peer, event)
            return
        now = self._clock.now()
        try:
            match event:
                case OrderAccepted():
                    intake.on_accepted(event)
                case OrderStarted():
                    intake.on_started(event)
                case OrderExtent():
                    self._on_extent(intake, event)
                case OrderFinished():
                    intake.on_finished(event)
                case OrderFailed():
                    self._fail(intake, "rejected", event.failure.message, failure=event.failure, drop=False)
                    return
        except KVTransferError as error:
            reason = "peer_lost" if isinstance(error, PeerLostError) else _REASONS.get(error.param, "protocol")
            self._fail(intake, reason, error.message)
            return
        intake.last_progress = intake.last_own = intake.last_event = now
        self._advance(intake)

    def peer_computes(self, peer: int) -> None:
        """Its engine has gone on: silence means that others are computed, or a long step. Not for ever."""
        now = self._clock.now()
        for intake in self._orders.values():
            if intake.spec.peer == peer and now - intake.last_own < LONGEST_TURN_S:
                intake.last_progress = now

    def poll(self) -> list[HandoffUpdate]:
        """Take what the transport ended, let time act, and return what changed since the last call."""
        for result in self._reading.poll():
            if isinstance(result, PeerDown):
                peer = self._peers.by_transport(result.peer_id)
                if peer is not None:
                    self._lose(peer.number, "peer_lost", result.message)
            else:
                self._on_result(result)
        self._peers.tend()
        self._expire()
        updates, self._updates = self._updates, []
        return updates

    def next_deadline(self) -> float:
        """When `poll` must run next even if nothing is reported, inf for never."""
        orders = (self._deadline(i) for i in self._orders.values())
        reads = (i.reads[read_id].deadline for read_id, i in self._reads.items())
        return min(itertools.chain(orders, reads, (self._peers.next_deadline(),)))

    @property
    def num_orders(self) -> int:
        return len(self._orders)

    @property
    def num_reads(self) -> int:
        """Reads that the transport has not ended, those of ended orders included."""
        return len(self._reads)

    def traffic(self) -> list[Traffic]:
        """What was read from each peer that is known now."""
        return self._peers.traffic()

    # -- extents and reads --

    def _on_extent(self, intake: Intake, event: OrderExtent) -> None:
        peer = self._peers[intake.spec.peer]
        check_extent(peer.layout, event, peer.layout.tp_size)
        if not intake.on_extent(event):
            return
        try:
            table = self._cache.block_table(intake.spec.seq_id, event.group)
        except KeyError:
            raise KVTransferError("the sequence was closed without a cancel", param="seq_id") from None
        plan = self._reading.plan(peer.transport_id, Wanted(event, tuple(table), intake.num_tokens))
        if not plan.is_empty:
            intake.pending.append(Reading(event, plan))
            self._start_reads(intake)

    def _start_reads(self, intake: Intake) -> None:
        peer = self._peers[intake.spec.peer]
        while (reading := intake.next_reading()) is not None:
            reading.read_id = next(self._read_ids)
            reading.deadline = self._clock.now() + self._config.read_timeout_s
            plan = reading.plan
            self._cache.begin_read(reading.read_id, reading.extent.group, plan.block_ids)
            try:
                self._reading.read(peer.transport_id, reading.read_id, plan)
            except BaseException:
                self._cache.end_read(reading.read_id)
                raise
            intake.reads[reading.read_id] = reading
            self._reads[reading.read_id] = intake

    def _on_result(self, result: ReadResult) -> None:
        intake = self._reads.pop(result.read_id, None)
        if intake is None:
            self.counters.unknown_reads += 1
            return
        reading = intake.reads.pop(result.read_id)
        self._cache.end_read(result.read_id)
        self._count(intake, result)
        if intake.ended:
            self._release_if_drained(intake)
        elif result.status is ReadStatus.OK:
            intake.verify(reading)
            intake.stats.nbytes += result.nbytes
            intake.stats.read_seconds += result.read_seconds
            if reading.extent.group == TAIL_GROUP:
                self._updates.append(TailRead(intake.spec.seq_id))
            intake.last_progress = intake.last_own = self._clock.now()
            self._resume(intake)
        else:
            reason = "digest_mismatch" if result.status is ReadStatus.MISMATCH else "read_failed"
            self._fail(intake, reason, result.message)

    def _resume(self, intake: Intake) -> None:
        try:
            self._start_reads(intake)
        except KVTransferError as error:
            self._fail(intake, "read_failed", error.message)
            return
        self._updates.append(Progress(intake.spec.seq_id, intake.num_verified()))
        self._advance(intake)

    def _count(self, intake: Intake, result: ReadResult) -> None:
        mismatch = result.status is ReadStatus.MISMATCH
        self.counters.reads += 1
        self.counters.nbytes += result.nbytes
        self.counters.read_seconds += result.read_seconds
        self.counters.mismatches += mismatch
        self._peers.count(intake.spec.peer, result.nbytes, mismatch)

    # -- ends --

    def _advance(self, intake: Intake) -> None:
        if not intake.is_complete:
            return
        peer, stats = self._peers[intake.spec.peer], intake.stats
        self.counters.done += 1
        self.counters.cold.update(peer.cold)
        self._updates.append(
            Done(
                seq_id=intake.spec.seq_id,
                nbytes=stats.nbytes,
                read_seconds=stats.read_seconds,
                wait_seconds=self._clock.now() - intake.last_event,
                transport=peer.transport,
                worker_id=peer.ref.worker_id,
                remote_cached_tokens=stats.remote_cached_tokens,
                queue_ms=stats.queue_ms,
                compute_ms=stats.compute_ms,
            )
        )
        self._end(intake, drop=False)

    def _fail(
        self, intake: Intake, reason: str, detail: str, *, failure: Failure | None = None, drop: bool = True
    ) -> None:
        self.counters.failed[reason] += 1
        self._updates.append(Failed(intake.spec.seq_id, reason, intake.num_verified(), detail, failure))
        self._end(intake, drop=drop)

    def _end(self, intake: Intake, *, drop: bool) -> None:
        """Take an order out. Its reads go on until the transport ends them."""
        intake.ended = True
        intake.pending.clear()
        del self._orders[intake.order_id]
        del self._by_seq[intake.spec.seq_id]
        self._ended[intake.order_id] = _Ended(intake.spec.peer, intake.stage in (Stage.PLACED, Stage.ACCEPTED))
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        if drop and intake.stage is not Stage.FINISHED and self._peers.can_tell(intake.spec.peer):
            self._emit(DropOrder(intake.spec.peer, intake.order_id))
        self._release_if_drained(intake)

    def _release_if_drained(self, intake: Intake) -> None:
        if intake.lease_id and not intake.reads:
            lease_id, intake.lease_id = intake.lease_id, 0
            if self._peers.can_tell(intake.spec.peer):
                self._emit(ReleaseLease(intake.spec.peer, lease_id))

    def _late_event(self, peer: int, event: OrderEvent) -> None:
        """An event of no open order. One that starts an order we have dropped opened a lease: give it back."""
        ended = self._ended.get(event.order_id)
        if ended is None or ended.peer != peer:
            self.counters.unknown_events += 1
            return
        self.counters.late_events += 1
        if isinstance(event, OrderStarted) and ended.may_start and event.lease_id:
            ended.may_start = False
            if self._peers.can_tell(peer):
                self._emit(ReleaseLease(peer, event.lease_id))

    def _lose(self, number: int, reason: str, detail: str, *, tell: bool = True) -> None:
        """Destroy a peer's endpoint and fail its orders; reads on it end when the transport says so."""
        self._peers.lose(number, detail, tell=tell)
        for intake in [i for i in self._orders.values() if i.spec.peer == number]:
            self._fail(intake, reason, detail)
        for intake in self._reads.values():
            if intake.spec.peer == number:
                for reading in intake.reads.values():
                    reading.deadline = math.inf

    # -- time --

    def _deadline(self, intake: Intake) -> float:
        if intake.stage is Stage.FINISHED:
            return intake.expires_at  # what is left are reads, and each has its own time
        is_placed = intake.stage is Stage.PLACED
        silence_s = self._config.accept_timeout_s if is_placed else self._config.progress_timeout_s
        return min(intake.expires_at, intake.last_progress + silence_s)

    def _expire(self) -> None:
        now = self._clock.now()
        for read_id, intake in list(self._reads.items()):
            reading = intake.reads[read_id]
            if reading.deadline <= now:
                self.counters.fences += 1
                detail = f"a read of {reading.extent.num_tokens} tokens took over {self._config.read_timeout_s} s"
                if not intake.ended:
                    self._fail(intake, "read_timeout", detail)
                self._lose(intake.spec.peer, "peer_lost", detail)
        for intake in list(self._orders.values()):
            if intake.order_id in self._orders and self._deadline(intake) <= now:
                if intake.expires_at <= now:
                    self._fail(intake, "deadline", "the order's own time is over")
                elif intake.stage is Stage.PLACED:
                    self._fail(intake, "accept_timeout", "the order was not accepted in time")
                else:
                    self._fail(intake, "progress_timeout", f"silence in stage {intake.stage.value}")
