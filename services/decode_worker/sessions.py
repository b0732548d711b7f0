"""Sessions with prefill workers: one bidirectional stream for each, kept open, reopened when asked for.

    absent -> CONNECTING -> READY -> LOST          (stream broke, peer silent, or the engine fenced it off)
                        `-> REFUSED                 (layouts do not convert, wrong epoch)
    LOST, REFUSED -> CONNECTING                     at the next request, after a back-off

A session gets a new peer number each time, so nothing late of an old one can be taken for the new one's.
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
from common.engine.messages import PeerEvent, PeerGone, PeerReady, ToEngine
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
        self._by_worker: dict[str, Session] = {}
        self._by_peer: dict[int, Session] = {}

    async def ensure(self, ref: WorkerRef) -> int:
        """The peer number of a ready session, or 0 when there is none to be had soon."""
        session = self._by_worker.get(ref.worker_id)
        if session is None or session.ref.epoch != ref.epoch:
            if session is not None:
                await self._end(session, "the worker has a new epoch")
            session = self._by_worker[ref.worker_id] = Session(ref)
        if session.task is None:
            if self._clock.now() < session.retry_at:
                return 0
            self._open(session)
        if session.state == "connecting":
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
        else:
            session.state = verdict.state
            if session.task is not None:
                session.task.cancel()

    def statuses(self) -> list[Session]:
        return list(self._by_worker.values())

    def reset(self, reason: str) -> None:
        """Our engine died, and with it all it had connected to: sessions start anew when asked for."""
        for session in self._by_worker.values():
            if session.task is not None:
                session.detail = reason
                session.task.cancel()

    async def close(self, reason: str = "shutting down") -> None:
        for session in list(self._by_worker.values()):
            await self._end(session, reason)

    def _open(self, session: Session) -> None:
        session.peer = next(self._numbers)
        session.state, session.detail = "connecting", ""
        session.settled = asyncio.Event()
        session.outgoing = asyncio.Queue()
        self._by_peer[session.peer] = session
        session.task = asyncio.get_running_loop().create_task(self._run(session))

    async def _end(self, session: Session, reason: str) -> None:
        if session.task is not None:
            session.detail = reason
            session.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await session.task
        self._by_worker.pop(session.ref.worker_id, None)

    async def _run(self, session: Session) -> None:
        """One session from hello to its end; whatever ends it, the engine hears of it once."""
        reason = "closed"
        try:
            await self._converse(session)
            reason = "the prefill worker ended the session"
        except asyncio.CancelledError:
            reason = session.detail or "closed"
        except LayoutMismatchError as error:
            session.state, reason = "refused", error.message
        except NanoDeployError as error:
            reason = error.message
        finally:
            if session.state != "refused":
                session.state = "lost"
            session.detail = reason
            session.task = None
            session.failures += 1
            low, high = BACKOFF_S
            session.retry_at = self._clock.now() + min(low * 2 ** (session.failures - 1), high)
            self._by_peer.pop(session.peer, None)
            session.settled.set()
            self._send(PeerGone(session.peer, reason))
            log.info("prefill session ended", peer=session.ref.worker_id, state=session.state, reason=reason)

    async def _converse(self, session: Session) -> None:
        me, layout = self._identity()
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

    async def _requests(self, session: Session, me: WorkerRef, layout: KVLayout) -> AsyncIterator[pb.SessionRequest]:
        yield codec.hello_to_proto(codec.Hello(me, layout, self._config.transports, session.ref.epoch))
        while (message := await session.outgoing.get()) is not None:
            yield message

    async def _receive(self, session: Session, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        session.heard_at = self._clock.now()
        owner_layout: KVLayout | None = None
        async for response in call:
            session.heard_at = self._clock.now()
            kind = response.WhichOneof("message")
            if kind == "welcome":
                welcome = codec.welcome_from_proto(response.welcome)
                owner_layout = welcome.layout
                self._send(
                    PeerReady(session.peer, welcome.owner, welcome.layout, welcome.endpoints, welcome.lease_ttl_s)
                )
            elif kind not in ("pong", None) and owner_layout is not None:
                self._send(PeerEvent(session.peer, codec.order_event_from_proto(response, owner_layout)))

    async def _watch(self, session: Session, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """A peer that does not answer pings is gone, however open its socket is."""
        for nonce in itertools.count(1):
            await asyncio.sleep(PING_S)
            if self._clock.now() - session.heard_at > SILENCE_S:
                session.detail = f"silent for {SILENCE_S:.0f} s"
                call.cancel()
                return
            session.outgoing.put_nowait(pb.SessionRequest(ping=pb.SessionPing(nonce=nonce)))
