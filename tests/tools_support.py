"""A model that calls tools and reasons, behind the gateway, and what its answers add up to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import parser_support
import pytest
import router_support
from parser_support import Answer
from router_support import MODEL, Cluster, events, say

from common.text.parsers import CallDelta
from common.text.parsers.out import Parsed

TOOLS = parser_support.tools()
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Weather in Paris?"}]}
WITH_TOOLS: dict[str, Any] = ASK | {"tools": TOOLS}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
TEXT = f"<think>\nIt wants 你好.\n</think>\n\nOne moment 🙂.\n{CALL}\n{TIME}"
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> Answer by <tool_call>.\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


cluster = partial(router_support.cluster, max_model_len=4096)


def asks(folder: Path, text: str, **kwargs: Any) -> Any:
    return cluster(folder / "model", say(text, **kwargs), template=TEMPLATE)


@pytest.fixture
async def caller(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with asks(tmp_path, TEXT) as made:
        yield made


def streamed(body: str, index: int = 0) -> tuple[Answer, str]:
    """The answer that a stream's deltas add up to, and why it ended."""
    answer, finish = Answer(), ""
    for event in events(body):
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            parts = [
                CallDelta(c["index"], c.get("id", ""), c["function"].get("name", ""), c["function"]["arguments"])
                for c in delta.get("tool_calls", ())
            ]
            answer.add(Parsed(delta.get("content") or "", delta.get("reasoning") or "", parts))
            assert not finish
            finish = choice["finish_reason"] or ""
    return answer, finish


def whole(body: dict[str, Any], index: int = 0) -> tuple[Answer, str]:
    choice = body["choices"][index]
    message = choice["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    calls = [[c["id"], c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]
    return Answer(message["content"] or "", message.get("reasoning") or "", calls), choice["finish_reason"]


def without_ids(answer: Answer) -> Answer:
    return Answer(answer.content, answer.reasoning, [["", *call[1:]] for call in answer.calls])


async def both(made: Cluster, **body: Any) -> tuple[Answer, str]:
    """The answer without its ids, which is the same in both forms."""
    one = await made.post("/v1/chat/completions", **body)
    assert one.status_code == 200, one.text
    two = await made.post("/v1/chat/completions", **body, stream=True)
    (answer, finish), (streamed_answer, streamed_finish) = whole(one.json()), streamed(two.text)
    assert without_ids(streamed_answer) == without_ids(answer)
    assert streamed_finish == finish
    return without_ids(answer), finish
