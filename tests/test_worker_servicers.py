"""Decode and prefill workers' RPCs over real servers and clients; only the engine behind them is scripted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from kvtransfer_support import region, small_layout, tail_region
from rpc_support import eventually
from worker_support import ScriptedWorker, engine_load, request, scripted

from common.engine.messages import (
    Cancel,
    DeltaRow,
    Deltas,
    FailureOf,
    PeerEvent,
    PeerGone,
    PeerReady,
    ReaderEvent,
    ReaderGone,
    StatsOf,
    Submit,
)
from common.errors import (
    InvalidRequestError,
    LayoutMismatchError,
    NanoDeployError,
    NotFoundError,
    UnavailableError,
)
from common.kvtransfer.orders import (
    DropOrder,
    OrderAccepted,
    OrderEvent,
    OrderExtent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PeerVerdict,
    PlaceOrder,
    ReleaseLease,
)
from common.rpc import codec
from common.rpc.client import call
from common.rpc.server import RpcServer, Service
from common.rpc.status import error_from_rpc
from common.types import ChoiceDelta, Failure, FinishReason, RequestStats, SamplingParams, WorkerRef
from nanodeploy.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from services.decode_worker import sessions as sessions_module
from services.decode_worker.part import DecodePart
from services.prefill_worker.part import PrefillPart

ROUTER = "router-1"


# -- decode ------------------------------------------------------------------------------------------


class Client:
    """A router's end of the wire, bare."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub: Any = decode_pb2_grpc.DecodeServiceStub
        self.stub = stub(channel)

    async def submit(self, router_id: str = ROUTER, prefill: WorkerRef | None = None, **fields: Any) -> int:
        wire = decode_pb2.SubmitRequest(
            router_id=router_id,
            request=codec.request_to_proto(request(**fields), 0.0),
            prefill=codec.ref_to_proto(prefill) if prefill else None,
        )
        response: decode_pb2.SubmitResponse = await call(self.stub.Submit, wire, timeout_s=10)
        return response.slot

    @asynccontextmanager
    async def stream(
        self, *positions: tuple[int, int, int], router_id: str = ROUTER, epoch: int = 0
    ) -> AsyncIterator[Stream]:
        stream = Stream(self.stub.Stream())
        slots, choices, at = zip(*positions, strict=True) if positions else ((), (), ())
        attach = decode_pb2.StreamAttach(
            router_id=router_id, epoch=epoch, slots=slots, choices=choices, next_positions=at
        )
        try:
            await stream.write(attach=attach)
            stream.attached = (await stream.read()).attached
            yield stream
        finally:
            stream.call.cancel()


class Stream:
    def __init__(self, wire_call: Any) -> None:
        self.call = wire_call
        self.attached = decode_pb2.StreamAttached()

    async def write(self, **message: Any) -> None:
        await self.call.write(decode_pb2.StreamRequest(**message))

    async def read(self) -> decode_pb2.StreamResponse:
        response: Any = await asyncio.wait_for(self.call.read(), 10)
        if not isinstance(response, decode_pb2.StreamResponse):  # grpc.aio.EOF
            raise EOFError
        return response

    async def read_on(self) -> None:
        while True:
            await self.read()

    async def rows(self) -> codec.StepRows:
        return codec.deltas_from_proto((await self.read()).deltas)


def token(slot: int, position: int, *, choice: int = 0, finish: FinishReason | None = None) -> DeltaRow:
    return DeltaRow(slot, ChoiceDelta(choice=choice, position=position, token_ids=(100 + position,), finish=finish))


@pytest.fixture
async def decode() -> AsyncIterator[tuple[ScriptedWorker, Client]]:
    async with scripted(DecodePart) as (worker, channel):
        yield worker, Client(channel)


async def test_a_request_enters_by_submit_and_its_tokens_come_down_the_stream(
    decode: tuple[ScriptedWorker, Client],
) -> None:
    worker, client = decode
    async with client.stream(epoch=worker.host.epoch) as stream:
        assert stream.attached.epoch == worker.host.epoch
        slot = await client.submit(request_id="abc", deadline_s=20.0, sampling=SamplingParams(seed=3, n=2))
        submitted = await worker.engine.got(Submit)
        assert (submitted.slot, submitted.request.request_id, submitted.prefill) == (slot, "abc", 0)
        assert 0 < submitted.remaining_s <= 20.0
        stats = RequestStats(prompt_tokens=3, computed_tokens=3)
        worker.engine.say(Deltas(1, rows=(token(slot, 0),), stats=(StatsOf(slot, stats),)))
        rows = await stream.rows()
        assert (rows.rows, rows.stats) == ([(slot, token(slot, 0).delta)], [(slot, stats)])
        worker.engine.say(Deltas(2, rows=(token(slot, 0, choice=1), token(slot, 1, finish=FinishReason.STOP))))
        assert [d.choice for _, d in (await stream.rows()).rows] == [1, 0]
        assert worker.part.num_active() == 1
        worker.engine.say(Deltas(3, failures=(FailureOf(slot, Failure("internal", "boom", "")),)))
        assert [(s, f.message) for s, f in (await stream.rows()).failures] == [(slot, "boom")]
        assert worker.part.num_active() == 0


async def test_a_reattached_stream_gets_what_it_lacks_and_names_what_is_unknown(
    decode: tuple[ScriptedWorker, Client],
) -> None:
    worker, client = decode
    async with client.stream() as stream:
        slot, unnamed = await client.submit(), await client.submit()
        worker.engine.say(Deltas(1, rows=(token(slot, 0), token(slot, 1), token(unnamed, 0))))
        await stream.rows()
        await stream.write(ack=decode_pb2.StreamAck(slots=[slot], choices=[0], next_positions=[1]))
    worker.engine.say(Deltas(2, rows=(token(slot, 2, finish=FinishReason.LENGTH),)))
    async with client.stream((slot, 0, 1), (4711, 0, 0), epoch=worker.host.epoch) as stream:
        assert list(stream.attached.unknown_slots) == [4711]
        rows = (await stream.rows()).rows
        assert [(s, d.position) for s, d in rows] == [(slot, 1), (slot, 2), (unnamed, 0)]


async def test_a_stream_taken_over_while_the_old_one_hangs_loses_nothing(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with client.stream() as old:
        slot = await client.submit()
        worker.engine.say(Deltas(1, rows=(token(slot, 0, finish=FinishReason.STOP),)))
        async with client.stream((slot, 0, 0)) as new:
            assert [(s, d.position) for s, d in (await new.rows()).rows] == [(slot, 0)]
            with pytest.raises(EOFError):
                await old.read_on()


async def test_a_router_of_an_earlier_epoch_hears_that_all_is_lost_and_disturbs_nobody(
    decode: tuple[ScriptedWorker, Client],
) -> None:
    worker, client = decode
    async with client.stream(epoch=worker.host.epoch) as stream:
        slot = await client.submit()
        async with client.stream((slot, 0, 0), epoch=worker.host.epoch ^ 2) as late:
            assert late.attached.epoch == worker.host.epoch
            assert list(late.attached.unknown_slots) == [slot]
            with pytest.raises(EOFError):
                await late.rows()
        worker.engine.say(Deltas(1, rows=(token(slot, 0),)))
        assert len((await stream.rows()).rows) == 1


async def test_cancels_reach_the_engine(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with client.stream() as stream:
        slots = [await client.submit(sampling=SamplingParams(seed=1, n=2)) for _ in range(2)]
        await stream.write(cancel=decode_pb2.StreamCancel(slots=[slots[0], 99], choices=[2, 0]))
        await stream.write(cancel=decode_pb2.StreamCancel(slots=[slots[1]]))
        assert await worker.engine.got(Cancel) == Cancel((slots[0],), (1,))
        assert await worker.engine.got(Cancel, 2) == Cancel((slots[1],))
        assert worker.part.num_active() == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"ack": decode_pb2.StreamAck()}], "must be attach"),
        ([{}], "must be attach"),
        ([{"attach": decode_pb2.StreamAttach()}], "must be attach"),
        ([{"attach": decode_pb2.StreamAttach(router_id="r", slots=[1])}], "unequal lengths"),
        ([{"attach": decode_pb2.StreamAttach(router_id="r")}] * 2, "only cancel and ack"),
        (
            [
                {"attach": decode_pb2.StreamAttach(router_id="r")},
                {"cancel": decode_pb2.StreamCancel(slots=[1, 2], choices=[1])},
            ],
            "unequal lengths",
        ),
        (
            [
                {"attach": decode_pb2.StreamAttach(router_id="r")},
                {"ack": decode_pb2.StreamAck(slots=[1, 2], choices=[1], next_positions=[1, 2])},
            ],
            "unequal lengths",
        ),
    ],
)
async def test_wrong_messages_end_a_stream_with_a_reason(
    decode: tuple[ScriptedWorker, Client], messages: list[dict[str, Any]], words: str
) -> None:
    stream = Stream(decode[1].stub.Stream())
    for message in messages:
        await stream.write(**message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read_on()
    assert isinstance(error_from_rpc(caught.value), InvalidRequestError)
    assert words in str(caught.value.details())


async def test_a_stream_that_says_nothing_is_ended(
    decode: tuple[ScriptedWorker, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.calls.FIRST_MESSAGE_S", 0.1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Stream(decode[1].stub.Stream()).read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"model": "other"}, NotFoundError, "'tiny'"),
        ({"router_id": ""}, InvalidRequestError, "router_id"),
        ({"router_id": "generate:1"}, InvalidRequestError, "router_id"),
        ({"prompt_token_ids": ()}, InvalidRequestError, "prompt_token_ids"),
        ({"request_id": "no spaces"}, InvalidRequestError, "request_id"),
    ],
)
async def test_bad_submits_are_refused_by_name(
    decode: tuple[ScriptedWorker, Client], fields: dict[str, Any], kind: type[NanoDeployError], words: str
) -> None:
    worker, client = decode
    with pytest.raises(kind, match=words):
        await client.submit(**fields)
    assert worker.engine.count(Submit) == 0
    assert worker.part.num_active() == 0


async def test_generate_streams_one_request_and_dropping_it_cancels(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    wire = decode_pb2.GenerateRequest(request=codec.request_to_proto(request(), 0.0))
    answers = client.stub.Generate(wire)
    slot = (await worker.engine.got(Submit)).slot
    worker.engine.say(Deltas(1, rows=(token(slot, 0),)))
    worker.engine.say(
        Deltas(2, rows=(token(slot, 1, finish=FinishReason.STOP),), stats=(StatsOf(slot, RequestStats()),))
    )
    received = [codec.deltas_from_proto(a.deltas) async for a in answers]
    assert [d.position for rows in received for _, d in rows.rows] == [0, 1]
    dropped = client.stub.Generate(wire)
    slot = (await worker.engine.got(Submit, 2)).slot
    dropped.cancel()
    assert await worker.engine.got(Cancel) == Cancel((slot,))
    assert worker.part.num_active() == 0
    bad = codec.request_to_proto(request(model="other"), 0.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [a async for a in client.stub.Generate(decode_pb2.GenerateRequest(request=bad))]
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_dead_engine_ends_each_request_once_and_the_next_one_takes_over(
    decode: tuple[ScriptedWorker, Client],
) -> None:
    worker, client = decode
    first = worker.host.epoch
    generate = client.stub.Generate(decode_pb2.GenerateRequest(request=codec.request_to_proto(request(), 0.0)))
    await worker.engine.got(Submit)
    async with client.stream() as stream:
        slot = await client.submit()
        worker.engine.die("SIGSEGV")
        failures = (await stream.rows()).failures
        assert [(s, f.code) for s, f in failures] == [(slot, "unavailable")]
        assert "SIGSEGV" in failures[0][1].message
        (ended,) = [codec.deltas_from_proto(a.deltas) async for a in generate]
        assert [f.code for _, f in ended.failures] == ["unavailable"]
        with pytest.raises(UnavailableError, match="SIGSEGV"):
            await client.submit()
        await eventually(lambda: len(worker.engines) == 2 and worker.host.ready is not None)
        assert worker.host.epoch != first
        again = await client.submit()
        assert again > slot
        worker.engine.say(Deltas(1, rows=(token(again, 0, finish=FinishReason.STOP),)))
        assert [s for s, _ in (await stream.rows()).rows] == [again]


async def test_a_submit_during_which_the_engine_dies_is_refused_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        prefill = WorkerRef("p", 5, f"127.0.0.1:{silent.getsockname()[1]}")
        await _submit_into_a_death(prefill)


async def _submit_into_a_death(prefill: WorkerRef) -> None:
    async with scripted(DecodePart, max_restarts=0) as (worker, channel):
        submit = asyncio.create_task(Client(channel).submit(prefill=prefill))
        await eventually(lambda: bool(worker.part.peers()))
        worker.engine.die()
        with pytest.raises(UnavailableError, match="SIGKILL"):
            await submit
        assert worker.part.num_active() == 0


async def test_a_stream_dropped_while_it_is_answered_leaves_the_link_detached(
    decode: tuple[ScriptedWorker, Client],
) -> None:
    worker, client = decode
    streams = worker.part._streams
    for _ in range(20):
        wire_call = client.stub.Stream()
        await wire_call.write(decode_pb2.StreamRequest(attach=decode_pb2.StreamAttach(router_id=ROUTER)))
        wire_call.cancel()
    await eventually(lambda: all(not link.attached for link in streams._links.values()), 5)


# -- prefill sessions, from the decode worker ---------------------------------------------------------


class Owner(prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker that does what it is told to."""

    def __init__(self) -> None:
        self.received: list[prefill_pb2.SessionRequest] = []
        self.to_say: asyncio.Queue[prefill_pb2.SessionResponse | None] = asyncio.Queue()
        self.error: NanoDeployError | None = None
        self.sessions = 0
        self.epoch = 77
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


def order(peer: int, order_id: int = 9) -> PlaceOrder:
    return PlaceOrder(peer, order_id, "r1", (5, 6, 7), 0, "", "", (), 0, 3.0, "")


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
        assert (placed.order_id, list(placed.token_ids), placed.remaining_ms) == (9, [5, 6, 7], 3000)
        events: list[OrderEvent] = [
            OrderAccepted(9, 3, 0),
            OrderStarted(9, 1234, 0),
            OrderFinished(9, 1234, 3, 0.0, 1.0),
        ]
        for event in events:
            owner.to_say.put_nowait(codec.order_event_to_proto(event))
        await worker.engine.got(PeerEvent, 3)
        assert [m for m in worker.engine.sent if isinstance(m, PeerEvent)] == [PeerEvent(peer, e) for e in events]
        assert [(p.state, p.transport) for p in worker.part.peers()] == [("ready", "ucx/cma")]
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


async def test_a_silent_peer_is_lost(decode: tuple[ScriptedWorker, Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "PING_S", 0.05)
    monkeypatch.setattr(sessions_module, "SILENCE_S", 0.2)
    worker, client = decode
    async with owner_server() as owner:
        peer = await ready_session(worker, client, owner)
        gone = await worker.engine.got(PeerGone)
        assert (gone.peer, "silent" in gone.reason) == (peer, True)
        assert owner.kinds().count("ping") >= 3


async def test_a_peer_that_talks_nonsense_is_lost(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with owner_server() as owner:
        peer = await ready_session(worker, client, owner)
        extent = prefill_pb2.PrefillExtent(order_id=1, lease_id=2, group="nowhere", prefix_hash=b"short")
        owner.to_say.put_nowait(prefill_pb2.SessionResponse(extent=extent))
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


# -- prefill -----------------------------------------------------------------------------------------


class Reader:
    """A decode worker's end of a session, bare."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub: Any = prefill_pb2_grpc.PrefillServiceStub
        self.call = stub(channel).Session()

    async def hello(self, worker: ScriptedWorker, layout: Any = None, epoch: int | None = None) -> codec.Welcome:
        hello = codec.Hello(
            WorkerRef("decode-0", 3, "127.0.0.1:1"),
            layout or small_layout(),
            ("ucx",),
            worker.host.epoch if epoch is None else epoch,
        )
        await self.call.write(codec.hello_to_proto(hello))
        return codec.welcome_from_proto((await self.read()).welcome)

    async def write(self, **message: Any) -> None:
        await self.call.write(prefill_pb2.SessionRequest(**message))

    async def read(self) -> prefill_pb2.SessionResponse:
        response: Any = await asyncio.wait_for(self.call.read(), 10)
        if not isinstance(response, prefill_pb2.SessionResponse):  # grpc.aio.EOF
            raise EOFError
        return response

    async def read_on(self) -> None:
        while True:
            await self.read()

    async def failure(self) -> NanoDeployError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.read()
        return error_from_rpc(caught.value)


@pytest.fixture
async def prefill() -> AsyncIterator[tuple[ScriptedWorker, Callable[[], Reader]]]:
    async with scripted(PrefillPart) as (worker, channel):
        yield worker, lambda: Reader(channel)


Prefill = tuple[ScriptedWorker, Callable[[], Reader]]


async def test_a_session_brings_orders_in_and_events_out(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    welcome = await reader.hello(worker)
    assert (welcome.owner.epoch, welcome.layout, welcome.lease_ttl_s) == (worker.host.epoch, small_layout(), 5.0)
    await reader.call.write(codec.order_to_proto(order(0)))
    placed = await worker.engine.got(PlaceOrder)
    assert (placed.order_id, placed.token_ids, placed.remaining_s) == (9, (5, 6, 7), 3.0)
    assert worker.part.num_active() == 1
    digests = tuple(range(small_layout().num_digests("full")))
    events: list[OrderEvent] = [
        OrderAccepted(9, 3, 0),
        OrderStarted(9, 1234, 0),
        OrderExtent(9, 1234, "full", 0, 3, (4,), bytes(16), digests),
        OrderFinished(9, 1234, 3, 0.0, 1.0),
    ]
    for event in events:
        worker.engine.say(ReaderEvent(placed.peer, event))
    worker.engine.say(ReaderEvent(placed.peer + 1, OrderAccepted(9, 3, 0)))
    assert [codec.order_event_from_proto(await reader.read(), small_layout()) for _ in events] == events
    assert worker.part.num_active() == 0
    await reader.write(release=prefill_pb2.LeaseRelease(lease_id=1234))
    await reader.write(cancel=prefill_pb2.PrefillCancel(order_id=9))
    assert await worker.engine.got(ReleaseLease) == ReleaseLease(placed.peer, 1234)
    assert await worker.engine.got(DropOrder) == DropOrder(placed.peer, 9)
    worker.engine.say(engine_load(steps=42))
    await reader.write(ping=prefill_pb2.SessionPing(nonce=7))
    pong = (await reader.read()).pong
    assert (pong.nonce, pong.steps) == (7, 42)
    reader.call.cancel()
    assert await worker.engine.got(ReaderGone) == ReaderGone(placed.peer)


async def test_orders_under_way_are_counted_until_they_end_whatever_ends_them(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    for order_id in range(1, 5):
        await reader.call.write(codec.order_to_proto(order(0, order_id)))
    key = (await worker.engine.got(PlaceOrder, 4)).peer
    assert worker.part.num_active() == 4
    worker.engine.say(ReaderEvent(key, OrderFailed(1, Failure("overloaded", "full"))))
    await reader.write(cancel=prefill_pb2.PrefillCancel(order_id=2))
    await worker.engine.got(DropOrder)
    assert worker.part.num_active() == 2
    reader.call.cancel()
    await worker.engine.got(ReaderGone)
    assert worker.part.num_active() == 0


async def test_a_reader_of_another_epoch_is_sent_away(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.hello(worker, epoch=worker.host.epoch ^ 2)
    assert isinstance(error_from_rpc(caught.value), UnavailableError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_hash": b"x" * 16}, "model_hash"),
        ({"regions": (region(dtype="float32"), tail_region())}, "region kv.dtype"),
        ({"regions": (region(num_layers=3), tail_region())}, "region kv.num_layers"),
        ({"regions": (region(),)}, "region hidden"),
    ],
)
async def test_layouts_that_do_not_convert_are_refused_by_field(
    prefill: Prefill, change: dict[str, Any], words: str
) -> None:
    worker, connect = prefill
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await connect().hello(worker, small_layout(**change))
    error = error_from_rpc(caught.value)
    assert isinstance(error, LayoutMismatchError)
    assert words in error.message


async def test_a_session_that_does_not_begin_with_hello_is_ended(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, connect = prefill
    for message in ({"ping": prefill_pb2.SessionPing()}, {}, {"hello": prefill_pb2.SessionHello()}):
        reader = connect()
        await reader.write(**message)
        assert isinstance(await reader.failure(), InvalidRequestError)
    monkeypatch.setattr("services.worker.calls.FIRST_MESSAGE_S", 0.1)
    assert "said nothing" in (await connect().failure()).message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"token_ids": []}, "start_position"),
        ({"start_position": 1}, "start_position"),
        ({"token_ids": [2**31]}, "token_ids"),
        ({"request_id": "no spaces"}, "request_id"),
        ({"adapter_id": "a" * 2000}, "adapter_id"),
        ({"embeddings": [types_pb2.EmbeddingHandle(num_tokens=5)]}, "embeddings"),
    ],
)
async def test_a_malformed_order_is_refused_by_itself(prefill: Prefill, fields: dict[str, Any], field: str) -> None:
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    await reader.call.write(codec.order_to_proto(order(0, 1)))
    malformed = {"order_id": 2, "request_id": "r", "token_ids": [1]} | fields
    await reader.write(prefill=prefill_pb2.PrefillOrder(**malformed))
    await reader.call.write(codec.order_to_proto(order(0, 3)))
    refused = codec.order_event_from_proto(await reader.read(), small_layout())
    assert isinstance(refused, OrderFailed)
    assert (refused.order_id, refused.failure.code) == (2, InvalidRequestError.code)
    assert refused.failure.param.startswith(f"prefill.{field}")
    last = await worker.engine.got(PlaceOrder, 2)
    assert last.order_id == 3
    assert worker.part.num_active() == 2
    for order_id in (1, 3):
        worker.engine.say(ReaderEvent(last.peer, OrderFinished(order_id, 5, 3, 0.0, 1.0)))
        assert (await reader.read()).finished.order_id == order_id


async def test_a_second_hello_ends_the_session_and_no_other(prefill: Prefill) -> None:
    worker, connect = prefill
    bad, good = connect(), connect()
    await bad.hello(worker)
    await good.hello(worker)
    await bad.write(hello=prefill_pb2.SessionHello())
    assert isinstance(await bad.failure(), InvalidRequestError)
    await worker.engine.got(ReaderGone)
    await good.write(ping=prefill_pb2.SessionPing(nonce=1))
    assert (await good.read()).pong.nonce == 1


async def test_sessions_end_with_the_engine(prefill: Prefill) -> None:
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    worker.engine.die()
    with pytest.raises(EOFError):
        await reader.read()
    late = connect()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await late.hello(worker)
    assert isinstance(error_from_rpc(caught.value), UnavailableError)


async def test_a_reader_that_does_not_read_is_not_answered_for_ever(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.prefill_worker.servicer.MAX_BACKLOG", 100)
    worker, connect = prefill
    reader = connect()
    await reader.hello(worker)
    (queue,) = worker.part._servicer._readers.values()
    for _ in range(200):
        queue.put_nowait(prefill_pb2.SessionResponse(pong=prefill_pb2.SessionPong()))
    await reader.write(ping=prefill_pb2.SessionPing(nonce=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.read_on()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
