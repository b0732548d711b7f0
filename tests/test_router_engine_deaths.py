"""An engine dies under a request: it goes on elsewhere, or where it was, unless it passes for what kills engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from router_support import MODEL, Cluster, cluster, events, say, until

from common.types import Failure, WorkerState

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
LONG = "Because molecules scatter blue light more than red light. " * 4
DEATH = Failure("unavailable", "the worker's engine died")


async def streamed(made: Cluster) -> str:
    answer = await made.post("/v1/chat/completions", **CHAT, stream=True)
    return "".join(c["delta"].get("content", "") for e in events(answer.text) for c in e["choices"])


async def test_an_engine_that_died_moves_its_requests(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG), num_workers=2) as made:
        for worker in made.workers:
            worker.script = lambda r: say(LONG, fail_at=-1 if any(r.sent) else 5, failure=DEATH)(r)
        assert await streamed(made) == LONG
        assert sum(len(worker.entries) for worker in made.workers) == 2


async def test_an_answer_waits_for_the_engine_of_its_only_worker(tmp_path: Path) -> None:
    async with cluster(tmp_path, lambda r: say(LONG, fail_at=-1 if any(r.sent) else 5, failure=DEATH)(r)) as made:
        task = asyncio.create_task(streamed(made))
        await until(lambda: any(entry.failure for entry in made.worker.entries.values()))
        await made.worker.restart()
        made.members.put(made.worker.info(WorkerState.STARTING))
        await asyncio.sleep(0.3)
        made.members.put(made.worker.info())
        assert await asyncio.wait_for(task, 10) == LONG


async def test_engines_that_die_of_a_request_are_few(tmp_path: Path) -> None:
    script = say(LONG, fail_at=0, failure=DEATH)
    async with cluster(tmp_path, script, num_workers=4) as made:
        answer = await made.post("/v1/chat/completions", **CHAT)
        assert answer.status_code == 503
        assert "engine died" in answer.json()["error"]["message"]
        assert sum(len(worker.entries) for worker in made.workers) == 3


async def test_a_request_that_kills_engines_is_given_up(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(LONG, fail_at=0), num_workers=4) as made:
        answer = await made.post("/v1/chat/completions", **CHAT)
        assert answer.status_code == 500
        assert sum(len(worker.entries) for worker in made.workers) == 2
