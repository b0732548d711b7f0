"""Items and blocks of every shape become chat messages or an error that names their place, and nothing else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequestError
from common.text.messages import normalize_messages
from common.text.parsers import CallDelta
from services.router.api import messages, response_items
from services.router.api.message_events import MessageEvents
from services.router.api.response_events import ResponseEvents
from services.router.api.schemas import MessagesBody, ResponsesBody
from services.router.replies import Call, Ended, Head, Usage, dumps

WORDS = ["message", "function_call", "function_call_output", "reasoning", "input_text", "output_text", "text", "user"]
WORDS += [
    "assistant",
    "system",
    "tool_use",
    "tool_result",
    "thinking",
    "redacted_thinking",
    "function",
    "json_schema",
    "auto",
    "{}",
    "x",
]
KEYS = [
    "type",
    "role",
    "content",
    "text",
    "summary",
    "call_id",
    "output",
    "arguments",
    "name",
    "id",
    "input",
    "thinking",
]
KEYS += ["tool_use_id", "parameters", "input_schema", "schema", "strict", "status"]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(allow_nan=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=3)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
objects = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
lists = st.lists(objects, min_size=1, max_size=4)
maybe_objects = st.none() | objects
maybe_lists = st.none() | st.lists(objects, max_size=2)


@given(items=lists, tools=maybe_lists, choice=st.none() | st.sampled_from(WORDS) | objects, form=maybe_objects)
def test_items(items: list[Any], tools: Any, choice: Any, form: Any) -> None:
    with contextlib.suppress(InvalidRequestError):
        body = ResponsesBody(input=items, tools=tools, tool_choice=choice, text={"format": form})
        chat = response_items.to_chat(body, response_items.messages_of(response_items.items_of(body)))
        normalize_messages(chat.messages)


@given(
    turns=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": lists | st.text(max_size=5)}),
        min_size=1,
        max_size=3,
    ),
    system=st.none() | st.text(max_size=5) | lists,
    tools=maybe_lists,
    choice=maybe_objects,
    form=maybe_objects,
)
def test_blocks(turns: list[Any], system: Any, tools: Any, choice: Any, form: Any) -> None:
    with contextlib.suppress(InvalidRequestError):
        body = MessagesBody(
            max_tokens=5, messages=turns, system=system, tools=tools, tool_choice=choice, output_config={"format": form}
        )
        normalize_messages(messages.to_chat(body).messages)


head = Head("resp_0", 1, "m", "fp")


def _call(name: str, arguments: str) -> Call:
    return Call(CallDelta(0, f"call_{name}", name, arguments))


calls = st.lists(
    st.builds(_call, st.sampled_from(["f", "g"]), st.sampled_from(["{}", '{"a": 1}', "{"])),
    max_size=2,
)


@given(
    text=st.text(max_size=5),
    reasoning=st.text(max_size=5),
    calls=calls,
    finish=st.sampled_from(["stop", "length", "tool_calls"]),
)
def test_an_answer_can_be_given_back(text: str, reasoning: str, calls: list[Call], finish: str) -> None:
    """What was answered, sent as input again, is the same turn in both APIs."""
    ended = Ended(0, text, None, finish, None, reasoning, calls)
    response = ResponseEvents(head, {})
    response.walk(ended)
    response.complete(Usage(1, 1, 0), None)
    turns = response_items.messages_of(response.response["output"])
    message = MessageEvents(head, "r")
    message.walk(ended)
    content = json.loads(dumps(message.content()))
    (turn,) = messages._turn(messages.Turn(role="assistant", content=content), "messages[0]")
    assert len(turns) == 1
    normalize_messages([*turns, turn])
    for made in (turns[0], turn):
        assert made["role"] == "assistant"
        assert made.get("content") == text
        assert made.get("reasoning_content", "") == reasoning
        assert [call["function"]["name"] for call in made.get("tool_calls", ())] == [call.name for call in calls]
