"""Requests and token streams of a decode worker over a real server and client; the engine behind it is scripted."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import pytest
from rpc_support import eventually
from wire_support import ROUTER, Client, Stream, decode
from worker_support import ScriptedWorker, request, scripted

from common.engine.messages import Cancel, DeltaRow, Deltas, FailureOf, StatsOf, Submit
from common.errors import InvalidRequestError, NanoDeployError, NotFoundError, UnavailableError
from common.rpc import codec
from common.rpc.status import error_from_rpc
from common.types import ChoiceDelta, Failure, FinishReason, RequestStats, SamplingParams, WorkerRef
from nanodeploy.v1 import decode_pb2
from services.decode_worker import sessions as sessions_module
from services.decode_worker.part import DecodePart

__all__ = ["decode"]


def token(slot: int, position: int, *, choice: int = 0, finish: FinishReason | None = None) -> DeltaRow:
    return DeltaRow(slot, ChoiceDelta(choice=choice, position=position, token_ids=(100 + position,), finish=finish))


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
        assert (list(rows.rows), rows.stats) == ([(slot, token(slot, 0).delta)], [(slot, stats)])
        worker.engine.say(Deltas(2, rows=(token(slot, 0, choice=1), token(slot, 1, finish=FinishReason.STOP))))
        assert [d.choice for _, d in (await stream.rows()).rows] == [1, 0]
        assert worker.part.num_active() == 1
        worker.engine.say(Deltas(3, failures=(FailureOf(slot, Failure("internal", "boom", "")),)))
        assert [(s, f.message) for s, f in (await stream.rows()).failures] == [(slot, "boom")]
        assert worker.part.num_active() == 0


async def test_requests_enter_by_the_stream_and_are_answered_on_it(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    async with client.stream(epoch=worker.host.epoch) as stream:
        good, other = (codec.request_to_proto(request(request_id=name), 0.0) for name in ("one", "three"))
        unknown = codec.request_to_proto(request(request_id="two", model="another"), 0.0)
        items = [decode_pb2.SubmitItem(request=one) for one in (good, unknown)]
        await stream.write(submit=decode_pb2.StreamSubmit(items=items))
        answers = await stream.submitted(2)
        assert isinstance(answers[1], NotFoundError)
        slot = answers[0]
        assert (await worker.engine.got(Submit)).slot == slot
        await stream.write(submit=decode_pb2.StreamSubmit(items=[decode_pb2.SubmitItem(request=other)]))
        assert (await stream.submitted(1)).keys() == {2}, "numbers go on"
        worker.engine.say(Deltas(1, rows=(token(int(str(slot)), 0),)))
        assert [s for s, _ in (await stream.rows()).rows] == [slot]


async def test_several_requests_enter_by_one_call(decode: tuple[ScriptedWorker, Client]) -> None:
    worker, client = decode
    good = codec.request_to_proto(request(request_id="one"), 0.0)
    unknown = codec.request_to_proto(request(request_id="two", model="another"), 0.0)
    items = [decode_pb2.SubmitItem(request=one) for one in (unknown, good)]
    wire = decode_pb2.SubmitManyRequest(router_id=ROUTER, items=items)
    results = {r.index: r async for response in client.stub.SubmitMany(wire) for r in response.results}
    assert isinstance(codec.error_from_proto(results[0].error), NotFoundError)
    assert (await worker.engine.got(Submit)).slot == results[1].slot


async def test_what_a_stream_submitted_and_did_not_live_to_hear_of_is_not_admitted(
    decode: tuple[ScriptedWorker, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, client = decode
    ready = asyncio.Event()

    async def slow(self: sessions_module.PrefillSessions, prefill: WorkerRef) -> int:
        await ready.wait()
        return 0

    monkeypatch.setattr(sessions_module.PrefillSessions, "ensure", slow)
    item = decode_pb2.SubmitItem(request=codec.request_to_proto(request(request_id="one"), 0.0))
    item.prefill.CopyFrom(codec.ref_to_proto(WorkerRef("p0", 1, "127.0.0.1:1")))
    async with client.stream() as old:
        await old.write(submit=decode_pb2.StreamSubmit(items=[item]))
        async with client.stream() as new:
            with pytest.raises(EOFError):
                await old.read_on()
            ready.set()
            slot = await client.submit(request_id="two")
            assert (await worker.engine.got(Submit)).request.request_id == "two"
            worker.engine.say(Deltas(1, rows=(token(slot, 0),)))
            deltas = (await new.read()).deltas
            assert (list(deltas.slots), list(deltas.submitted)) == ([slot], [])


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
        ([{"attach": decode_pb2.StreamAttach(router_id="r")}] * 2, "only submit, cancel and ack"),
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
