"""An engine whose ranks are processes: its tokens, and what becomes of it when a rank dies or stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from engine_support import Answer, Answers, greedy, llama, prompts, reference_tokens
from process_support import Engine

from common.engine.messages import Deltas, FromEngine, Submit
from common.types import GenerationRequest, Role

__all__ = ["llama"]

pytestmark = pytest.mark.asyncio(loop_scope="module")

COUNT, HANG_S = 12, 5.0


class Ranked(Engine):
    """Two ranks; forgets its ends when it is started again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Role.DECODE, folder, tensor_parallel_size=2, hang_timeout_s=HANG_S)
        self.relay = self._take
        self._answers = Answers()

    async def start(self) -> None:
        self.ready, self.fatal = None, None
        self.deaths.clear()
        await super().start()
        assert self.ready is not None, self.fatal

    def submit(self, slot: int, prompt: tuple[int, ...], count: int) -> Answer:
        self._answers.by_slot[slot] = answer = Answer()
        request = GenerationRequest(request_id=f"r{slot}", model="m", prompt_token_ids=prompt, sampling=greedy(count))
        self.client.send(Submit(slot, request))
        return answer

    def rank(self) -> psutil.Process:
        (other,) = psutil.Process(self.client.pid).children()
        return other

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            self._answers.take(message)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(llama: Path) -> AsyncIterator[Ranked]:
    """Ended by each test but the first, which leaves it as it was."""
    made = Ranked(llama)
    await made.start()
    yield made
    await made.client.stop(5)


async def test_two_processes_make_the_tokens_of_one(engine: Ranked, llama: Path) -> None:
    given = prompts(40, (5, 60, 200))
    answers = [engine.submit(i + 1, p, COUNT) for i, p in enumerate(given)]
    await engine.until(lambda: all(a.ended for a in answers))
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)


def has_ended(rank: psutil.Process, timeout_s: float = 5.0) -> bool:
    """Within this time; nobody may be there to bury it."""
    deadline = time.monotonic() + timeout_s
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def kill(rank: psutil.Process) -> None:
    rank.kill()


def stop(rank: psutil.Process) -> None:
    os.kill(rank.pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("harm", "idle", "reason"), [(kill, True, "rank 1 is gone"), (kill, False, "rank"), (stop, False, "rank")]
)
async def test_a_lost_rank_ends_the_engine(
    engine: Ranked, harm: Callable[[psutil.Process], None], idle: bool, reason: str
) -> None:
    if not engine.client.alive:
        await engine.start()
    rank = engine.rank()
    if not idle:
        answer = engine.submit(9, (5, 6, 7), 400)
        await engine.until(lambda: answer.tokens)
    harm(rank)
    await engine.until(lambda: engine.deaths, HANG_S + 20)
    assert engine.fatal is not None
    assert reason in engine.fatal.failure.message
    assert len(engine.deaths) == 1
    assert await asyncio.to_thread(has_ended, rank)


async def test_ranks_end_with_their_engine(engine: Ranked) -> None:
    if not engine.client.alive:
        await engine.start()
    rank = engine.rank()
    engine.client.kill()
    await engine.until(lambda: engine.deaths)
    assert await asyncio.to_thread(has_ended, rank)
