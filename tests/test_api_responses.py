"""`/v1/responses` as its clients meet it: whole and streamed, through the official client, stored and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_support import PARSERS, Stored, ended, stored_cluster, typed_events
from redis_support import RedisServer, server
from router_support import MAX_MODEL_LEN, MODEL, Cluster, Script, cluster, say, tokenizer, until

from common.types import Failure, GenerationRequest, RequestStats
from services.router.relay import Relay

__all__ = ["server"]

ANSWER = "Hello, world! 你好 🙂 Because molecules scatter blue light."
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "add",
        "description": "",
        "strict": False,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    }
]


@pytest.fixture
async def stored(server: RedisServer, tmp_path: Path) -> AsyncIterator[Stored]:
    async with stored_cluster(server, tmp_path / "model", say(ANSWER)) as made:
        yield made


def prompt_of(made: Cluster, index: int = -1) -> str:
    return tokenizer().decode(made.worker.requests[index].prompt_token_ids, skip_special_tokens=False)


async def test_whole_and_streamed_are_the_same_response(stored: Stored) -> None:
    asked: Any = {"model": MODEL, "input": "Why is the sky blue?", "instructions": "Be brief.", "seed": 1}
    asked["extra_body"] = {"seed": asked.pop("seed")}
    async with stored.cluster.openai() as client:
        whole = await client.responses.create(**asked, metadata={"a": "b"})
        assert (whole.output_text, whole.status, whole.error) == (ANSWER, "completed", None)
        assert whole.id.startswith("resp_")
        assert whole.metadata == {"a": "b"}
        assert whole.usage is not None
        assert whole.usage.input_tokens == len(stored.cluster.worker.requests[0].prompt_token_ids)
        assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
        assert whole.store is True
        async with client.responses.stream(**asked) as stream:
            seen = [event async for event in stream]
            streamed = await stream.get_final_response()
    assert streamed.output_text == ANSWER
    assert streamed.usage == whole.usage
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    names = [event.type for event in seen if event.type != "response.output_text.delta"]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert prompt_of(stored.cluster) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_calls_are_items(tmp_path: Path, stream: bool) -> None:
    text = f"<think>It is a sum.</think>I add them.{CALL}{CALL}"
    async with cluster(tmp_path, say(text), max_model_len=2048, **PARSERS) as made, made.openai() as client:
        asked: Any = {"model": MODEL, "input": "1 + 2?", "tools": TOOLS, "store": False}
        if stream:
            async with client.responses.stream(**asked) as events:
                seen = [event async for event in events]
                response = await events.get_final_response()
            deltas = [e.delta for e in seen if e.type == "response.function_call_arguments.delta"]
            done = [e.arguments for e in seen if e.type == "response.function_call_arguments.done"]
            assert "".join(deltas) == "".join(done)
            assert "".join(e.delta for e in seen if e.type == "response.reasoning_text.delta") == "It is a sum."
        else:
            response = await client.responses.create(**asked)
        assert response.usage is not None
        counted = response.usage.output_tokens_details.reasoning_tokens
        assert counted == len(tokenizer().encode("It is a sum.</think>")) - 1  # the mark is whole with its last token
        reasoning, message, first, second = response.output
        assert reasoning.type == "reasoning"
        assert reasoning.content is not None
        assert reasoning.content[0].text == "It is a sum."
        assert message.type == "message"
        assert response.output_text == "I add them."
        assert first.type == second.type == "function_call"
        assert (first.name, json.loads(first.arguments)) == ("add", {"a": 1, "b": 2})
        assert first.call_id != second.call_id

        given: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": "1 + 2?"}]},
            *(item.model_dump(exclude_none=True) for item in response.output),
            {"type": "function_call_output", "call_id": first.call_id, "output": "3"},
            {"type": "function_call_output", "call_id": second.call_id, "output": "3"},
        ]
        for item in given:
            item.pop("parsed_arguments", None)
        await client.responses.create(model=MODEL, input=given, tools=TOOLS, store=False)
        text = prompt_of(made)
        assert "<|im_start|>assistant\nI add them.<|im_end|>" in text
        assert text.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_one_response_follows_another(stored: Stored, stream: bool) -> None:
    async with stored.cluster.openai() as client:
        first = await client.responses.create(model=MODEL, input="One", instructions="Be brief.")
        second = await client.responses.create(model=MODEL, input="Two", previous_response_id=first.id, stream=stream)
        if stream:
            events = [event async for event in second]
            second = events[-1].response
        assert second.previous_response_id == first.id
        assert prompt_of(stored.cluster) == (
            f"<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
            "<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n"
        )
        got = await client.responses.retrieve(second.id)
        assert got.output_text == ANSWER
        assert got == second
        items = await client.responses.input_items.list(first.id)
        assert items.data[0].content[0].text == "One"
        await client.responses.delete(first.id)
        for lost in (client.responses.retrieve(first.id), client.responses.delete(first.id)):
            with pytest.raises(openai.NotFoundError, match="not found"):
                await lost
        with pytest.raises(openai.NotFoundError) as wrong:
            await client.responses.create(model=MODEL, input="Two", previous_response_id=first.id)
        assert wrong.value.param == "previous_response_id"
        unstored = await client.responses.create(model=MODEL, input="One", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unstored.id)


async def test_choices_of_tools(tmp_path: Path) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    async with cluster(tmp_path, say(f"{CALL}{CALL}"), max_model_len=2048, **PARSERS) as made, made.openai() as client:
        for choice, grammar in (
            ("auto", False),
            ("required", True),
            ({"type": "function", "name": "add"}, True),
            (allowed, True),
        ):
            asked: Any = {"model": MODEL, "input": "1 + 2?", "tools": TOOLS, "tool_choice": choice, "store": False}
            response = await client.responses.create(**asked)
            assert (made.worker.requests[-1].sampling.grammar is not None) == grammar
            assert response.output[0].type == "function_call"
            one = await client.responses.create(**asked, parallel_tool_calls=False)
            assert len(one.output) == 1
        for wrong in ({"type": "file_search"}, {"type": "function"}, allowed | {"tools": 5}):
            with pytest.raises(openai.BadRequestError):
                await client.responses.create(**{**asked, "tool_choice": wrong})


@pytest.mark.parametrize("broken", [f"{CALL[:55]}\n</tool_call>", CALL[:55]], ids=["broken", "cut"])
async def test_a_conversation_goes_on_after_a_call_that_is_no_json(
    server: RedisServer, tmp_path: Path, broken: str
) -> None:
    """As stored and as given back; with a model that broke its call there is a result to tell it so."""
    async with (
        stored_cluster(server, tmp_path, say(broken), max_model_len=2048, **PARSERS) as stored,
        stored.cluster.openai() as client,
    ):
        asked: Any = {"model": MODEL, "tools": TOOLS}
        first = await client.responses.create(**asked, input="1 + 2?")
        (call,) = first.output
        assert call.type == "function_call"
        with pytest.raises(json.JSONDecodeError):
            json.loads(call.arguments)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "not JSON"}
        question: Any = {"role": "user", "content": "1 + 2?"}
        await client.responses.create(**asked, input=[result], previous_response_id=first.id)
        await client.responses.create(**asked, input=[question, call.model_dump(exclude_none=True), result])
        _, follows, given = (request.prompt_token_ids for request in stored.cluster.worker.requests)
        assert follows == given
        assert prompt_of(stored.cluster).endswith("tool\nnot JSON<|im_end|>\n<|im_start|>assistant\n")


async def test_one_key_of_requests_that_belong_together(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[str] = []
    start = Relay.start

    def noting(relay: Relay, request: GenerationRequest, *args: Any) -> Any:
        sessions.append(args[-1].session)
        return start(relay, request, *args)

    monkeypatch.setattr(Relay, "start", noting)
    for keys in ({"user": "u"}, {"user": "u", "prompt_cache_key": "k"}):
        await stored.cluster.post("/v1/responses", model=MODEL, input="One", store=False, **keys)
    assert sessions == ["u", "k"]


async def test_cut_answers_are_incomplete(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        whole = await client.responses.create(model=MODEL, input="One", max_output_tokens=4)
        assert (whole.status, whole.output[0].status) == ("incomplete", "incomplete")
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        events = [
            e async for e in await client.responses.create(model=MODEL, input="1", max_output_tokens=4, stream=True)
        ]
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.status == "incomplete"


async def test_logprobs(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        asked: Any = {"model": MODEL, "input": "One", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
        whole = await client.responses.create(**asked)
        found = whole.output[0].content[0].logprobs
        assert b"".join(bytes(entry.bytes) for entry in found).decode() == f"{ANSWER}<|im_end|>"
        assert {len(entry.top_logprobs) for entry in found} == {2}
        async with client.responses.stream(**asked) as stream:
            deltas = [e async for e in stream if e.type == "response.output_text.delta"]
        assert sum(len(delta.logprobs) for delta in deltas) == len(found)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "required"),
        ({"input": [3]}, "input[0]", "object"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "not supported"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "string"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"input": "x", "max_output_tokens": MAX_MODEL_LEN}, "max_output_tokens", "max_output_tokens"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type", "functions"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice", "with tools only"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "with tools only"),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}},
            "text.format.json_schema",
            "Unrecognized",
        ),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": 5}}}, "text.format", "text.format.name"),
        ({"input": [{"role": "user", "content": "x", "other": 10**30}]}, "input", "64-bit"),
        ({"input": "x", "stream": True, "tools": [*TOOLS, {"type": "function", "x": 10**30}]}, "tools", "64-bit"),
        ({"input": "x", "tools": TOOLS, "tool_choice": {"type": "function", "x": -(10**30)}}, "tool_choice", "64-bit"),
        ({"input": "x", "max_output_tokens": 10**30, "background": True}, "max_output_tokens", "64-bit"),
        ({"input": "x", "temperature": -1}, "temperature", "between 0 and 100"),
        ({"input": "x", "wrong": 1}, "wrong", "Unrecognized"),
        ({"input": "x", "background": True, "stream": True}, "background", "not streamed"),
        ({"input": "y" * 5000}, "input", "maximum context length"),
    ],
)
async def test_errors_name_the_field(stored: Stored, body: dict[str, Any], param: str, message: str) -> None:
    answer = await stored.cluster.post("/v1/responses", model=MODEL, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert answer.headers["x-request-id"]


async def test_a_stream_that_fails_has_one_terminal_event(tmp_path: Path) -> None:
    failing = say(ANSWER, fail_at=3, failure=Failure("invalid_request", "it broke"))
    async with cluster(tmp_path, failing) as made:
        answer = await made.post("/v1/responses", model=MODEL, input="x", stream=True)
        events = [json.loads(data) for _, data in typed_events(answer.text)]
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["message"] == "it broke"
        assert [e["type"] for e in events].count("response.failed") == 1
        assert [e["response"]["store"] for e in (events[0], events[-1])] == [True, False]
        whole = await made.post("/v1/responses", model=MODEL, input="x")
        assert (whole.status_code, whole.json()["error"]["message"]) == (400, "it broke")


async def test_without_a_controller_it_answers_and_stores_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(ANSWER), controllers=("127.0.0.1:9",)) as made:
        whole = await made.post("/v1/responses", model=MODEL, input="x")
        assert (whole.status_code, whole.json()["store"]) == (200, False)
        stream = await made.post("/v1/responses", model=MODEL, input="x", stream=True)
        assert json.loads(typed_events(stream.text)[-1][1])["response"]["store"] is False
        lost = await made.http.get(f"/v1/responses/{whole.json()['id']}")
        assert lost.status_code == 503


async def test_background(server: RedisServer, tmp_path: Path) -> None:
    hold = asyncio.Event()

    def script(request: GenerationRequest) -> Script:
        return say(ANSWER, delay_s=0.0 if hold.is_set() else 0.3)(request)

    async with stored_cluster(server, tmp_path, script) as stored, stored.cluster.openai() as client:
        slow = await client.responses.create(model=MODEL, input="One", background=True)
        assert slow.status == "queued"
        await until(lambda: len(stored.cluster.worker.entries) == 1)
        assert (await client.responses.retrieve(slow.id)).status == "in_progress"
        cancelled = await client.responses.cancel(slow.id)
        assert cancelled.status == "cancelled"
        await until(lambda: stored.cluster.worker.entries[1].cancelled_at > 0)
        assert (await client.responses.retrieve(slow.id)).status == "cancelled"

        hold.set()
        made = await client.responses.create(model=MODEL, input="One", background=True)
        got = await ended(lambda: client.responses.retrieve(made.id))
        assert (got.status, got.output_text, got.id) == ("completed", ANSWER, made.id)
        with pytest.raises(openai.BadRequestError, match="background"):
            await client.responses.cancel((await client.responses.create(model=MODEL, input="One")).id)
        follows = await client.responses.create(model=MODEL, input="Two", previous_response_id=made.id)
        assert follows.status == "completed"


async def test_usage_is_that_of_the_worker(tmp_path: Path) -> None:
    counted = say(ANSWER, stats=RequestStats(cached_tokens=3, remote_cached_tokens=2))
    async with cluster(tmp_path, counted) as made:
        whole = (await made.post("/v1/responses", model=MODEL, input="Why is the sky blue?", store=False)).json()
        assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 5
