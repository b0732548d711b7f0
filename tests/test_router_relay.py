"""Faults between router and workers: broken streams, dead and restarted workers, lost answers, gaps."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from router_support import MODEL, Cluster, Script, ScriptedWorker, cluster, events, say, tokenizer, until

from common.rpc import codec
from common.types import ChoiceDelta, FinishReason, GenerationRequest, Role, WorkerRef, WorkerState

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
LONG = "Because molecules scatter blue light more than red light. " * 4


async def working(made: Cluster, rows: int = 5) -> ScriptedWorker:
    """The worker that has the request, once it made some rows."""
    await until(lambda: any(len(e.rows) >= rows for worker in made.workers for e in worker.entries.values()))
    return next(worker for worker in made.workers if worker.entries)


async def streamed(made: Cluster, **body: Any) -> tuple[str, dict[str, Any]]:
    answer = await made.post("/v1/chat/completions", **CHAT, stream=True, **body)
    found = events(answer.text)
    return "".join(c["delta"].get("content", "") for e in found if "choices" in e for c in e["choices"]), found[-1]


async def test_a_broken_stream_is_taken_up_again(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, delay_s=0.005)) as made:
        tasks = [asyncio.create_task(streamed(made)) for _ in range(4)]
        await until(lambda: len(made.worker.entries) == 4)
        for _ in range(5):
            await asyncio.sleep(0.06)
            made.worker.break_streams()
        for task in tasks:
            assert (await task)[0] == LONG
        assert made.worker.attached >= 4
        assert len(made.worker.entries) == 4, "nothing was submitted twice"


async def test_a_dead_worker_is_replaced_without_a_lost_or_repeated_token(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, delay_s=0.01), num_workers=2) as made:
        tasks = [asyncio.create_task(streamed(made, n=2)) for _ in range(6)]
        await until(lambda: sum(len(worker.entries) for worker in made.workers) == 6)
        await asyncio.sleep(0.15)
        dead, alive = made.workers
        moved = len(dead.entries)
        assert 0 < moved < 6, "least loaded spreads them"
        before = len(alive.entries)
        await dead.kill()
        for task in tasks:
            text, _ = await task
            assert sorted(text) == sorted(LONG * 2)
        resumed = [e.request for e in list(alive.entries.values())[before:]]
        assert len(resumed) == moved
        assert all(any(r.sent) for r in resumed)
        original = {entry.request.request_id: entry.request for entry in dead.entries.values()}
        for request in resumed:
            assert request.prompt_token_ids == original[request.request_id].prompt_token_ids
            assert request.sampling == original[request.request_id].sampling


async def test_an_ended_choice_is_not_run_again(tmp_path: Path) -> None:
    outputs = [tokenizer().encode("short"), tokenizer().encode(LONG)]
    async with cluster(tmp_path, lambda request: Script(outputs, delay_s=0.01), num_workers=2) as made:
        task = asyncio.create_task(made.post("/v1/chat/completions", **CHAT, n=2))
        worker = await working(made, rows=30)
        await worker.kill()
        choices = (await task).json()["choices"]
        assert [c["message"]["content"] for c in choices] == ["short", LONG]
        other = next(w for w in made.workers if w is not worker)
        assert other.requests[0].ended_choices == (0,)
        assert list(other.requests[0].sent[0]) == outputs[0]


async def test_a_restarted_worker_takes_its_requests_back(tmp_path: Path) -> None:
    """Alone in the cluster: the new process registers and continues what the old one had."""
    async with cluster(tmp_path, say(LONG, delay_s=0.01)) as made:
        task = asyncio.create_task(streamed(made))
        await working(made)
        old = made.worker.info()
        await made.worker.restart()
        made.members.put(made.worker.info())
        assert made.worker.info().ref != old.ref
        assert (await task)[0] == LONG
        assert made.worker.requests[0].sent[0]


async def test_an_answer_waits_for_its_only_worker_to_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease runs out and a model takes its time to load: the answer goes on where it was."""
    monkeypatch.setattr("services.router.link.PATIENCE_S", 0.2)
    async with cluster(tmp_path, say(LONG, delay_s=0.01), connect_timeout_s=0.5, resume_wait_s=15.0) as made:
        task = asyncio.create_task(streamed(made))
        await working(made)
        await made.worker.kill()
        made.members.remove("d0")
        refused = await made.post("/v1/chat/completions", **CHAT)
        assert refused.status_code == 503
        assert "No model is served at the moment" in refused.json()["error"]["message"]
        await asyncio.sleep(4.0)
        assert not task.done()
        await made.worker.restart()
        made.members.put(made.worker.info(WorkerState.STARTING))
        await asyncio.sleep(0.1)
        made.members.put(made.worker.info())
        assert (await asyncio.wait_for(task, 10))[0] == LONG
        assert made.worker.requests[0].sent[0]


async def test_a_worker_that_stays_away_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.router.link.PATIENCE_S", 0.5)
    async with cluster(tmp_path, say(LONG, delay_s=0.01), connect_timeout_s=0.5, resume_wait_s=0.3) as made:
        task = asyncio.create_task(streamed(made))
        await working(made)
        await made.worker.kill()
        text, last = await asyncio.wait_for(task, 10)
        assert LONG.startswith(text)
        assert text
        assert last["error"]["code"] == "service_unavailable"
        assert "d0" in last["error"]["message"]
        refused = await made.post("/v1/chat/completions", **CHAT)
        assert refused.status_code == 503


async def test_the_only_worker_takes_again_what_it_has_forgotten(tmp_path: Path) -> None:
    """The router was paused for longer than requests are kept without a stream."""
    async with cluster(tmp_path, say(LONG, delay_s=0.01)) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        (entry,) = worker.entries.values()
        entry.task.cancel()
        worker.entries = {0: dataclasses.replace(entry, router_id="")}
        worker.break_streams()
        assert (await asyncio.wait_for(task, 5))[0] == LONG
        assert worker.requests[-1].sent[0]


async def test_a_worker_drained_in_mid_answer(tmp_path: Path) -> None:
    """Its grace over, it cancels: the request goes on elsewhere."""

    def script(request: GenerationRequest) -> Script:
        if request.sent:
            return say(LONG)(request)
        return Script([tokenizer().encode(LONG)[:9]], finish=FinishReason.CANCELLED)

    async with cluster(tmp_path, script, num_workers=2) as made:
        assert (await streamed(made))[0] == LONG


async def test_only_ready_workers_get_requests(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x"), num_workers=2) as made:
        made.members.put(made.workers[0].info(WorkerState.DRAINING))
        for _ in range(6):
            assert (await made.post("/v1/chat/completions", **CHAT)).status_code == 200
        assert len(made.workers[0].entries) == 0


async def test_a_removed_worker_finishes_what_it_has(tmp_path: Path) -> None:
    """Lost by the controller, alive on the stream: it is used to the end and then let go."""
    async with cluster(tmp_path, say(LONG, delay_s=0.01), num_workers=2) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        made.members.remove(worker.worker_id)
        assert (await task)[0] == LONG
        assert sum(len(w.entries) for w in made.workers) == 1
        assert (await made.post("/v1/chat/completions", **CHAT, max_tokens=1)).status_code == 200
        assert len(worker.entries) == 1


async def test_a_removed_and_dead_worker_is_left_at_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, delay_s=0.01), num_workers=2) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        await worker.kill()
        made.members.remove(worker.worker_id)
        assert (await asyncio.wait_for(task, 5))[0] == LONG


@pytest.mark.parametrize("removed", [False, True])
async def test_a_worker_that_takes_streams_and_says_nothing_is_left_soon(tmp_path: Path, *, removed: bool) -> None:
    """Its process hangs, or its host went away: an attempt to reattach has no end of its own."""
    async with cluster(tmp_path, say(LONG, delay_s=0.01), num_workers=2) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        worker.mute = True
        worker.break_streams()
        if removed:
            made.members.remove(worker.worker_id)
        assert (await asyncio.wait_for(task, 4))[0] == LONG
        assert (await made.post("/v1/chat/completions", **CHAT, max_tokens=1)).status_code == 200


async def test_a_worker_without_a_stream_gets_requests_only_if_there_is_no_other(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x")) as made:
        late = ScriptedWorker(say("x"), tmp_path, worker_id="d1")
        made.workers.append(late)
        late.mute = True
        await late.start()
        made.members.put(late.info())
        for _ in range(4):
            assert (await asyncio.wait_for(made.post("/v1/chat/completions", **CHAT), 2)).status_code == 200
        assert len(made.worker.entries) == 4


async def test_a_request_on_its_way_to_a_worker_that_is_lost_goes_elsewhere(tmp_path: Path) -> None:
    """It waits for the first stream to its only worker, which breaks; another came meanwhile."""
    async with cluster(tmp_path, say("x")) as made:
        await made.worker.kill()
        made.members.remove("d0")
        only, other = (ScriptedWorker(say("x"), tmp_path, worker_id=name) for name in ("d1", "d2"))
        made.workers += [only, other]
        only.mute = True
        await only.start()
        made.members.put(only.info())
        task = asyncio.create_task(made.post("/v1/chat/completions", **CHAT))
        await asyncio.sleep(0.2)
        await other.start()
        made.members.put(other.info())
        await until(lambda: other.attached == 1)
        made.members.remove("d1")
        assert (await asyncio.wait_for(task, 4)).status_code == 200
        assert len(other.entries) == 1


@pytest.mark.parametrize("how", ["silent", "refuses", "refuses for long"])
async def test_the_only_worker_comes_back_after_its_lease_ran_out(how: str, tmp_path: Path) -> None:
    """It was paused, or its network was: the same process, which has all it made meanwhile."""
    async with cluster(tmp_path, say(LONG, delay_s=0.02), resume_wait_s=8.0) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        worker.mute, worker.refuse_streams = how == "silent", how != "silent"
        worker.break_streams()
        if how != "refuses for long":
            made.members.remove("d0")
        await asyncio.sleep(2.5 if how == "silent" else 6)
        worker.mute = worker.refuse_streams = False
        if how != "refuses for long":
            made.members.put(worker.info())
        assert (await asyncio.wait_for(task, 4))[0] == LONG
        assert (await made.post("/v1/chat/completions", **CHAT, max_tokens=1)).status_code == 200


async def test_a_worker_that_is_a_member_again_is_one(tmp_path: Path) -> None:
    """Its lease ran out and it registered again while a request went on: its next break is like any other's."""
    async with cluster(tmp_path, say(LONG, delay_s=0.005)) as made:
        task = asyncio.create_task(streamed(made))
        await working(made)
        made.members.remove("d0")
        await asyncio.sleep(0.2)
        made.members.put(made.worker.info())
        assert (await asyncio.wait_for(task, 10))[0] == LONG
        made.worker.break_streams()
        await asyncio.sleep(0.3)
        assert (await made.post("/v1/chat/completions", **CHAT, max_tokens=1)).status_code == 200


async def test_a_request_waits_for_its_only_worker_that_was_away_for_long(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x")) as made:
        made.worker.refuse_streams = True
        made.worker.break_streams()
        await asyncio.sleep(5.3)
        task = asyncio.create_task(made.post("/v1/chat/completions", **CHAT))
        await asyncio.sleep(2.0)
        made.worker.refuse_streams = False
        assert (await task).status_code == 200


async def test_all_streams_break_and_one_worker_says_nothing(tmp_path: Path) -> None:
    """Its attempt began when the other had no stream either."""
    async with cluster(tmp_path, say(LONG, delay_s=0.01), num_workers=2) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        worker.mute = True
        for each in made.workers:
            each.break_streams()
        assert (await asyncio.wait_for(task, 4))[0] == LONG


async def test_a_request_that_waits_for_a_stream_takes_another_worker_that_comes(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x"), connect_timeout_s=10.0) as made:
        made.worker.mute = True
        made.worker.break_streams()
        await asyncio.sleep(0.2)
        task = asyncio.create_task(made.post("/v1/chat/completions", **CHAT))
        await asyncio.sleep(0.3)
        other = ScriptedWorker(say("x"), tmp_path, worker_id="d1")
        made.workers.append(other)
        await other.start()
        made.members.put(other.info())
        assert (await asyncio.wait_for(task, 2)).status_code == 200


async def test_workers_that_die_at_any_moment(tmp_path: Path) -> None:
    """Killed and removed, in either order, amid requests that have just begun, run, or are about to end."""
    rng = random.Random(3)
    async with cluster(tmp_path, say(LONG, delay_s=0.004), num_workers=3) as made:
        for _ in range(25):
            tasks = [asyncio.create_task(streamed(made)) for _ in range(rng.randint(1, 5))]
            await asyncio.sleep(rng.choice([0, 0.01, 0.03, 0.2]) * rng.random())
            worker = rng.choice(made.workers)
            kill = asyncio.create_task(worker.kill())
            await asyncio.sleep(rng.choice([0, 0.01, 0.1]) * rng.random())
            made.members.remove(worker.worker_id)
            await kill
            for text, _ in await asyncio.wait_for(asyncio.gather(*tasks), 4):
                assert text == LONG
            await worker.restart()
            made.members.put(worker.info())
            await asyncio.sleep(rng.choice([0, 0.05]))


async def test_unreachable_workers_are_passed_over(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x"), num_workers=2, connect_timeout_s=0.5) as made:
        await made.workers[0].kill()
        for _ in range(4):
            assert (await made.post("/v1/chat/completions", **CHAT)).status_code == 200


async def test_acknowledgements(tmp_path: Path) -> None:
    ids = tokenizer().encode(LONG) * 16
    assert len(ids) > 600
    async with cluster(tmp_path, lambda request: Script([ids], step_tokens=10, delay_s=0.01)) as made:
        task = asyncio.create_task(streamed(made))
        await until(lambda: bool(made.worker.entries))
        entry = made.worker.entries[1]
        await until(lambda: bool(entry.acked))
        assert 256 <= entry.acked[0] < 300
        await task
        await until(lambda: entry.acked[0] == len(ids), timeout_s=1)


async def test_slow_output_is_acknowledged_every_second(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, delay_s=0.05)) as made:
        task = asyncio.create_task(streamed(made))
        await until(lambda: bool(made.worker.entries))
        took = await until(lambda: bool(made.worker.entries[1].acked))
        assert 0.8 < took < 2
        task.cancel()


async def test_gaps_and_repeats(tmp_path: Path) -> None:
    """Rows that repeat are cut; rows that skip force a reattachment, which brings what was missing."""
    ids = tokenizer().encode(LONG)[:40]
    async with cluster(tmp_path, lambda request: Script([ids], delay_s=0.02)) as made:
        task = asyncio.create_task(streamed(made, logprobs=True))
        await until(lambda: bool(made.worker.entries))
        entry = made.worker.entries[1]
        await until(lambda: len(entry.rows) > 5)
        streams_before = made.worker.attached
        old, skipping = entry.rows[2], ChoiceDelta(choice=0, position=30, token_ids=(5, 6))
        made.worker._send(entry, codec.deltas_to_proto([(1, old), (1, old)]))
        made.worker._send(entry, codec.deltas_to_proto([(1, skipping), (1, skipping)]))
        text, _ = await task
        assert text == tokenizer().decode(ids)
        assert made.worker.attached == streams_before + 1
        assert len(made.worker.entries) == 1


async def test_rows_of_unknown_slots_are_cancelled(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x")) as made:
        await made.post("/v1/chat/completions", **CHAT)
        entry = made.worker.entries[1]
        lost = made.worker.entries[77] = type(entry)(entry.request, None, entry.router_id)
        lost.task = asyncio.create_task(asyncio.sleep(30))
        made.worker._send(entry, codec.deltas_to_proto([(77, ChoiceDelta(choice=0, position=0, token_ids=(5,)))]))
        await until(lambda: bool(lost.cancelled_at))


async def test_the_prefill_worker_is_named(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x"), separation="always") as made:
        await made.post("/v1/chat/completions", **CHAT)
        info = made.worker.info()
        ref = WorkerRef("p0", 9, "127.0.0.1:9")
        made.members.put(msgspec.structs.replace(info, ref=ref, role=Role.PREFILL))
        await made.post("/v1/chat/completions", **CHAT)
        assert [entry.prefill for entry in made.worker.entries.values()] == [None, ref]


async def test_a_stopping_router_cancels_what_it_has(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, delay_s=0.05), drain_grace_s=0.1) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        await made.router.stop()
        assert (await task)[1]["error"]["code"] == "service_unavailable"
        assert worker.entries[1].cancelled_at


async def test_a_stopping_router_lets_what_it_has_finish(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, delay_s=0.01), drain_grace_s=10.0) as made:
        task = asyncio.create_task(streamed(made))
        worker = await working(made)
        await made.router.stop()
        assert (await task)[0] == LONG
        assert not worker.entries[1].cancelled_at


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_faults(tmp_path: Path, seed: int) -> None:
    """Streams break and workers restart at random; every answer is whole."""
    rng = random.Random(seed)
    async with cluster(tmp_path, say(LONG, delay_s=0.004, step_tokens=2), num_workers=3) as made:

        async def trouble() -> None:
            for step in range(1, 13):
                await asyncio.sleep(rng.uniform(0.02, 0.1))
                worker = rng.choice(made.workers)
                if step % 4:
                    worker.break_streams()
                else:
                    await worker.restart()
                    made.members.put(worker.info())

        fault = asyncio.create_task(trouble())
        try:
            answers = await asyncio.gather(*(streamed(made) for _ in range(16)))
        finally:
            fault.cancel()
        assert [last for text, last in answers if text != LONG] == []
