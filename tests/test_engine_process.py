"""Engines in processes of their own, KV moved between them by UCX: identity, death and restart.

Starting an engine costs seconds of CPU, so tests share them; what a test leaves behind is said at its fixture.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from engine_support import Answer, Answers, greedy, llama, prompts, reference_tokens
from process_support import Engine

from common.engine.messages import (
    Deltas,
    FromEngine,
    PeerEvent,
    PeerGone,
    PeerReady,
    ReaderEvent,
    Submit,
)
from common.kvtransfer.orders import DropOrder, PeerVerdict, PlaceOrder, ReleaseLease
from common.types import GenerationRequest, Role, SamplingParams, WorkerRef

__all__ = ["llama"]

pytestmark = pytest.mark.asyncio(loop_scope="module")

COUNT = 12
PEER, READER = 1, 1


class Cluster:
    """A prefill and a decode process, and in place of their gRPC processes this one."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.prefill = Engine(Role.PREFILL, folder, max_num_batched_tokens=64, **options)
        self.decode = Engine(Role.DECODE, folder, **options)
        self.prefill.relay, self.decode.relay = self._from_prefill, self._from_decode
        self.answers = Answers()
        self.verdicts: list[PeerVerdict] = []
        self.extents = 0

    async def start(self) -> None:
        await asyncio.gather(self.prefill.start(), self.decode.start())
        ready = self.prefill.ready
        assert ready is not None
        ref = WorkerRef("prefill-0", 1, "nowhere:1")
        self.decode.client.send(PeerReady(PEER, ref, ready.layout, ready.endpoints, ready.lease_ttl_s))
        await self.decode.until(lambda: self.verdicts)
        assert self.verdicts[0].state == "ready", self.verdicts[0]

    def submit(self, slot: int, prompt: tuple[int, ...], params: SamplingParams) -> Answer:
        self.answers.by_slot[slot] = answer = Answer()
        request = GenerationRequest(request_id=f"r{slot}", model="m", prompt_token_ids=prompt, sampling=params)
        self.decode.client.send(Submit(slot, request, 0.0, PEER))
        return answer

    async def stop(self) -> None:
        await asyncio.gather(self.prefill.client.stop(5), self.decode.client.stop(5))

    def _from_decode(self, message: FromEngine) -> None:
        match message:
            case Deltas():
                self.answers.take(message)
            case PeerVerdict():
                self.verdicts.append(message)
            case PlaceOrder() | DropOrder() | ReleaseLease():
                self.prefill.client.send(msgspec.structs.replace(message, peer=READER))

    def _from_prefill(self, message: FromEngine) -> None:
        if isinstance(message, ReaderEvent):
            self.extents += type(message.event).__name__ == "OrderExtent"
            self.decode.client.send(PeerEvent(PEER, message.event))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path) -> AsyncIterator[Cluster]:
    """The last test that uses it kills the prefill engine."""
    made = Cluster(llama)
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(llama: Path) -> AsyncIterator[Engine]:
    """Killed by one test and started again; the last one that uses it ends it."""
    made = Engine(Role.DECODE, llama)
    await made.start()
    yield made
    await made.client.stop(5)


async def test_tokens_handed_over_by_ucx_equal_transformers(cluster: Cluster, llama: Path) -> None:
    given = prompts(40, (5, 60, 200, 130))
    answers = [cluster.submit(i + 1, p, greedy(COUNT)) for i, p in enumerate(given)]
    await cluster.decode.until(lambda: all(a.ended for a in answers))
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
        assert answer.stats.fallback == ""
        assert answer.stats.transferred_tokens == len(prompt)
        assert answer.stats.transport in ("ucx/posix", "ucx/cma")
    await cluster.decode.idle_ledger()
    await cluster.prefill.idle_ledger()


async def test_a_killed_prefill_engine_is_invisible_to_the_client(cluster: Cluster, llama: Path) -> None:
    (prompt,) = prompts(41, (400,))
    before = cluster.extents
    answer = cluster.submit(9, prompt, greedy(COUNT))
    await cluster.prefill.until(lambda: cluster.extents > before)
    os.kill(cluster.prefill.client.pid, signal.SIGKILL)
    await cluster.prefill.until(lambda: cluster.prefill.deaths)
    cluster.decode.client.send(PeerGone(PEER, "killed"))
    await cluster.decode.until(lambda: answer.ended)
    assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
    assert "SIGKILL" in cluster.prefill.deaths[0]
    await cluster.decode.idle_ledger()


async def test_a_dead_engine_is_reported_once_and_can_be_started_again(engine: Engine) -> None:
    first = engine.client.pid
    os.kill(first, signal.SIGKILL)
    await engine.until(lambda: engine.deaths)
    assert not engine.client.alive
    engine.ready = None
    engine.deaths.clear()
    await engine.start()
    assert engine.ready is not None
    assert engine.client.pid != first
    assert engine.deaths == []


async def test_a_bad_checkpoint_ends_in_one_clear_message(tmp_path: Path) -> None:
    engine = Engine(Role.DECODE, tmp_path / "nothing")
    await engine.start()
    assert engine.fatal is not None
    assert "nothing" in engine.fatal.failure.message
    await engine.until(lambda: engine.deaths)


async def test_an_engine_ends_with_its_parent(engine: Engine) -> None:
    assert engine.client._writer is not None
    engine.client._writer.close()
    await asyncio.to_thread(engine.client._process.wait, 10)  # type: ignore[union-attr]


async def test_an_owner_that_cannot_take_a_message_hears_of_the_end(tmp_path: Path) -> None:
    engine = Engine(Role.DECODE, tmp_path / "nothing")

    def broken(message: FromEngine) -> None:
        raise ValueError("cannot take it")

    engine.relay = broken
    await engine.client.start(engine._on_message, engine._on_death)
    await engine.until(lambda: engine.deaths, 60)
    assert not engine.client.alive
