"""What the APIs keep for clients when a step of it fails, and how they list it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_support import Stored, controller, ended, stored_cluster
from redis_support import RedisServer, fresh_namespace, server
from router_support import MODEL, cluster, say, until
from rpc_support import eventually

from common.errors import OverloadedError
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient, Written
from services.router.api import batch_runner, responses

__all__ = ["server"]

ANSWER = "Because molecules scatter blue light."
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": MODEL, "prompt": "Hi"}}


@pytest.fixture
async def stored(server: RedisServer, tmp_path: Path) -> AsyncIterator[Stored]:
    async with stored_cluster(server, tmp_path / "model", say(ANSWER)) as made:
        yield made


async def test_an_upload_that_fails_takes_no_room(server: RedisServer, tmp_path: Path) -> None:
    """Its first parts fill the storage for as long as files are kept, and each try fills it more."""
    running = controller(server, fresh_namespace(), max_stored_bytes=12 << 20)
    await running.start()
    try:
        async with (
            cluster(tmp_path, say(ANSWER), controllers=(f"127.0.0.1:{running.port}",)) as made,
            made.openai() as c,
        ):
            for _ in range(2):
                with pytest.raises(openai.RateLimitError, match="storage"):
                    await c.files.create(file=("a.jsonl", b"x" * (20 << 20)), purpose="batch")
                assert (await c.files.list()).data == []
            file = await c.files.create(file=("a.jsonl", b"x" * (10 << 20)), purpose="batch")
            assert file.status == "processed"
    finally:
        await running.stop(0.1)


async def test_a_batch_that_nobody_would_run_is_none(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    put = ObjectClient.put

    async def full(client: ObjectClient, key: ObjectKey, *args: Any, **kwargs: Any) -> Written:
        if key.kind == "batch-work":
            raise OverloadedError("the storage is full")
        return await put(client, key, *args, **kwargs)

    async with stored.cluster.openai() as client:
        file = await client.files.create(file=("a.jsonl", json.dumps(LINE).encode()), purpose="batch")
        monkeypatch.setattr(ObjectClient, "put", full)
        with pytest.raises(openai.RateLimitError, match="full"):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        assert (await client.batches.list()).data == []


async def test_a_batch_file_may_begin_with_a_byte_order_mark(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "LOOK_S", 0.2)
    content = b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\r\n"
    async with stored.cluster.openai() as client:
        file = await client.files.create(file=("a.jsonl", content), purpose="batch")
        made = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        done = await ended(lambda: client.batches.retrieve(made.id))
        assert (done.status, done.errors) == ("completed", None)


async def test_a_cancel_before_it_began_is_not_run_over(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another router, between the answer that it is queued and its start."""
    put = ObjectClient.put

    async def cancelled_meanwhile(client: ObjectClient, key: ObjectKey, data: bytes, **kwargs: Any) -> Written:
        if b'"in_progress"' in data:
            cancelled = data.replace(b'"in_progress"', b'"cancelled"')
            assert (await put(client, key, cancelled, **kwargs)).stored
        return await put(client, key, data, **kwargs)

    monkeypatch.setattr(ObjectClient, "put", cancelled_meanwhile)
    async with stored.cluster.openai() as client:
        made = await client.responses.create(model=MODEL, input="One", background=True)
        await ended(lambda: client.responses.retrieve(made.id))
        gateway = stored.cluster.router.gateway
        assert gateway is not None
        await until(lambda: not gateway.in_flight)
        await asyncio.sleep(0.2)  # for what it might store at its end
        assert (await client.responses.retrieve(made.id)).status == "cancelled"


async def test_an_answer_outlives_a_controller_that_is_away(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a response in the background, whose text is nowhere else."""
    monkeypatch.setattr(responses, "RENEW_S", 0.2)
    first = controller(server, namespace := fresh_namespace())
    await first.start()
    await eventually(lambda: first.hub.synced)
    address, slow = f"127.0.0.1:{first.port}", say(ANSWER, delay_s=0.02)
    async with cluster(tmp_path, slow, controllers=(address,)) as made, made.openai() as client:
        gateway = made.router.gateway
        assert gateway is not None
        asked = await client.responses.create(model=MODEL, input="One", background=True)
        await until(lambda: bool(made.worker.entries))
        await first.stop(0.1)
        await until(lambda: not gateway.in_flight)
        await asyncio.sleep(0.5)  # it is tried in vain
        again = controller(server, namespace, first.port)
        await again.start()
        try:
            await until(lambda: again.hub.synced)
            await eventually_text(client, asked.id, ANSWER)
        finally:
            await again.stop(0.1)


async def eventually_text(client: openai.AsyncOpenAI, id_: str, text: str) -> None:
    found = ""
    async with asyncio.timeout(20):
        while found != text:
            await asyncio.sleep(0.05)
            with contextlib.suppress(openai.InternalServerError):  # 503 until the controller is found again
                found = (await client.responses.retrieve(id_)).output_text


async def test_items_of_an_input_come_in_pages(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        items: Any = [{"role": "user", "content": f"{number}"} for number in range(25)]
        made = await client.responses.create(model=MODEL, input=items)
        listing = client.responses.input_items.list
        page = await listing(made.id)
        assert ([item.content for item in page.data], page.has_more) == ([f"{n}" for n in range(24, 4, -1)], True)
        assert [item.content async for item in listing(made.id)] == [f"{n}" for n in range(24, -1, -1)]
        assert [item.content async for item in listing(made.id, limit=7, order="asc")] == [f"{n}" for n in range(25)]
        page = await listing(made.id, limit=2, after=page.data[2].id)
        assert [item.content for item in page.data] == ["21", "20"]
        for wrong in ({"limit": 101}, {"limit": 0}):
            with pytest.raises(openai.BadRequestError, match="limit"):
                await listing(made.id, **wrong)
        with pytest.raises(openai.NotFoundError, match="item_none"):
            await listing(made.id, after="item_none")
