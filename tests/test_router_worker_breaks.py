"""The router's link and a decode worker's real RPCs, with a stream that breaks at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from rpc_support import eventually
from worker_support import ScriptedWorker, scripted

from common.engine.messages import Cancel, DeltaRow, Deltas, Submit
from common.errors import NanoDeployError, UnavailableError
from common.types import ChoiceDelta, FinishReason, GenerationRequest, MonotonicClock, SamplingParams
from services.decode_worker.part import DecodePart
from services.router.generation import Batch, Courier, Generation, Mailbox
from services.router.link import WorkerLink
from services.router.peer import GrpcDecodePeer
from services.router.routing.board import NO_HINTS

NUM_TOKENS = 12


def tokens_of(number: int) -> list[int]:
    return [1000 * number + position for position in range(NUM_TOKENS)]


def token(number: int, position: int) -> ChoiceDelta:
    finish = FinishReason.LENGTH if position == NUM_TOKENS - 1 else None
    return ChoiceDelta(choice=0, position=position, token_ids=(tokens_of(number)[position],), finish=finish)


async def steps(worker: ScriptedWorker, rng: random.Random) -> None:
    """The engine: each step brings some of its requests their next token, which tells whose it is and where."""
    at: dict[int, tuple[int, int]] = {}  # slot -> (request's number, position)
    seen = 0
    for step in range(1, 100_000):
        await asyncio.sleep(0.001)
        for message in worker.engine.sent[seen:]:
            if isinstance(message, Submit):
                number = int(message.request.request_id, 16)
                at[message.slot] = number, len(message.request.sent[0]) if message.request.sent else 0
            elif isinstance(message, Cancel):
                for slot in message.slots:
                    at.pop(slot, None)
        seen = len(worker.engine.sent)
        rows = []
        for slot, (number, position) in list(at.items()):
            if rng.random() < 0.5:
                continue
            rows.append(DeltaRow(slot, token(number, position)))
            at[slot] = number, position + 1
            if position == NUM_TOKENS - 1:
                del at[slot]
        if rows:
            worker.engine.say(Deltas(step, rows=tuple(rows)))


@contextlib.asynccontextmanager
async def running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
        assert not task.done() or task.exception() is None
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("seed", range(4))
async def test_a_stream_that_breaks_at_any_moment(seed: int) -> None:
    rng = random.Random(seed)
    async with scripted(DecodePart) as (worker, _):
        peer = GrpcDecodePeer(worker.ref(), "router", MonotonicClock())
        moving: set[asyncio.Task[None]] = set()

        def lost(generation: Generation, why: NanoDeployError, forgotten: bool) -> None:
            if not generation.done:
                task = asyncio.create_task(place(generation))
                moving.add(task)
                task.add_done_callback(moving.discard)

        link = WorkerLink(
            worker.ref(),
            peer,
            clock=MonotonicClock(),
            rng=rng,
            connect_timeout_s=2.0,
            on_lost=lost,
            others_ready=lambda ref: False,
            on_attached=lambda: None,
        )

        async def place(generation: Generation) -> None:
            while not generation.done:
                try:
                    await link.submit(generation, None)
                    return
                except UnavailableError:
                    await asyncio.sleep(0.01)

        async def breaks() -> None:
            while True:
                await asyncio.sleep(rng.uniform(0.002, 0.03))
                if rng.random() < 0.5:
                    link._leave()
                else:
                    for other in worker.part._streams._links.values():
                        other.release(0.0)  # as for a router that fell behind

        async def one(number: int) -> None:
            taken: list[int] = []
            mailbox = Mailbox(courier, 1 << 20, lambda: None)

            def consume(deltas: Batch) -> None:
                for _, delta in deltas:
                    taken.extend(delta.token_ids)
                    if isinstance(delta, ChoiceDelta) and delta.finish is not None:
                        mailbox.finish()

            mailbox.consume = consume
            sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=1)
            name = f"{number:032x}"
            request = GenerationRequest(request_id=name, model="tiny", prompt_token_ids=(1, 2), sampling=sampling)
            generation = Generation(request, mailbox, 0, NO_HINTS)
            await place(generation)
            if rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, 0.02))
                generation.cancel()
                return
            await mailbox.ended()
            assert taken == tokens_of(number)

        courier = Courier(MonotonicClock())
        async with running(steps(worker, rng)):
            async with running(breaks()):
                tasks = []
                for number in range(1, 121):
                    tasks.append(asyncio.create_task(one(number)))
                    await asyncio.sleep(rng.choice((0, 0, 0.001, 0.01)))
                async with asyncio.timeout(60):
                    await asyncio.gather(*tasks)
            await eventually(lambda: not worker.part.num_active())
            assert (link.load, link._stash.num_rows) == (0, 0)
        await link.close()
        left = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
        assert not {name for name in left if name.startswith(("GrpcDecodeStream", "WorkerLink", "Outbox", "Submits"))}
        assert not peer._submits._sent
        assert not peer._submits._waiting
