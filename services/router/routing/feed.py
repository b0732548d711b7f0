"""Follows what workers' prefix caches hold, and keeps the board's table equal to it.

    DEGRADED (nothing known, or a gap) -> snapshot, or our digest is the worker's -> EXACT -> batches ...
       ^ a gap in seq, a digest that differs, silence, a lost connection: asked again with our digest |
       `--------------------------------------------------------------------------------------------'

While a worker is DEGRADED the table has what was heard of it last, and the board remembers what it sent there itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, Protocol

from common.errors import NanoDeployError, UnavailableError
from common.rpc.client import Backoff
from common.rpc.codec import ChangeKind, KvBatch
from common.rpc.membership import MembershipChange
from common.rpc.tasks import end_tasks
from common.telemetry import get_logger
from common.types import Role, WorkerRef, WorkerState
from common.types.prefix import hash_keys, keys_digest
from services.router.routing.board import Board, Members

MAX_PAUSE_S: Final = 30.0

_log = get_logger(__name__)


class KvPeer(Protocol):
    """A worker as one who tells what it holds."""

    def watch(self, epoch: int, digest: int | None) -> AsyncGenerator[KvBatch, None]:
        """Batches; an error of the tree when the stream breaks or is silent for too long."""
        ...

    async def close(self) -> None: ...


class GapError(Exception):
    """Something was missed."""


class Follower:
    """What is known of one worker. `apply` raises `GapError` when a batch does not follow the one before."""

    def __init__(self, board: Board, ref: WorkerRef) -> None:
        self._board = board
        self.ref = ref
        self._seq: int | None = None  # None: the next batch begins anew
        self._parts_left = 0
        self._taken = 0  # digest of what was applied
        self._num_held = 0  # blocks and states that the worker holds
        self._whole = False  # the table had room for all of it
        self.digest: int | None = None  # None: not whole
        self.resyncs = -1  # snapshots after the first

    def restart(self) -> None:
        """The stream broke: the next one's first batch says whether anything was missed."""
        self._seq = None
        self._set_exact(False)

    def apply(self, batch: KvBatch) -> None:
        seat = self._board.seat(self.ref)
        if seat is None:
            raise UnavailableError(f"worker {self.ref.worker_id} is no longer a member")
        if batch.reset:
            self._board.renew(seat)
            self._taken, self._num_held, self._seq, self._whole = 0, 0, batch.seq, True
            self.resyncs += 1
        elif self._seq is None:
            if self.digest != batch.digest:
                raise GapError("the worker holds other blocks")
            self._seq = batch.seq
        elif batch.steps and not self._part_of(batch):
            raise GapError(f"seq {batch.seq} after {self._seq}")
        self._seq = batch.seq
        for step in batch.steps:
            keys = hash_keys(step.hashes)
            self._taken ^= keys_digest(keys, states=step.states)
            if step.states:
                self._board.note_states(seat)
            if step.stored:
                self._num_held += len(keys)
                self._whole &= self._board.table.store(seat.bit, keys, states=step.states)
            else:
                self._num_held -= len(keys)
                self._board.table.remove(seat.bit, keys, states=step.states)
        self._parts_left = batch.parts_left
        if batch.parts_left:
            self.digest = None
            return
        if self._taken != batch.digest:
            self.digest = None
            raise GapError("the digests differ")
        self.digest = self._taken
        if not self._whole and self._board.table.room > self._num_held:
            self.digest = None
            raise GapError("the table has room again for all that the worker holds")
        self._set_exact(self._whole)

    def _part_of(self, batch: KvBatch) -> bool:
        assert self._seq is not None
        return batch.seq == self._seq + 1 or (self._parts_left > 0 and batch.seq == self._seq)

    def _set_exact(self, exact: bool) -> None:
        if (seat := self._board.seat(self.ref)) is not None:
            self._board.set_exact(seat, exact)


class Feeds:
    """A task per worker. `connect` gives what its stream is read from. Life: start -> stop."""

    def __init__(
        self, members: Members, board: Board, connect: Callable[[WorkerRef], KvPeer], rng: random.Random
    ) -> None:
        self._members = members
        self._board = board
        self._connect = connect
        self._rng = rng
        self._tasks: dict[WorkerRef, asyncio.Task[None]] = {}
        self._followers: dict[WorkerRef, Follower] = {}
        self._stopped = False

    def start(self) -> None:
        self._members.subscribe(self._on_change)

    async def stop(self) -> None:
        self._stopped = True
        await end_tasks(list(self._tasks.values()))
        self._tasks.clear()

    @property
    def resyncs(self) -> int:
        """Snapshots that were needed after a worker's first."""
        return sum(max(follower.resyncs, 0) for follower in self._followers.values())

    def _on_change(self, change: MembershipChange) -> None:
        worker = change.worker
        if self._stopped or worker.role not in (Role.DECODE, Role.PREFILL):
            return
        if change.kind is ChangeKind.REMOVED:
            self._followers.pop(worker.ref, None)
            if (task := self._tasks.pop(worker.ref, None)) is not None:
                task.cancel()
        elif worker.ref not in self._tasks and worker.state is not WorkerState.STARTING:
            follower = self._followers[worker.ref] = Follower(self._board, worker.ref)
            self._tasks[worker.ref] = asyncio.create_task(self._follow(follower), name=f"kv-{worker.ref.worker_id}")

    async def _follow(self, follower: Follower) -> None:
        """Until the worker is removed. A worker that does not tell is asked ever more seldom."""
        peer, backoff = self._connect(follower.ref), Backoff(self._rng, max_s=MAX_PAUSE_S)
        try:
            while True:
                try:
                    async with aclosing(peer.watch(follower.ref.epoch, follower.digest)) as batches:
                        async for batch in batches:
                            follower.apply(batch)
                            backoff.reset()
                except GapError as gap:
                    _log.info("prefix index resync", worker_id=follower.ref.worker_id, reason=str(gap))
                except NanoDeployError as error:
                    _log.debug("prefix index lost", worker_id=follower.ref.worker_id, error=error.message)
                except Exception:  # noqa: BLE001 - the edge of a task
                    _log.exception("following a prefix cache failed", worker_id=follower.ref.worker_id)
                follower.restart()
                await asyncio.sleep(backoff.next_s())
        finally:
            await peer.close()
