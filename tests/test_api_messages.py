"""`/v1/messages` as Anthropic's client meets it: blocks, tools, thinking, events in order, errors in its form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from api_support import PARSERS, anthropic_client, typed_events
from router_support import MODEL, Cluster, Script, cluster, say, tokenizer

from common.types import Failure, GenerationRequest, RequestStats

ANSWER = "Hello, world! 你好 🙂 Because molecules scatter blue light."
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
TOOLS: list[Any] = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]
ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Why?"}]}


@pytest.fixture
async def tiny(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path / "model", say(ANSWER)) as made:
        yield made


def prompt_of(made: Cluster, index: int = -1) -> str:
    return tokenizer().decode(made.worker.requests[index].prompt_token_ids, skip_special_tokens=False)


async def test_whole_and_streamed_are_the_same_message(tiny: Cluster) -> None:
    async with anthropic_client(tiny) as client:
        whole = await client.messages.create(**ASKED, system="Be brief.")
        assert whole.content[0].type == "text"
        assert (whole.content[0].text, whole.stop_reason, whole.stop_sequence) == (ANSWER, "end_turn", None)
        assert whole.id.startswith("msg_")
        assert whole.usage.input_tokens == len(tiny.worker.requests[0].prompt_token_ids)
        assert whole.usage.output_tokens == len(tokenizer().encode(ANSWER)) + 1
        async with client.messages.stream(**ASKED, system=[{"type": "text", "text": "Be brief."}]) as stream:
            seen = [event async for event in stream]
            streamed = await stream.get_final_message()
        counted = await client.messages.count_tokens(model=MODEL, messages=ASKED["messages"], system="Be brief.")
    assert [block.text for block in streamed.content] == [ANSWER]
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)
    assert counted.input_tokens == whole.usage.input_tokens
    assert seen[0].type == "message_start"
    assert seen[0].message.usage.input_tokens == whole.usage.input_tokens
    prompts = {request.prompt_token_ids for request in tiny.worker.requests}
    assert len(prompts) == 1
    assert prompt_of(tiny).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>")


async def test_events_come_in_order(tiny: Cluster) -> None:
    answer = await tiny.post("/v1/messages", **ASKED, stream=True)
    events = typed_events(answer.text)
    assert all(json.loads(data)["type"] == name for name, data in events)
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    deltas = [json.loads(data)["delta"] for name, data in events if name == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_and_tools_are_blocks(tmp_path: Path, stream: bool) -> None:
    text = f"<think>It is a sum.</think>I add them.{CALL}{CALL}"
    async with cluster(tmp_path, say(text), max_model_len=2048, **PARSERS) as made, anthropic_client(made) as client:
        asked: Any = {
            **ASKED,
            "tools": TOOLS,
            "max_tokens": 500,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }
        if stream:
            async with client.messages.stream(**asked) as events:
                message = await events.get_final_message()
        else:
            message = await client.messages.create(**asked)
        assert message.stop_reason == "tool_use"
        thinking, said, first, second = message.content
        assert thinking.type == "thinking"
        assert (thinking.thinking, said.type) == ("It is a sum.", "text")
        assert first.type == second.type == "tool_use"
        assert (first.name, first.input) == ("add", {"a": 1, "b": 2})
        assert first.id != second.id

        result: Any = [
            {"type": "tool_result", "tool_use_id": first.id, "content": "3"},
            {"type": "tool_result", "tool_use_id": second.id, "content": [{"type": "text", "text": "3"}]},
            {"type": "text", "text": "Go on."},
        ]
        turns: Any = [
            *ASKED["messages"],
            {"role": "assistant", "content": [block.model_dump() for block in message.content]},
            {"role": "user", "content": result},
        ]
        await client.messages.create(**{**asked, "messages": turns})
        assert prompt_of(made).endswith(
            "<|im_start|>assistant\nI add them.<|im_end|>\n"
            "<|im_start|>tool\n3<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n"
            "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("given", [f'{{"a": {10**30}}}', '{"a":' * 300 + "1" + "}" * 300], ids=["large", "deep"])
async def test_a_calls_input_is_what_the_model_wrote(tmp_path: Path, given: str) -> None:
    text = f'<tool_call>\n{{"name": "add", "arguments": {given}}}\n</tool_call>'
    async with cluster(tmp_path, say(text), max_model_len=8192, **PARSERS) as made:
        asked = {**ASKED, "tools": TOOLS, "max_tokens": 4000}
        (call,) = (await made.post("/v1/messages", **asked)).json()["content"]
        assert call["input"] == json.loads(given)
        events = typed_events((await made.post("/v1/messages", **asked, stream=True)).text)
        deltas = [json.loads(data)["delta"] for name, data in events if name == "content_block_delta"]
        assert "".join(delta["partial_json"] for delta in deltas) == given


async def test_a_tool_by_name_is_a_reason_to_stop(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(CALL), max_model_len=2048, **PARSERS) as made, anthropic_client(made) as client:
        choice: Any = {"type": "tool", "name": "add"}
        message = await client.messages.create(**{**ASKED, "tools": TOOLS, "tool_choice": choice, "max_tokens": 500})
    assert (message.stop_reason, [block.type for block in message.content]) == ("tool_use", ["tool_use"])


async def test_reasons_to_stop(tiny: Cluster) -> None:
    async with anthropic_client(tiny) as client:
        cut = await client.messages.create(**{**ASKED, "max_tokens": 3})
        assert cut.stop_reason == "max_tokens"
        for stream in (False, True):
            if stream:
                async with client.messages.stream(**ASKED, stop_sequences=["Because"]) as events:
                    stopped = await events.get_final_message()
            else:
                stopped = await client.messages.create(**ASKED, stop_sequences=["Because"])
            assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Because")
            assert stopped.content[0].text == ANSWER[: ANSWER.index("Because")]


async def test_an_assistants_last_turn_is_gone_on_with(tiny: Cluster) -> None:
    turns = [*ASKED["messages"], {"role": "assistant", "content": "Because"}]
    async with anthropic_client(tiny) as client:
        await client.messages.create(**{**ASKED, "messages": turns})
    assert prompt_of(tiny).endswith("<|im_start|>assistant\nBecause")


async def test_parameters_reach_the_worker(tiny: Cluster) -> None:
    async with anthropic_client(tiny) as client:
        more = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "seed": 7, "priority": 2}
        await client.messages.create(**ASKED, metadata={"user_id": "u"}, extra_body=more)
    request = tiny.worker.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 5, 0.5, 7)
    assert (sampling.max_tokens, request.priority) == (100, 2)


async def test_the_clients_own_loop_over_tools(tmp_path: Path) -> None:
    """It asks for a conversation that the server keeps, and goes on without one when it hears that there is none."""
    asked: list[str] = []

    @anthropic.beta_async_tool
    async def add(a: int, b: int) -> str:
        """Adds."""
        asked.append(f"{a} {b}")
        return str(a + b)

    answers = iter((CALL, ANSWER))

    def script(request: GenerationRequest) -> Script:
        return say(next(answers))(request)

    async with cluster(tmp_path, script, max_model_len=2048, **PARSERS) as made, anthropic_client(made) as client:
        more: Any = {"betas": ["context-management-2025-06-27"], "context_management": {"edits": []}}
        runner = client.beta.messages.tool_runner(**ASKED, tools=[add], **more)
        assert [message.stop_reason async for message in runner] == ["tool_use", "end_turn"]
        refused = await made.post("/v1/messages", **ASKED, thread={"type": "create"})
        assert refused.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
    assert asked == ["1 2"]
    text = prompt_of(made)
    assert text.count("<|im_start|>user\nWhy?") == 1
    assert text.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


async def test_cached_tokens_are_counted_apart(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(ANSWER, stats=RequestStats(cached_tokens=5))) as made:
        usage = (await made.post("/v1/messages", **ASKED)).json()["usage"]
        assert usage["cache_read_input_tokens"] == 5
        assert usage["input_tokens"] + 5 == len(made.worker.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "redacted_thinking"}]}]}, "redacted_thinking"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]}, "messages has nothing"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is allowed with tools only"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice is allowed with tools only"),
        ({"output_config": {"format": {"type": "json_schema", "json_schema": {}}}}, "output_config.format.json_schema"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": "y" * 5000}]}, "maximum context length"),
    ],
)
async def test_errors_have_anthropics_form(tiny: Cluster, change: dict[str, Any], message: str) -> None:
    answer = await tiny.post("/v1/messages", **{k: v for k, v in {**ASKED, **change}.items() if v is not None})
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert message in body["error"]["message"]
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_errors_through_the_client(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(ANSWER, fail_at=3, failure=Failure("invalid_request", "it broke"))) as made:
        async with anthropic_client(made) as client:
            with pytest.raises(anthropic.NotFoundError) as missing:
                await client.messages.create(**{**ASKED, "model": "other"})
            assert missing.value.request_id
            with pytest.raises(anthropic.APIStatusError, match="it broke"):
                async with client.messages.stream(**ASKED) as stream:
                    await stream.get_final_message()
        answer = await made.post("/v1/messages", **ASKED, stream=True)
        names = [name for name, _ in typed_events(answer.text)]
        assert (names[-1], names.count("error"), "message_stop" in names) == ("error", 1, False)


async def test_a_key_is_needed_where_keys_are(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(ANSWER), api_keys=("secret-key",)) as made:
        for key, ok in (("secret-key", True), ("other", False)):
            async with anthropic.AsyncAnthropic(base_url=made.url, api_key=key, max_retries=0) as client:
                if ok:
                    assert (await client.messages.create(**ASKED)).content
                else:
                    with pytest.raises(anthropic.AuthenticationError):
                        await client.messages.create(**ASKED)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_the_waterfall_is_in_every_api(tiny: Cluster, path: str) -> None:
    body = ASKED if "messages" in path else {"model": MODEL, "input": "Why?", "store": False}
    headers = {"x-nanodeploy-timings": "1"}
    whole = (await tiny.http.post(path, json=body, headers=headers)).json()
    assert "total_ms" in json.dumps(whole["nanodeploy"])
    events = typed_events((await tiny.http.post(path, json={**body, "stream": True}, headers=headers)).text)
    shown = [event for _, event in events if "nanodeploy" in json.loads(event).get("response", json.loads(event))]
    assert len(shown) == 1
