"""Sessions with prefill workers: one bidirectional stream for each, kept open, reopened when asked for.

    absent -> CONNECTING -> READY -> LOST          (stream broke, peer silent, or the engine fenced it off)
                        `-> REFUSED                 (layouts do not convert, wrong epoch)
    LOST, REFUSED -> CONNECTING                     at the next request, after a back-off

A session gets a new peer number each time, so nothing late of an old one can be taken for the new one's.

A session is with one epoch of a worker. Routers learn of a restart at different times, and an epoch does not tell
which of two is newer: the worker does, it turns the other away. So a request that names another epoch gets a session
beside the one there is, and only one that becomes READY ends the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from common.config import HandoffConfig
from common.engine.messages import PeerComputes, PeerEvent, PeerGone, PeerReady, ToEngine
from common.errors import LayoutMismatchError, NanoDeployError
from common.kvcache.layout import KVLayout
from common.kvtransfer.orders import DropOrder, PeerVerdict, PlaceOrder, ReleaseLease
from common.rpc import codec
from common.rpc.client import open_channel
from common.rpc.status import error_from_rpc
from common.telemetry import get_logger
from common.types import Clock, WorkerRef
from nanodeploy.v1 import prefill_pb2 as pb
from nanodeploy.v1 import prefill_pb2_grpc as pb_grpc

log = get_logger(__name__)

PING_S = 2.0
SILENCE_S = 6.0
CONNECT_S = 3.0
BACKOFF_S = (0.2, 5.0)
FORGET_S = 600.0  # a worker that nobody asked for is forgotten after this long


@dataclass(eq=False)
class Session:
    ref: WorkerRef
    peer: int = 0
    state: str = "connecting"
    detail: str = ""
    transport: str = ""
    failures: int = 0
    retry_at: float = 0.0
    heard_at: float = 0.0
    steps: int | None = None  # of its engine, as it said last
    layout: KVLayout | None = None  # of its engine, once it is welcome
    task: asyncio.Task[None] | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    outgoing: asyncio.Queue[pb.SessionRequest | None] = field(default_factory=asyncio.Queue)


class PrefillSessions:
    """All sessions of one decode worker. `identity` gives our own ref and layout for each hello."""

    def __init__(
        self,
        config: HandoffConfig,
        identity: Callable[[], tuple[WorkerRef, KVLayout]],
        send: Callable[[ToEngine], None],
        clock: Clock,
    ) -> None:
        self._config = config
        self._identity = identity
        self._send = send
        self._clock = clock
        self._numbers = itertools.count(1)
        self._sessions: dict[tuple[str, int], Session] = {}  # by worker and its epoch
        self._by_peer: dict[int, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ensure(self, ref: WorkerRef) -> int:
        """The peer number of a ready session, or 0 when there is none to be had soon.

        Only the first attempt with a worker is waited for: while a lost one is tried again, requests go on.
        """
        session = self._sessions.get((ref.worker_id, ref.epoch))
        if session is None:
            self._forget_old()
            session = self._sessions[ref.worker_id, ref.epoch] = Session(ref)
        if session.task is None:
            if self._clock.now() < session.retry_at:
                return 0
            self._open(session)
        if session.state == "connecting" and not session.failures:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.settled.wait(), CONNECT_S)
        return session.peer if session.state == "ready" else 0

    def place(self, command: PlaceOrder | DropOrder | ReleaseLease) -> None:
        """Send the engine's command to its peer; a lost peer's are dropped (PeerGone was said)."""
        session = self._by_peer.get(command.peer)
        if session is None:
            return
        match command:
            case PlaceOrder():
                message = codec.order_to_proto(command)
            case DropOrder():
                message = pb.SessionRequest(cancel=pb.PrefillCancel(order_id=command.order_id))
            case ReleaseLease():
                message = pb.SessionRequest(release=pb.LeaseRelease(lease_id=command.lease_id))
        session.outgoing.put_nowait(message)

    def verdict(self, verdict: PeerVerdict) -> None:
        """What the engine says of a peer after comparing layouts or fencing it off."""
        session = self._by_peer.get(verdict.peer)
        if session is None:
            return
        session.transport, session.detail = verdict.transport, verdict.detail
        if verdict.state == "ready":
            session.state, session.failures = "ready", 0
            session.settled.set()
            self._end_others(session)
        else:
            session.state = verdict.state
            if session.task is not None:
                session.task.cancel()

    def statuses(self) -> list[Session]:
        """One of each worker: the ready one, else the last that was asked for."""
        shown: dict[str, Session] = {}
        for session in self._sessions.values():
            before = shown.get(session.ref.worker_id)
            if before is None or before.state != "ready":
                shown[session.ref.worker_id] = session
        return list(shown.values())

    def reset(self, reason: str) -> None:
        """Our engine died, and with it all it had connected to: sessions start anew when asked for."""
        for session in self._sessions.values():
            self._end(session, reason)

    async def close(self, reason: str = "shutting down") -> None:
        self.reset(reason)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sessions.clear()

    def _open(self, session: Session) -> None:
        session.peer = next(self._numbers)
        session.state, session.detail, session.steps, session.layout = "connecting", "", None, None
        session.settled = asyncio.Event()
        session.outgoing = asyncio.Queue()
        self._by_peer[session.peer] = session
        session.task = asyncio.get_running_loop().create_task(self._converse(session))
        self._tasks.add(session.task)
        session.task.add_done_callback(lambda task: self._ended(session, task))

    def _end(self, session: Session, reason: str) -> None:
        if session.task is not None:
            session.detail = reason
            session.task.cancel()

    def _end_others(self, ready: Session) -> None:
        """The worker took this epoch for its own: sessions with its earlier ones are over."""
        for key, session in list(self._sessions.items()):
            if session.ref.worker_id == ready.ref.worker_id and session is not ready:
                del self._sessions[key]
                self._end(session, "the worker has a new epoch")

    def _ended(self, session: Session, task: asyncio.Task[None]) -> None:
        """A session is over; whatever ended it, the engine hears of it once."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            session.detail = session.detail or "closed"
        elif isinstance(error, NanoDeployError):
            session.detail = error.message
        elif error is not None:
            log.error("prefill session failed", peer=session.ref.worker_id, exc_info=error)
            session.detail = f"{type(error).__name__} in the session"
        else:
            session.detail = "the prefill worker ended the session"
        if session.state != "refused":
            session.state = "refused" if isinstance(error, LayoutMismatchError) else "lost"
        session.task = None
        session.failures += 1
        low, high = BACKOFF_S
        session.retry_at = self._clock.now() + min(low * 2 ** min(session.failures - 1, 16), high)
        del self._by_peer[session.peer]
        session.settled.set()
        self._send(PeerGone(session.peer, session.detail))
        log.info("prefill session ended", peer=session.ref.worker_id, state=session.state, reason=session.detail)

    def _forget_old(self) -> None:
        now = self._clock.now()
        for key, session in list(self._sessions.items()):
            if session.task is None and now - session.retry_at > FORGET_S:
                del self._sessions[key]

    async def _converse(self, session: Session) -> None:
        """One session from hello to its end."""
        me, layout = self._identity()
        outgoing = session.outgoing
        async with open_channel(session.ref.address) as channel:
            stub: Any = pb_grpc
            call = stub.PrefillServiceStub(channel).Session(self._requests(session, me, layout))
            watchdog = asyncio.create_task(self._watch(session, call))
            try:
                await self._receive(session, call)
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error) from error
            finally:
                watchdog.cancel()
                call.cancel()
                outgoing.put_nowait(None)  # of a call that the peer ended, gRPC would wait for messages for ever

    async def _requests(self, session: Session, me: WorkerRef, layout: KVLayout) -> AsyncIterator[pb.SessionRequest]:
        yield codec.hello_to_proto(codec.Hello(me, layout, self._config.transports, session.ref.epoch))
        while (message := await session.outgoing.get()) is not None:
            yield message

    async def _receive(self, session: Session, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        session.heard_at = self._clock.now()
        async for message in call:
            session.heard_at = self._clock.now()
            if message.HasField("batch"):
                for response in message.batch.responses:
                    self._take(session, response)
            else:
                self._take(session, message)

    def _take(self, session: Session, response: pb.SessionResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "welcome":
            welcome = codec.welcome_from_proto(response.welcome)
            session.layout = welcome.layout
            self._send(PeerReady(session.peer, welcome.owner, welcome.layout, welcome.endpoints, welcome.lease_ttl_s))
        elif kind == "pong":
            if session.steps not in (None, response.pong.steps):
                self._send(PeerComputes(session.peer))
            session.steps = response.pong.steps
        elif kind is not None and session.layout is not None:
            self._send(PeerEvent(session.peer, codec.order_event_from_proto(response, session.layout)))

    async def _watch(self, session: Session, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """A peer that does not answer pings is gone, however open its socket is."""
        for nonce in itertools.count(1):
            await asyncio.sleep(PING_S)
            if self._clock.now() - session.heard_at > SILENCE_S:
                session.detail = f"silent for {SILENCE_S:.0f} s"
                call.cancel()
                return
            session.outgoing.put_nowait(pb.SessionRequest(ping=pb.SessionPing(nonce=nonce)))
