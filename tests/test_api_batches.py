"""`/v1/files` and `/v1/batches`: offline work through the official client, over restarts, cancels and windows."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_support import Stored, controller, ended, stored_cluster
from redis_support import RedisServer, fresh_namespace, server
from router_support import MODEL, Script, cluster, say, tokenizer, until

from common.config.schema import RouterConfig
from common.errors import InvalidRequestError, OverloadedError, UnavailableError
from common.rpc.objects import ObjectClient
from common.types import GenerationRequest
from services.router.api import batch_runner
from services.router.api.batches import work_key
from services.router.api.files import Files
from services.router.server import Router

__all__ = ["server"]

ANSWER = "Because molecules scatter blue light."


FORM = (
    b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--x\r\ncontent-disposition: form-data; name="file"; filename="\\ud800.jsonl"\r\n\r\nhi\r\n--x--\r\n'
)
NESTED: Any = functools.reduce(lambda inner, _: {"a": inner}, range(300), "x")


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "LOOK_S", 0.2)
    monkeypatch.setattr(batch_runner, "RENEW_S", 0.2)
    monkeypatch.setattr(batch_runner, "CLAIM_S", 1.0)
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.1)


@pytest.fixture
async def stored(server: RedisServer, tmp_path: Path) -> AsyncIterator[Stored]:
    async with stored_cluster(server, tmp_path / "model", say(ANSWER)) as made:
        yield made


async def unreachable(*_: Any) -> bool:
    raise UnavailableError("no controller answers")


def line(number: int, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": f"line {number}", "max_tokens": 50, **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": url, "body": body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in lines)


async def upload(client: openai.AsyncOpenAI, content: bytes) -> Any:
    return await client.files.create(file=("in.jsonl", content), purpose="batch")


async def begin(client: openai.AsyncOpenAI, lines: list[dict[str, Any]], **kwargs: Any) -> Any:
    file = await upload(client, jsonl(lines))
    asked: Any = {"endpoint": "/v1/completions", "completion_window": "24h", **kwargs}
    return await client.batches.create(input_file_id=file.id, **asked)


async def rows(client: openai.AsyncOpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    text = (await client.files.content(file_id)).text
    return [json.loads(row) for row in text.splitlines()]


async def test_files_come_and_go(stored: Stored) -> None:
    content = bytes(range(256)) * 10_000  # several parts
    async with stored.cluster.openai() as client:
        made = await client.files.create(
            file=("a.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (made.bytes, made.filename, made.purpose) == (len(content), "a.jsonl", "batch")
        assert made.expires_at == made.created_at + 3600
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == content
        empty = await upload(client, b"")
        assert (await client.files.content(empty.id)).content == b""
        assert {file.id async for file in client.files.list()} == {made.id, empty.id}
        page = await client.files.list(limit=1)
        assert (page.has_more, len(page.data)) == (True, 1)
        assert (await client.files.delete(made.id)).deleted
        for lost in (client.files.retrieve(made.id), client.files.content(made.id), client.files.delete(made.id)):
            with pytest.raises(openai.NotFoundError):
                await lost


async def test_files_of_a_purpose_are_all_found(stored: Stored) -> None:
    """However many others were made in between."""
    objects = ObjectClient((f"127.0.0.1:{stored.controller.port}",))
    files = Files(objects, ttl_s=3600, max_bytes=1)
    async with stored.cluster.openai() as client:
        mine = []
        for round_ in range(3):
            mine.append((await upload(client, b"x")).id)
            for i in range(round_ * 60):
                await files.write("", f"file-{round_}x{i}", "out.jsonl", "batch_output", 3600)
        assert [file.id async for file in client.files.list(purpose="batch")] == mine[::-1]
        assert [file.id async for file in client.files.list(purpose="batch", limit=1)] == mine[::-1]
        page = await client.files.list(purpose="batch", limit=3)
        assert (page.has_more, len(page.data)) == (False, 3)
        assert len([file async for file in client.files.list(purpose="batch_output")]) == 180
        for wrong, param in (({"order": "asc"}, "order"), ({"after": "file-none"}, "after"), ({"after": "?"}, "after")):
            with pytest.raises(openai.APIStatusError) as refused:
                await client.files.list(**wrong)
            assert (refused.value.param, refused.value.code) in ((param, None), (param, "not_found"))
    await objects.close()


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "batch"}}, "file"),
        ({"json": {"purpose": "batch"}}, "file"),
        ({"data": {"purpose": "vision"}, "files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "batch", "expires_after[seconds]": "5"}, "files": {"file": b"x"}}, "expires_after"),
        ({"content": b"--x\r\nwrong", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "file"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, "file"),
        ({"content": FORM, "headers": {"content-type": "multipart/form-data; boundary=x; charset=undefined"}}, "file"),
    ],
)
async def test_wrong_uploads_are_refused(stored: Stored, form: dict[str, Any], param: str) -> None:
    answer = await stored.cluster.http.post("/v1/files", **form)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in (param, "purpose")


async def test_a_name_that_is_no_unicode_is_made_one(stored: Stored) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    made = await stored.cluster.http.post("/v1/files", content=FORM, headers=kind)
    assert (made.status_code, made.json()["filename"]) == (200, "?.jsonl")


async def test_a_large_upload_is_refused(server: RedisServer, tmp_path: Path) -> None:
    async with stored_cluster(server, tmp_path, say(ANSWER), max_file_bytes=2**20) as made:
        small = await made.cluster.http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"x" * 2**20})
        assert small.status_code == 200
        for size in (2**20 + 1, 2**22):
            large = await made.cluster.http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"x" * size})
            assert large.status_code in (400, 413)


async def test_a_batch_runs_to_its_end(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        bad = line(3, max_tokens=-1)
        made = await begin(client, [line(1), line(2), bad, line(4)], metadata={"a": "b"})
        assert made.status == "validating"
        done = await ended(lambda: client.batches.retrieve(made.id))
        assert (done.status, done.metadata) == ("completed", {"a": "b"})
        counts = done.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
        good = {row["custom_id"]: row for row in await rows(client, done.output_file_id)}
        assert sorted(good) == ["c1", "c2", "c4"]
        response = good["c1"]["response"]
        assert (response["status_code"], good["c1"]["error"]) == (200, None)
        assert response["request_id"]
        assert response["body"]["choices"][0]["text"] == ANSWER
        wrong = await rows(client, done.error_file_id)
        assert [(row["custom_id"], row["response"]["status_code"]) for row in wrong] == [("c3", 400)]
        assert wrong[0]["response"]["body"]["error"]["param"] == "max_tokens"
        assert {request.priority for request in stored.cluster.worker.requests} == {1000}
        assert [batch.id async for batch in client.batches.list()] == [made.id]
        file = await client.files.retrieve(done.output_file_id or "")
        assert (file.purpose, file.bytes) == ("batch_output", len((await client.files.content(file.id)).content))
        with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
            await client.batches.cancel(made.id)


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
async def test_other_endpoints(stored: Stored, url: str) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
        "/v1/responses": {"input": "Hi"},
        "/v1/embeddings": {"input": "Hi"},
    }
    row = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": MODEL, **bodies[url]}}
    async with stored.cluster.openai() as client:
        done = (
            await ended(lambda: client.batches.retrieve(made.id))
            if (made := await begin(client, [row], endpoint=url))
            else None
        )
        assert done is not None
        if url == "/v1/embeddings":
            assert (await rows(client, done.error_file_id))[0]["response"]["status_code"] == 400
        else:
            assert (await rows(client, done.output_file_id))[0]["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("content", "code", "at"),
    [
        (b"", "empty_file", None),
        (b"nonsense\n", "invalid_json_line", 1),
        (jsonl([line(1), line(1)]), "duplicate_custom_id", 2),
        (jsonl([line(1), line(2, "/v1/chat/completions")]), "mismatched_url", 2),
        (jsonl([line(1, stream=True)]), "invalid_request", 1),
        (jsonl([line(1) | {"method": "GET"}]), "invalid_method", 1),
        (jsonl([line(1) | {"body": 3}]), "missing_required_parameter", 1),
        (jsonl([line(1), line(2, metadata=NESTED)]), "invalid_request", 2),
    ],
)
async def test_wrong_input_fails_the_batch(stored: Stored, content: bytes, code: str, at: int | None) -> None:
    async with stored.cluster.openai() as client:
        file = await upload(client, content)
        made = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        done = await ended(lambda: client.batches.retrieve(made.id))
        assert (done.status, done.output_file_id) == ("failed", None)
        assert done.errors is not None
        assert done.errors.data is not None
        assert (done.errors.data[0].code, done.errors.data[0].line) == (code, at)
        assert stored.cluster.worker.requests == []


async def test_priorities_stay_behind_everything_interactive(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        given = (None, -5, 7, 2**31 - 1, 2**31, 2**64 - 1)
        made = await begin(client, [line(i, **({} if p is None else {"priority": p})) for i, p in enumerate(given)])
        done = await ended(lambda: client.batches.retrieve(made.id))
        assert sorted(r.priority for r in stored.cluster.worker.requests) == [1000, 1000, 1007, 2**31 - 1]
        wrong = {row["custom_id"]: row["response"]["body"] for row in await rows(client, done.error_file_id)}
        assert {name: body["error"]["param"] for name, body in wrong.items()} == {"c4": "priority", "c5": "priority"}


async def test_a_batch_that_ends_by_a_fault_takes_nothing_along(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot: a line that was about to begin has it."""
    async with stored_cluster(server, tmp_path, say(ANSWER), batch_concurrency=1) as made:

        async def full(*_: Any) -> None:
            raise InvalidRequestError("the results are too large")

        async with made.cluster.openai() as client:
            with monkeypatch.context() as patched:
                patched.setattr(batch_runner.BatchRunner, "_keep", full)
                first = await begin(client, [line(i) for i in range(3)])
                faulty = await ended(lambda: client.batches.retrieve(first.id))
            assert (faulty.status, faulty.errors.data[0].code) == ("failed", "results_too_large")
            second = await begin(client, [line(i) for i in range(3)])
            done = await ended(lambda: client.batches.retrieve(second.id))
            assert (done.status, done.request_counts.completed) == ("completed", 3)


async def test_wrong_batches_are_refused(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.batches.create(input_file_id="no", endpoint="/v1/completions", completion_window="24h")
        assert missing.value.param == "input_file_id"
        file = await upload(client, jsonl([line(1)]))
        wrong: Any = {"endpoint": "/v1/completions", "completion_window": "soon"}
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(input_file_id=file.id, **wrong)
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_no")


async def test_what_is_refused_for_now_waits(server: RedisServer, tmp_path: Path) -> None:
    asked: Counter[str] = Counter()

    def script(request: GenerationRequest) -> Script:
        prompt = tokenizer().decode(request.prompt_token_ids)
        asked[prompt] += 1
        refuse = OverloadedError("full") if asked[prompt] < 3 else None
        return say(ANSWER, refuse=refuse)(request)

    async with stored_cluster(server, tmp_path, script) as made, made.cluster.openai() as client:
        batch = await begin(client, [line(i) for i in range(5)])
        done = await ended(lambda: client.batches.retrieve(batch.id))
        assert (done.status, done.request_counts.completed) == ("completed", 5)


async def test_a_cancel_keeps_what_is_done(server: RedisServer, tmp_path: Path) -> None:
    def script(request: GenerationRequest) -> Script:
        slow = tokenizer().decode(request.prompt_token_ids) != "line 0"
        return say(ANSWER, delay_s=1.0 if slow else 0.0)(request)

    async with stored_cluster(server, tmp_path, script, batch_concurrency=2) as made, made.cluster.openai() as client:
        batch = await begin(client, [line(i) for i in range(50)])
        await until(lambda: len(made.cluster.worker.entries) >= 3)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(lambda: client.batches.retrieve(batch.id))
        assert (done.status, done.request_counts.total, done.request_counts.completed) == ("cancelled", 50, 1)
        assert [row["custom_id"] for row in await rows(client, done.output_file_id)] == ["c0"]
        assert done.error_file_id is None
        workers = made.cluster.worker.entries.values()
        await until(lambda: all(entry.cancelled_at or entry.task.done() for entry in workers if entry.task))
        assert len(made.cluster.worker.entries) < 10


async def test_a_window_that_ends_leaves_expired_lines(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = say(ANSWER, delay_s=0.5)
    async with stored_cluster(server, tmp_path, script, batch_concurrency=1) as made, made.cluster.openai() as client:
        batch = await begin(client, [line(0, max_tokens=1), line(1), line(2)])
        await until(lambda: len(made.cluster.worker.entries) == 2, 10)
        later = time.time() + 90_000
        monkeypatch.setattr(batch_runner.time, "time", lambda: later)
        done = await ended(lambda: client.batches.retrieve(batch.id))
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("expired", 1, 2)
        assert [row["custom_id"] for row in await rows(client, done.output_file_id)] == ["c0"]
        lost = await rows(client, done.error_file_id)
        assert [(row["custom_id"], row["response"], row["error"]["code"]) for row in lost] == [
            ("c1", None, "batch_expired"),
            ("c2", None, "batch_expired"),
        ]


@pytest.mark.parametrize("orderly", [True, False])
async def test_another_router_goes_on_where_one_left(
    server: RedisServer, tmp_path: Path, orderly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has a result is not run again, whether the first router gave its claim back or died with it."""
    made = controller(server, fresh_namespace())
    await made.start()
    asked: Counter[str] = Counter()

    def script(request: GenerationRequest) -> Script:
        asked[tokenizer().decode(request.prompt_token_ids)] += 1
        return say(ANSWER, delay_s=0.01)(request)

    address = (f"127.0.0.1:{made.port}",)
    async with cluster(tmp_path, script, controllers=address, batch_concurrency=3) as first:
        second = Router(RouterConfig(host="127.0.0.1", port=0, controllers=address, batch_concurrency=3), first.members)
        async with first.openai() as client:
            batch = await begin(client, [line(i) for i in range(40)])
            await until(lambda: len(asked) > 10)
            apis = first.router._apis
            assert apis is not None
            assert apis._runner is not None
            if not orderly:
                monkeypatch.setattr(apis.objects, "claim", unreachable)
            await apis._runner.close()  # its lines are cut
            stored_before = set(await apis.objects.list_parts(work_key(batch.id)))
            assert 0 < len(stored_before) < 40
            before = Counter(asked)
            await second.start()
            try:
                done = await ended(lambda: client.batches.retrieve(batch.id))
            finally:
                await second.stop(grace_s=0.5)
            assert (done.status, done.request_counts.completed) == ("completed", 40)
            assert sorted(int(row["custom_id"][1:]) for row in await rows(client, done.output_file_id)) == [*range(40)]
            again = {int(prompt.split()[1]) for prompt, count in asked.items() if count > before[prompt]}
            assert again.isdisjoint(stored_before)
            assert again | stored_before == set(range(40))
    await made.stop(0.1)


async def test_a_controller_that_is_away_for_a_while(server: RedisServer, tmp_path: Path) -> None:
    namespace = fresh_namespace()
    made = controller(server, namespace)
    await made.start()
    port = made.port
    async with cluster(tmp_path, say(ANSWER, delay_s=0.02), controllers=(f"127.0.0.1:{port}",)) as running:
        async with running.openai() as client:
            batch = await begin(client, [line(i) for i in range(30)])
            await until(lambda: len(running.worker.entries) > 5)
            await made.stop(0.1)
            with pytest.raises(openai.InternalServerError):
                await client.batches.retrieve(batch.id)
            await asyncio.sleep(0.5)
            made = controller(server, namespace, port)
            await made.start()
            patient = client.with_options(max_retries=10)  # the router's connection comes back by itself
            done = await ended(lambda: patient.batches.retrieve(batch.id))
            assert (done.status, done.request_counts.completed) == ("completed", 30)
            assert len(await rows(client, done.output_file_id)) == 30
    await made.stop(0.1)


async def test_owners_see_their_own_alone(server: RedisServer, tmp_path: Path) -> None:
    async with stored_cluster(server, tmp_path, say(ANSWER), api_keys=("key-one", "key-two")) as made:
        url = f"{made.cluster.url}/v1"
        one = openai.AsyncOpenAI(base_url=url, api_key="key-one", max_retries=0)
        two = openai.AsyncOpenAI(base_url=url, api_key="key-two", max_retries=0)
        async with one, two:
            batch = await begin(one, [line(1)])
            done = await ended(lambda: one.batches.retrieve(batch.id))
            assert done.status == "completed"
            for lost in (two.batches.retrieve(batch.id), two.files.content(done.output_file_id or "")):
                with pytest.raises(openai.NotFoundError):
                    await lost
            assert [b async for b in two.batches.list()] == []
            assert [f async for f in two.files.list()] == []
            response = await one.responses.create(model=MODEL, input="x")
            with pytest.raises(openai.NotFoundError):
                await two.responses.retrieve(response.id)
