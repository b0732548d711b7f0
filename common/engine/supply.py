"""The owner's side of a hand-off: orders from readers, run like any sequence, published as they advance.

    order -> accepted (queued) -> started (blocks reserved, lease open) -> extents -> finished
         `-> failed, at any point

A finished order's blocks belong to its lease alone: only the reader's release or the lease's own time
frees them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.engine.media import Media, media_hashes, outside
from common.engine.messages import ReaderEvent
from common.engine.outbox import Outbox
from common.engine.request_checks import ModelLimits
from common.engine.scheduler import Scheduler
from common.engine.sequence import OrderState, Phase, Sequence
from common.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    LeaseLostError,
    NanoDeployError,
    OverloadedError,
    UnavailableError,
    UnsupportedError,
)
from common.kvcache.manager import PrefixHit
from common.kvtransfer.leases import Leases
from common.kvtransfer.orders import (
    OrderAccepted,
    OrderEvent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PlaceOrder,
)
from common.kvtransfer.publish import Publisher, PublishOrder
from common.types import Clock, Failure, SamplingParams
from common.types.prefix import TOKEN_NBYTES, root_hash

_NO_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)


@dataclass(frozen=True)
class SupplyParts:
    limits: ModelLimits
    scheduler: Scheduler
    media: Media
    leases: Leases
    publisher: Publisher
    outbox: Outbox
    clock: Clock


class Supply:
    """Owns the orders of one engine, by (reader, order id). `next_id` gives sequence ids."""

    def __init__(self, parts: SupplyParts, next_id: Callable[[], int]) -> None:
        self._p = parts
        self._next_id = next_id
        self._open: dict[tuple[int, int], Sequence] = {}
        self.draining = False
        self.failed: dict[str, int] = {}
        self.finished = 0

    def order(self, message: PlaceOrder) -> None:
        """Accept an order or answer it with one failure."""
        try:
            token_ids = self._check(message)
        except NanoDeployError as error:
            self._answer_failed(message.peer, message.order_id, error)
            return
        seq = self._sequence(message, token_ids)
        seq.embeds = self._p.media.open(message.embeddings, lambda error: self.fail(seq, error))
        queue_tokens = sum(s.gap for s in (*self._p.scheduler.waiting, *self._p.scheduler.running))
        self._open[message.peer, message.order_id] = seq
        self._p.scheduler.add(seq)
        self._tell(seq, OrderAccepted(message.order_id, len(token_ids), queue_tokens))

    def started(self, seq: Sequence, hit: PrefixHit) -> None:
        """Blocks are reserved: open the lease and publish what the prefix cache had."""
        order = seq.order
        assert order is not None
        order.started_at = self._p.clock.now()
        order.lease_id = self._p.leases.open(seq.label)
        order.num_published = order.start_position
        self._tell(seq, OrderStarted(order.order_id, order.lease_id, hit.num_tokens))
        with contextlib.suppress(LeaseLostError):  # digesting took that long: `advanced` meets it and fails the order
            self._publish(seq)

    def launched(self, seq: Sequence, start: int, end: int) -> None:
        """A step that computes positions [start, end) of an order is under way: so are the digests of what it ends."""
        self._p.publisher.launch(self._what(seq), start, end)

    def advanced(self, seq: Sequence) -> None:
        """More of the prompt is computed: publish it, and finish at its end."""
        try:
            self._publish(seq)
        except NanoDeployError as error:  # the lease ran out while the prompt was computed
            self.fail(seq, error)
            return
        if seq.gap:
            return
        order = seq.order
        assert order is not None
        now = self._p.clock.now()
        self._tell(
            seq,
            OrderFinished(
                order.order_id,
                order.lease_id,
                seq.num_tokens - order.start_position,
                (order.started_at - order.accepted_at) * 1e3,
                (now - order.started_at) * 1e3,
            ),
        )
        self.finished += 1
        self._close(seq)

    def broken(self, seq: Sequence, reason: str) -> None:
        """The model gave no numbers at the end of a prompt: see `Requests.broken`."""
        self._p.scheduler.forget(seq)
        self.fail(seq, InternalError(reason))

    def fail(self, seq: Sequence, error: NanoDeployError) -> None:
        """End an order with a failure; its lease goes with it."""
        order = seq.order
        assert order is not None
        self._close(seq)
        if order.lease_id:
            self._p.leases.release(order.lease_id)
        self._answer_failed(order.reader, order.order_id, error)

    def cancel(self, reader: int, order_id: int) -> None:
        """The reader dropped an order; unknown and ended ones are ignored."""
        seq = self._open.get((reader, order_id))
        if seq is not None:
            self._drop(seq)

    def release(self, lease_id: int) -> None:
        """The reader has verified all it needs of a lease, or gave it up."""
        self._p.leases.release(lease_id)

    def release_all(self) -> None:
        """End every open lease: nobody is left to read."""
        for lease in self._p.leases.snapshot():
            self._p.leases.release(lease.lease_id)

    def reader_gone(self, reader: int) -> None:
        """A session broke: its orders end; published blocks stay until their lease runs out."""
        for seq in [s for (r, _), s in self._open.items() if r == reader]:
            self._close(seq)

    def expire(self) -> None:
        """End leases and orders whose time is over."""
        self._p.leases.expire()
        now = self._p.clock.now()
        for seq in [s for s in self._open.values() if s.deadline <= now]:
            self.fail(seq, DeadlineExceededError("the order ran out of time before its prompt was computed"))

    @property
    def next_deadline(self) -> float:
        orders = min((s.deadline for s in self._open.values()), default=math.inf)
        lease = self._p.leases.next_deadline()
        return min(orders, math.inf if lease is None else lease)

    def _publish(self, seq: Sequence) -> None:
        order = seq.order
        assert order is not None
        if seq.num_computed <= order.num_published:
            return
        for extent in self._p.publisher.publish(self._what(seq), order.num_published, seq.num_computed):
            self._p.leases.extend(order.lease_id, extent.group, extent.block_ids)
            self._tell(seq, extent)
        order.num_published = seq.num_computed

    def _what(self, seq: Sequence) -> PublishOrder:
        order = seq.order
        assert order is not None
        return PublishOrder(
            seq_id=seq.seq_id,
            order_id=order.order_id,
            lease_id=order.lease_id,
            token_ids=seq.token_ids,
            chain=seq.chain,
            start_position=order.start_position,
            media=seq.media,
        )

    def _drop(self, seq: Sequence) -> None:
        self._close(seq)
        assert seq.order is not None
        if seq.order.lease_id:
            self._p.leases.release(seq.order.lease_id)

    def _close(self, seq: Sequence) -> None:
        assert seq.order is not None
        self._p.publisher.forget(seq.seq_id)
        self._p.scheduler.finish(seq)
        self._p.media.close(seq.embeds)
        self._open.pop((seq.order.reader, seq.order.order_id), None)

    def _tell(self, seq: Sequence, event: OrderEvent) -> None:
        assert seq.order is not None
        self._p.outbox.send(ReaderEvent(seq.order.reader, event))

    def _answer_failed(self, reader: int, order_id: int, error: NanoDeployError) -> None:
        self.failed[error.code] = self.failed.get(error.code, 0) + 1
        self._p.outbox.send(ReaderEvent(reader, OrderFailed(order_id, Failure.of(error))))

    def _sequence(self, message: PlaceOrder, token_ids: list[int]) -> Sequence:
        now = self._p.clock.now()
        seq_id = self._next_id()
        return Sequence(
            seq_id=seq_id,
            slot=0,
            choice=0,
            label=message.request_id,
            token_ids=token_ids,
            num_prompt=len(token_ids),
            sampling=_NO_SAMPLING,
            stop_ids=frozenset(),
            chain=[root_hash(self._p.limits.model_hash, message.adapter_id, message.cache_salt)],
            priority=message.priority,
            arrival=seq_id,
            deadline=now + message.remaining_s if message.remaining_s > 0 else math.inf,
            order=OrderState(message.peer, message.order_id, message.start_position, now),
            phase=Phase.WAITING,
            media=media_hashes(message.embeddings),
        )

    def _check(self, message: PlaceOrder) -> list[int]:
        """The order's token ids, or what is wrong with it."""
        limits, n = self._p.limits, message.num_tokens
        if self.draining:
            raise UnavailableError("the worker is draining")
        if (message.peer, message.order_id) in self._open:
            raise InternalError(f"order {message.order_id} exists already")
        if len(self._p.scheduler.waiting) >= limits.max_waiting_seqs:
            raise OverloadedError(f"{limits.max_waiting_seqs} orders wait already")
        if len(message.packed_tokens) % TOKEN_NBYTES:
            raise InvalidRequestError(
                f"packed_tokens has {len(message.packed_tokens)} bytes, which are no whole token ids"
            )
        if not 0 < n <= limits.max_model_len:
            raise InvalidRequestError(f"the prompt has {n} tokens; 1 to {limits.max_model_len} are possible")
        if not 0 <= message.start_position < n:
            raise InvalidRequestError(f"start_position {message.start_position} is outside the prompt of {n} tokens")
        if message.adapter_id:
            raise UnsupportedError("adapters are not supported by this worker")
        token_ids = message.token_ids
        self._p.media.check(message.embeddings, token_ids)
        text_T = np.frombuffer(message.packed_tokens, "<i4")
        if message.embeddings:
            text_T = np.array(outside(token_ids, message.embeddings), np.int32)
        if text_T.size and not 0 <= text_T.min() <= text_T.max() < limits.vocab_size:
            raise InvalidRequestError(f"a token id is outside the vocabulary of {limits.vocab_size}")
        return token_ids
