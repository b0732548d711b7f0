"""What clients send though it asks for nothing: nulls, marks on messages, answers given back as they came."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from api_support import PARSERS
from router_support import MODEL, Cluster, cluster, say, tokenizer

QUESTION: dict[str, Any] = {"role": "user", "content": "Where?"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [QUESTION]}


class Place(pydantic.BaseModel):
    city: str


@pytest.fixture
async def tiny(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, say('{"city": "Rome"}'), **PARSERS) as made:
        yield made


def prompt_of(made: Cluster) -> str:
    return tokenizer().decode(made.worker.requests[-1].prompt_token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_parsed_answer_is_given_back_as_it_came(tiny: Cluster, stream: bool) -> None:
    """As the client's guide does it: the message that `parse` made goes into the next request."""
    async with tiny.openai() as client:
        if stream:
            async with client.chat.completions.stream(**CHAT, response_format=Place) as events:
                answer = await events.get_final_completion()
        else:
            answer = await client.chat.completions.parse(**CHAT, response_format=Place)
        message = answer.choices[0].message
        assert message.parsed == Place(city="Rome")
        given = {"role": "assistant", "content": message.content, "parsed": {"city": "Rome"}}
        await client.chat.completions.create(model=MODEL, messages=[QUESTION, given, QUESTION])  # type: ignore[list-item]
    assert '<|im_start|>assistant\n{"city": "Rome"}<|im_end|>' in prompt_of(tiny)


async def test_marks_on_messages_say_nothing(tiny: Cluster) -> None:
    """`type` is what evaluation harnesses add to every message, `cache_control` what proxies of other APIs do."""
    await tiny.post("/v1/chat/completions", **CHAT)
    wanted = prompt_of(tiny)
    marked = QUESTION | {"type": "text", "cache_control": {"type": "ephemeral"}}
    answer = await tiny.post("/v1/chat/completions", model=MODEL, messages=[marked])
    assert answer.status_code == 200, answer.text
    assert prompt_of(tiny) == wanted


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "audio": None, "functions": None, "web_search_options": None}),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "prompt_embeds": None}),
        ("/v1/responses", {"model": MODEL, "input": "a", "store": False, "conversation": None, "prompt": None}),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "container": None, "mcp_servers": None}),
        ("/tokenize", {"model": MODEL, "prompt": "a", "lora": None}),
    ],
)
async def test_an_unknown_field_that_is_null_asks_for_nothing(tiny: Cluster, path: str, body: dict[str, Any]) -> None:
    answer = await tiny.post(path, **body)
    assert answer.status_code == 200, answer.text
    (unknown, *_) = [name for name, value in body.items() if value is None]
    for more in ({unknown: False}, {unknown: None, "wrong": {}}, {unknown: None, "model": 5}):
        refused = await tiny.post(path, **{**body, **more})
        assert refused.status_code == 400
        wrong = next(name for name, value in more.items() if value is not None)
        assert wrong in refused.json()["error"]["message"]


async def test_a_choice_among_no_tools(tiny: Cluster) -> None:
    """Frameworks say both for an agent that has none."""
    answer = await tiny.post("/v1/chat/completions", **CHAT, tools=[], tool_choice="auto")
    assert answer.status_code == 200, answer.text
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        refused = await tiny.post("/v1/chat/completions", **CHAT, tools=[], tool_choice=choice)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
