"""Places requests on workers and keeps them going: one link per decode worker, moves when a worker is lost.

    start(request) -> PLACING: choose a pair, submit -> RUNNING -> done
                         ^  overloaded or unreachable: the next worker   | lost
                         `-----------------------------------------------'

Everything it needs of the world is an argument: the members, how to reach a worker, the clock, the random source.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from functools import partial
from typing import Final

from common.errors import (
    CancelledByCallerError,
    InternalError,
    KVTransferError,
    NanoDeployError,
    OverloadedError,
    UnavailableError,
)
from common.rpc.codec import ChangeKind
from common.rpc.membership import MembershipChange
from common.telemetry import get_logger
from common.types import Clock, GenerationRequest, Role, WorkerInfo, WorkerRef, WorkerState
from services.router.contract import DecodePeer
from services.router.generation import Courier, Generation, Mailbox
from services.router.link import WorkerLink
from services.router.routing.board import NO_HINTS, Board, Hints, Members, Ticket

MAX_PLACEMENTS: Final = 8  # workers that one request is sent to, before it is given up
MAX_DEATHS: Final = 2  # engines that may die under it: with one more it passes for what kills them
_MOVABLE = (UnavailableError, OverloadedError, CancelledByCallerError, KVTransferError, InternalError)

_log = get_logger(__name__)


class Relay:
    """Life: (made inside a running loop) -> start(request) ... -> close."""

    def __init__(
        self,
        members: Members,
        connect: Callable[[WorkerRef], DecodePeer],
        board: Board,
        *,
        clock: Clock,
        rng: random.Random,
        connect_timeout_s: float,
        resume_wait_s: float,
    ) -> None:
        self._members = members
        self._connect = connect
        self.board = board
        self._clock = clock
        self._rng = rng
        self._connect_timeout_s = connect_timeout_s
        self._resume_wait_s = resume_wait_s
        self._links: dict[WorkerRef, WorkerLink] = {}
        self._loop = asyncio.get_running_loop()
        self._changed: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[Generation] = set()
        self.courier = Courier(clock)
        self.moves = 0  # requests taken to another worker since start
        members.subscribe(self._on_change)

    # -- requests --

    def start(
        self, request: GenerationRequest, mailbox: Mailbox, index: int = 0, hints: Hints = NO_HINTS
    ) -> Generation:
        """Begin; tokens and failures arrive in the mailbox. Never blocks."""
        generation = Generation(request, mailbox, index, hints)
        self._running.add(generation)
        self._loop.call_soon(self._place_first, generation)  # all of a tick in a row, which is faster
        return generation

    def _place_first(self, generation: Generation) -> None:
        if not generation.done and not self._place_at_once(generation):
            self._spawn(self._place(generation, set(), None))

    def _place_at_once(self, generation: Generation) -> bool:
        """The usual case, for which a task would be too much: the worker chosen has a working stream.

        False: not done, or not possible; `_place` will find out what is wrong, and deals with it.
        """
        try:
            ticket = self._choose(generation, set())
            decode, prefill = ticket.choice.decode.worker.ref, ticket.choice.prefill
            link = self._link(decode)
            if not link.attached:
                return False
            link.begin(generation, prefill.worker.ref if prefill else None, partial(self._answered, generation, decode))
        except Exception:  # noqa: BLE001 - it comes again in `_place`, whose task is where it ends
            return False
        _note_placement(generation, ticket)
        return True

    def _answered(self, generation: Generation, decode: WorkerRef, error: NanoDeployError | None) -> None:
        """What became of `_place_at_once`."""
        if error is None or generation.done:
            return
        if isinstance(error, OverloadedError | UnavailableError):
            self._spawn(self._place(generation, {decode}, error))
        else:
            generation.fail(error)

    def finish(self, generation: Generation) -> None:
        """The caller is done with it: whatever still runs is cancelled."""
        generation.cancel()
        _end_ticket(generation)
        self._running.discard(generation)

    async def _place(
        self, generation: Generation, tried: set[WorkerRef], last: NanoDeployError | None, wait_s: float = 0.0
    ) -> None:
        """Try workers until one takes the request; wait for a new one for `wait_s` if there is none.

        `last` is why it needs a place: said when none is found.
        """
        until_s = self._clock.now() + wait_s
        while not generation.done:
            try:
                ticket = self._choose(generation, tried)
            except NanoDeployError as error:
                if await self._changed_before(until_s):
                    tried &= self._ready_refs()  # one that refused while it started may be tried when it is ready
                    if generation.lost_on is not None and self._is_attached(generation.lost_on):
                        tried.discard(generation.lost_on)  # it is back
                    continue
                generation.fail(last or error)
                return
            _note_placement(generation, ticket)
            if generation.placements > MAX_PLACEMENTS:
                generation.fail(last or UnavailableError("no worker kept the request"))
                return
            decode, prefill = ticket.choice.decode.worker.ref, ticket.choice.prefill
            try:
                await self._link(decode).submit(generation, prefill.worker.ref if prefill else None)
                return
            except (OverloadedError, UnavailableError) as error:
                tried.add(decode)
                last = error
            except NanoDeployError as error:
                generation.fail(error)
                return
            except Exception as error:  # noqa: BLE001 - the edge of a task
                _log.exception("placing failed", request_id=generation.request.request_id)
                generation.fail(InternalError(f"the router could not place the request: {type(error).__name__}"))
                return

    def _choose(self, generation: Generation, tried: set[WorkerRef]) -> Ticket:
        """Workers with a working stream first; one whose stream is being taken up if there is no other."""
        _end_ticket(generation)
        request, hints = generation.to_resume(), generation.hints
        unattached = {ref for ref, link in self._links.items() if not link.attached}
        try:
            ticket = self.board.place(request, hints, tried | unattached)
        except UnavailableError:
            gone = {ref for ref, link in self._links.items() if link.restarted}
            ticket = self.board.place(request, hints, tried | gone)
        generation.ticket = ticket
        return ticket

    def _ready_refs(self) -> set[WorkerRef]:
        return {worker.ref for worker in self._members.workers.values() if worker.state is WorkerState.READY}

    async def _changed_before(self, until_s: float) -> bool:
        """Wait for a change of members; False when the time is over."""
        left = until_s - self._clock.now()
        if left <= 0:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await asyncio.shield(self._changed)
        return self._clock.now() < until_s

    def _on_lost(self, generation: Generation, error: NanoDeployError, forgotten: bool) -> None:
        """A link gave a request up: move it, or tell the client if moving cannot help.

        A worker that was lost, its engine too, may be on its way back under another epoch: if there is no other,
        that is waited for. One that has only forgotten the request may take it again.
        """
        if generation.done:
            return
        if not isinstance(error, _MOVABLE):
            generation.fail(error)
            return
        lost = generation.lost_on
        if isinstance(error, InternalError) and generation.placements > 1:
            generation.fail(error)  # two engines failed on it: the request is at fault
            return
        if generation.deaths > MAX_DEATHS:
            generation.fail(error)
            return
        self.moves += 1
        _log.warning(
            "request moves to another worker",
            request_id=generation.request.request_id,
            why=error.message,
            sent_tokens=sum(map(len, generation.sent)),
        )
        wait_s = self._resume_wait_s if isinstance(error, UnavailableError) else 0.0
        self._spawn(self._place(generation, {lost} if lost and not forgotten else set(), error, wait_s))

    # -- workers --

    @property
    def attached(self) -> int:
        """Decode workers with a working stream."""
        return sum(link.attached for link in self._links.values())

    def ready(self, worker: WorkerInfo) -> bool:
        """Whether requests can be sent to it now."""
        return worker.state is WorkerState.READY and self._is_attached(worker.ref)

    def _others_ready(self, ref: WorkerRef) -> bool:
        mine = self._members.workers.get(ref.worker_id)
        return any(
            w.role is Role.DECODE
            and w.ref != ref
            and self.ready(w)
            and (mine is None or w.model.name == mine.model.name)
            for w in self._members.workers.values()
        )

    def _on_change(self, change: MembershipChange) -> None:
        worker = change.worker
        if worker.role is not Role.DECODE:
            return
        if change.kind is ChangeKind.REMOVED and (link := self._links.get(worker.ref)) is not None:
            _log.info("decode worker left", worker_id=worker.ref.worker_id, reason=change.reason)
            link.retire()
        self._sweep()
        if change.kind is not ChangeKind.REMOVED and worker.state is not WorkerState.STARTING:
            self._link(worker.ref).keep()
        self._wake()

    def _on_attached(self) -> None:
        """One more worker has a stream: for those that wait for a place, and those that wait for others' streams."""
        for link in self._links.values():
            link.hurry()
        self._wake()

    def _wake(self) -> None:
        self._changed.set_result(None)
        self._changed = self._loop.create_future()

    def _is_attached(self, ref: WorkerRef) -> bool:
        link = self._links.get(ref)
        return link is not None and link.attached

    def _link(self, ref: WorkerRef) -> WorkerLink:
        link = self._links.get(ref)
        if link is None:
            link = self._links[ref] = WorkerLink(
                ref,
                self._connect(ref),
                clock=self._clock,
                rng=self._rng,
                connect_timeout_s=self._connect_timeout_s,
                on_lost=self._on_lost,
                others_ready=self._others_ready,
                on_attached=self._on_attached,
            )
        return link

    def _sweep(self) -> None:
        """Links that are over; one to a restarted worker stays while the members still name the old process."""
        named = {worker.ref for worker in self._members.workers.values()}
        for ref, link in list(self._links.items()):
            if link.over and not (link.restarted and ref in named):
                del self._links[ref]
                self._spawn(link.close())

    def _spawn(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for generation in list(self._running):
            generation.fail(UnavailableError("the router is stopping"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._links.clear()


def _end_ticket(generation: Generation) -> None:
    if generation.ticket is not None:
        generation.ticket.end(sum(map(len, generation.sent)))
        generation.ticket = None


def _note_placement(generation: Generation, ticket: Ticket) -> None:
    generation.placements += 1
    if ticket.explained is not None:
        generation.routes.append(ticket.explained)
