"""A decode worker's sessions with prefill workers over real servers; its engine and the other side are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rpc_support import eventually
from wire_support import Client, decode, order
from worker_support import ScriptedWorker

from common.engine.messages import PeerComputes, PeerEvent, PeerGone, PeerReady, Submit
from common.errors import LayoutMismatchError, NanoDeployError, UnavailableError
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderEvent,
    OrderFinished,
    OrderStarted,
    PeerVerdict,
    ReleaseLease,
)
from common.rpc import codec
from common.rpc.server import RpcServer, Service
from common.types import WorkerRef
from common.types.prefix import unpack_tokens
from nanodeploy.v1 import prefill_pb2, prefill_pb2_grpc
from services.decode_worker import sessions as sessions_module
from services.prefill_worker.part import PrefillPart

__all__ = ["decode"]


class Owner(prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker that does what it is told to."""

    def __init__(self) -> None:
        self.received: list[prefill_pb2.SessionRequest] = []
        self.to_say: asyncio.Queue[prefill_pb2.SessionResponse | None] = asyncio.Queue()
        self.error: NanoDeployError | None = None
        self.sessions = 0
        self.epoch = 77
        self.strict = False
        self.port = 0

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[prefill_pb2.SessionResponse]:  # noqa: N802
        self.sessions += 1
        if self.error:
            raise self.error
        ready = ScriptedWorker(PrefillPart).ready
        assert ready is not None
        async for first in request_iterator:
            self.received.append(first)
            break
        if self.strict and self.received[-1].hello.expected_epoch != self.epoch:
            raise UnavailableError("this is another epoch of the worker")
        yield codec.welcome_to_proto(codec.Welcome(self.ref, ready.layout, ready.endpoints, 5.0))
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while (message := await self.to_say.get()) is not None:
                yield message
        finally:
            reader.cancel()

    async def _read(self, request_iterator: Any) -> None:
        async for message in request_iterator:
            self.received.append(message)

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef("prefill-0", self.epoch, f"127.0.0.1:{self.port}")

    def kinds(self) -> list[str | None]:
        return [m.WhichOneof("message") for m in self.received]


@asynccontextmanager
async def owner_server() -> AsyncIterator[Owner]:
    owner = Owner()
    stubs: Any = prefill_pb2_grpc
    name = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
    service = Service(name, lambda s: stubs.add_PrefillServiceServicer_to_server(owner, s), lambda: True)
    server = RpcServer([service], host="127.0.0.1", port=0)
    owner.port = await server.start()
    try:
        yield owner
    finally:
        await server.drain(0.0)


async def ready_session(worker: ScriptedWorker, client: Client, owner: Owner) -> int:
    """Submit through the owner until the engine has judged the peer; returns the peer's number."""
    submit = asyncio.create_task(client.submit(prefill=owner.ref))
    count = worker.engine.count(PeerReady)
    peer = await worker.engine.got(PeerReady, count + 1)
    worker.engine.say(PeerVerdict(peer.peer, "ready", "ucx/cma", ""))
    await submit
    number: int = peer.peer
    return number


async def test_orders_go_out_and_events_come_back_on_one_session(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with owner_server() as owner:
        peer = await ready_session(worker, client, owner)
        assert (await worker.engine.got(Submit)).prefill == peer
        worker.engine.say(order(peer))
        worker.engine.say(DropOrder(peer, 9))
        worker.engine.say(ReleaseLease(peer, 1234))
        await eventually(lambda: owner.kinds() == ["hello", "prefill", "cancel", "release"])
        hello, placed = owner.received[0].hello, owner.received[1].prefill
        assert (hello.expected_epoch, list(hello.transports)) == (owner.epoch, ["ucx"])
        assert (placed.order_id, unpack_tokens(placed.packed_tokens), placed.remaining_ms) == (9, [5, 6, 7], 3000)
        events: list[OrderEvent] = [
            OrderAccepted(9, 3, 0),
            OrderStarted(9, 1234, 0),
            OrderFinished(9, 1234, 3, 0.0, 1.0),
        ]
        for event in events:
            owner.to_say.put_nowait(codec.order_event_to_proto(event))
        together = [codec.order_event_to_proto(event) for event in events]
        owner.to_say.put_nowait(prefill_pb2.SessionResponse(batch=prefill_pb2.SessionBatch(responses=together)))
        await worker.engine.got(PeerEvent, 6)
        events += events
        assert [m for m in worker.engine.sent if isinstance(m, PeerEvent)] == [PeerEvent(peer, e) for e in events]
        assert [(p.state, p.transport) for p in worker.part.peers()] == [("ready", "ucx/cma")]
        for steps in (5, 5, 6, 6):
            owner.to_say.put_nowait(prefill_pb2.SessionResponse(pong=prefill_pb2.SessionPong(steps=steps)))
        owner.to_say.put_nowait(codec.order_event_to_proto(events[0]))
        await worker.engine.got(PeerEvent, 7)
        assert [m for m in worker.engine.sent if isinstance(m, PeerComputes)] == [PeerComputes(peer)]
        owner.to_say.put_nowait(None)
        gone = await worker.engine.got(PeerGone)
        assert (gone.peer, worker.part.peers()[0].state) == (peer, "lost")
        await asyncio.sleep(0.25)
        assert await ready_session(worker, client, owner) == peer + 1


async def test_a_refused_session_says_why_and_the_request_runs_here(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with owner_server() as owner:
        owner.error = LayoutMismatchError("region kv.dtype: source has 'bfloat16', reader has 'float32'")
        await client.submit(prefill=owner.ref)
        assert (await worker.engine.got(Submit)).prefill == 0
        (status,) = worker.part.peers()
        assert (status.state, "kv.dtype" in status.detail) == ("refused", True)
        await client.submit(prefill=owner.ref)
        assert owner.sessions == 1, "not asked again at once"


async def test_a_peer_that_was_refused_a_thousand_times_is_still_asked_at_its_pace(
    decode: tuple[ScriptedWorker, Client],
) -> None:
    worker, client = decode
    async with owner_server() as owner:
        owner.error = UnavailableError("not now")
        await client.submit(prefill=owner.ref)
        (session,) = worker.part._sessions.statuses()
        session.failures, session.retry_at = 5000, 0.0
        await client.submit(prefill=owner.ref)
        await eventually(lambda: owner.sessions == 2 and session.task is None)
        assert session.retry_at > 0.0
        assert worker.engine.count(PeerGone) == 2
        owner.error, session.retry_at = None, 0.0
        assert await ready_session(worker, client, owner) == 3


async def test_requests_that_meet_a_new_epoch_together_open_one_session(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with owner_server() as owner:
        old = await ready_session(worker, client, owner)
        owner.epoch += 2
        asked = [asyncio.create_task(worker.part._sessions.ensure(owner.ref)) for _ in range(4)]
        peer = (await worker.engine.got(PeerReady, 2)).peer
        worker.engine.say(PeerVerdict(peer, "ready", "ucx/cma", ""))
        assert await asyncio.gather(*asked) == [peer] * 4
        assert (await worker.engine.got(PeerGone)).peer == old
        assert owner.sessions == 2


async def test_a_router_that_names_an_old_epoch_disturbs_nobody(decode: tuple[ScriptedWorker, Client]) -> None:
    """It has not heard of the restart yet: its request runs here, those of the new epoch's session go on."""
    worker, client = decode
    async with owner_server() as owner:
        owner.strict = True
        earlier = owner.ref
        owner.epoch += 2
        peer = await ready_session(worker, client, owner)
        worker.engine.say(order(peer))
        await eventually(lambda: "prefill" in owner.kinds())
        for _ in range(3):
            await client.submit(prefill=earlier)
            assert worker.engine.sent[-1].prefill == 0
        assert await worker.part._sessions.ensure(owner.ref) == peer
        assert [m.peer for m in worker.engine.sent if isinstance(m, PeerGone)] == [peer + 1], "the old epoch's alone"
        owner.to_say.put_nowait(codec.order_event_to_proto(OrderAccepted(9, 3, 0)))
        assert (await worker.engine.got(PeerEvent)).peer == peer
        (status,) = worker.part.peers()
        assert (status.state, status.peer.epoch) == ("ready", owner.epoch)
        assert owner.sessions == 2, "the refused one is not tried again at once"


async def test_an_engine_that_died_takes_its_sessions_along(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with owner_server() as owner:
        await ready_session(worker, client, owner)
        worker.engine.die()
        await eventually(lambda: len(worker.engines) == 2 and worker.host.ready is not None)
        (status,) = worker.part.peers()
        assert status.state == "lost"
        await asyncio.sleep(0.25)
        assert await ready_session(worker, client, owner) == 2
        assert owner.sessions == 2


async def test_a_session_that_its_owner_ends_leaves_no_task_behind(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode

    def writers() -> list[str]:
        return [name for task in asyncio.all_tasks() if "_consume_request_iterator" in (name := repr(task.get_coro()))]

    async with owner_server() as owner:
        await ready_session(worker, client, owner)
        assert len(writers()) == 1
        owner.to_say.put_nowait(None)
        await worker.engine.got(PeerGone)
        await eventually(lambda: not writers())


async def test_a_silent_peer_is_lost(decode: tuple[ScriptedWorker, Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "PING_S", 0.05)
    monkeypatch.setattr(sessions_module, "SILENCE_S", 0.2)
    worker, client = decode
    async with owner_server() as owner:
        peer = await ready_session(worker, client, owner)
        gone = await worker.engine.got(PeerGone)
        assert (gone.peer, "silent" in gone.reason) == (peer, True)
        assert owner.kinds().count("ping") >= 3


@pytest.mark.parametrize("batched", [False, True])
async def test_a_peer_that_talks_nonsense_is_lost(decode: tuple[ScriptedWorker, Client], batched: bool) -> None:
    worker, client = decode
    async with owner_server() as owner:
        peer = await ready_session(worker, client, owner)
        extent = prefill_pb2.PrefillExtent(order_id=1, lease_id=2, group="nowhere", prefix_hash=b"short")
        nonsense = prefill_pb2.SessionResponse(extent=extent)
        if batched:
            nonsense = prefill_pb2.SessionResponse(batch=prefill_pb2.SessionBatch(responses=[nonsense]))
        owner.to_say.put_nowait(nonsense)
        assert (await worker.engine.got(PeerGone)).peer == peer


async def test_workers_that_are_long_gone_are_forgotten(
    decode: tuple[ScriptedWorker, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "FORGET_S", 0.0)
    worker, client = decode
    for i in range(5):
        await client.submit(prefill=WorkerRef(f"p{i}", 1, "127.0.0.1:1"))
    assert len(worker.part.peers()) == 5
    await asyncio.sleep(0.3)
    await client.submit(prefill=WorkerRef("p9", 1, "127.0.0.1:1"))
    assert len(worker.part.peers()) == 1
