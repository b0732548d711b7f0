"""Prompts of DeepSeek-V3.2 and DeepSeek-V4, whose checkpoints come with an encoder in Python and no Jinja template.

    BOS [effort] system [tools]  (user -> mark -> assistant EOS) ...  user -> mark: from here the model goes on

The mark says whether the model reasons: `<think>`, or `</think>` where it answers at once. Reasoning of earlier turns,
up to the last user message, is left out; V4 keeps all of it where there are tools. V3.2 has results of tools behind
the calls, V4 in the user's turn. The format is described in `encoding/README.md` of the checkpoints. Their `developer`
is a role of DeepSeek's search agent, which its own API does not take; here it is OpenAI's: a system message.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

from common.errors import InvalidRequestError
from common.text.chat_template import MAX_RENDER_CHARS
from common.text.deepseek_texts import EFFORT_ABSOLUTE, EFFORT_BEYOND, V4_TOOLS, V32_TOOLS
from common.text.messages import Message, check_ends, normalize_messages

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
REASONS: Final = "<think>"
ANSWERS: Final = "</think>"

_RESULT_ROLES: Final = ("tool", "function")
_FIRST_EFFORTS: Final = {
    **dict.fromkeys(("minimal", "low", "medium", "high"), ""),
    **dict.fromkeys(("xhigh", "max"), EFFORT_ABSOLUTE),
}
_EFFORTS: Final = {  # of checkpoints since July 2026
    **dict.fromkeys(("minimal", "low", "medium"), ""),
    **dict.fromkeys(("high", "xhigh"), EFFORT_ABSOLUTE),
    "max": EFFORT_BEYOND,
}


class Turn(NamedTuple):
    """What is written in one piece. `kind`: system, user, results (V3.2 only) or assistant, which is a `message`."""

    kind: str
    text: str
    message: Message | None = None


class DeepSeekFormat(ABC):
    """Renders as a `ChatTemplate` does. `source` shows how the model writes calls and reasoning."""

    source: str
    block: str  # frames calls
    reasons_by_default: bool

    @property
    def shown(self) -> str:
        """As `ChatTemplate.shown`."""
        return self.source

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        max_chars: int = MAX_RENDER_CHARS,
    ) -> str:
        """The prompt of a conversation; see `ChatTemplate.render`.

        Of `variables` these count: `thinking` and `enable_thinking` (the model reasons if one of them is true), and
        `reasoning_effort`, where "none" turns reasoning off.
        """
        check_ends(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        checked = normalize_messages(messages)
        reasons, effort = self._reasons(variables or {})
        opened = _opened(checked.pop(), reasons) if continue_final_message else None
        try:
            turns = self._turns(checked)
            if tools:
                _tell_tools(turns, self.source.replace("{schemas}", "\n".join(_json(t["function"]) for t in tools)))
            text = BOS + effort + self._written(turns, reasons, bool(tools), opened, asks=add_generation_prompt)
        except RecursionError as error:
            raise InvalidRequestError("messages or tools are nested too deeply", param="messages") from error
        if len(text) > max_chars:
            raise InvalidRequestError(f"the prompt has more than {max_chars} characters", param="messages")
        return text

    def _reasons(self, variables: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether the model is to reason, and what the prompt begins with for the effort."""
        asked = [value for name in ("thinking", "enable_thinking") if (value := variables.get(name)) is not None]
        if not all(isinstance(value, bool) for value in asked):
            raise InvalidRequestError(
                "thinking and enable_thinking must be true or false", param="chat_template_kwargs"
            )
        effort = variables.get("reasoning_effort")
        if effort == "none" or not (any(asked) if asked else self.reasons_by_default):
            return False, ""
        return True, "" if effort is None else self._effort(effort)

    def _written(
        self, turns: Sequence[Turn], reasons: bool, has_tools: bool, opened: tuple[str, str] | None, *, asks: bool
    ) -> str:
        """`opened`: the mark and the text of an answer that is left open. `asks`: the model begins an answer."""
        end = "assistant" if asks or opened else "nothing"
        since = max((i for i, turn in enumerate(turns) if turn.kind == "user"), default=-1)
        if self._keeps_reasoning(has_tools):
            since = -1
        parts: list[str] = []
        for i, turn in enumerate(turns):
            is_last = i + 1 == len(turns)
            if turn.message is not None:
                parts.append(self._assistant(turn.message, reasons and i > since))
                continue
            parts.append(turn.text)
            if turn.kind != "system" and self._is_marked(end if is_last else turns[i + 1].kind):
                mark = opened[0] if opened and is_last else REASONS if reasons and i >= since else ANSWERS
                parts.append(("\n\n" if turn.kind == "results" else ASSISTANT) + mark)
        return "".join(parts) + (opened[1] if opened else "")

    def _assistant(self, message: Message, reasons: bool) -> str:
        content: str = message["content"]
        reasoning = message.get("reasoning_content", "") + ANSWERS if reasons else ""
        calls = "\n".join(_call(call["function"]) for call in message.get("tool_calls", ()))
        block = f"\n\n<｜DSML｜{self.block}>\n{calls}\n</｜DSML｜{self.block}>" if calls else ""
        return reasoning + content + block + EOS

    def _effort(self, effort: Any) -> str:
        """What the prompt begins with. Raises `InvalidRequestError` for an effort that there is not."""
        return ""

    @abstractmethod
    def _turns(self, messages: Sequence[Message]) -> list[Turn]: ...

    @abstractmethod
    def _keeps_reasoning(self, has_tools: bool) -> bool:
        """That of all turns."""

    @abstractmethod
    def _is_marked(self, follows: str) -> bool:
        """Whether a mark closes a turn before one of this kind; "nothing": the prompt ends with it."""


class DeepSeekV32Format(DeepSeekFormat):
    source = V32_TOOLS
    block = "function_calls"
    reasons_by_default = False

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        turns: list[Turn] = []
        for are_results, group in groupby(enumerate(messages), lambda pair: pair[1]["role"] in _RESULT_ROLES):
            if are_results:
                first, *others = group
                calls = messages[first[0] - 1].get("tool_calls", ()) if first[0] else ()
                turns.append(_results(first[0], [first[1], *(message for _, message in others)], calls))
            else:
                turns.extend(_turn(message) for _, message in group)
        return turns

    def _keeps_reasoning(self, has_tools: bool) -> bool:
        return False

    def _is_marked(self, follows: str) -> bool:
        return follows != "nothing"


class DeepSeekV4Format(DeepSeekFormat):
    """`efforts`: what a prompt begins with for each. Releases differ in them, and in nothing else."""

    source = V4_TOOLS
    block = "tool_calls"
    reasons_by_default = True

    def __init__(self, efforts: Mapping[str, str]) -> None:
        self._efforts = efforts

    def _effort(self, effort: Any) -> str:
        if not isinstance(effort, str) or effort not in self._efforts:
            raise InvalidRequestError(
                f"reasoning_effort must be none or one of {', '.join(self._efforts)}", param="reasoning_effort"
            )
        return self._efforts[effort]

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        turns: list[Turn] = []
        calls: Sequence[Message] = ()
        for are_users, group in groupby(messages, lambda message: message["role"] in ("user", *_RESULT_ROLES)):
            if are_users:
                turns.append(Turn("user", USER + "\n\n".join(_blocks(list(group), calls))))
                continue
            for message in group:
                calls = message.get("tool_calls", calls)
                turns.append(_turn(message))
        return turns

    def _keeps_reasoning(self, has_tools: bool) -> bool:
        return has_tools

    def _is_marked(self, follows: str) -> bool:
        return follows == "assistant"


def checkpoint_format(architecture: str, folder: Path) -> DeepSeekFormat | None:
    """How prompts of a checkpoint are written that has no template; None where that is not known.

    `folder` may have the encoder that came with the checkpoint: it tells which efforts the model knows.
    """
    if architecture == "deepseek_v32":
        return DeepSeekV32Format()
    if architecture != "deepseek_v4":
        return None
    encoder = folder / "encoding" / "encoding_dsv4.py"
    knows = encoder.is_file() and "REASONING_EFFORT_PROMPTS" in encoder.read_text(errors="replace")
    return DeepSeekV4Format(_EFFORTS if knows else _FIRST_EFFORTS)


def _turn(message: Message) -> Turn:
    if message["role"] == "assistant":
        return Turn("assistant", "", message)
    if message["role"] == "user":
        return Turn("user", USER + message["content"])
    return Turn("system", message["content"])


def _tell_tools(turns: list[Turn], text: str) -> None:
    """Behind the system message that a conversation begins with, or in the place of one."""
    if turns and turns[0].kind == "system":
        turns[0] = Turn("system", f"{turns[0].text}\n\n{text}")
    else:
        turns.insert(0, Turn("system", f"\n\n{text}"))


def _results(at: int, results: Sequence[Message], calls: Sequence[Message]) -> Turn:
    """V3.2: all results of the calls before, whose order says which is whose. `at`: the first one's place."""
    if len(results) > len(calls):
        where = f"messages[{at + len(calls)}]"
        raise InvalidRequestError(
            f"{where} answers no call: before it there must be one in an assistant's tool_calls", param=where
        )
    if len(results) < len(calls):
        where = f"messages[{at - 1}].tool_calls"
        raise InvalidRequestError(f"{where} has {len(calls)} calls, and {len(results)} results follow", param=where)
    written = "".join(f"\n<result>{result['content']}</result>" for result in _by_call(results, calls))
    return Turn("results", f"\n\n<function_results>{written}\n</function_results>")


def _blocks(messages: Sequence[Message], calls: Sequence[Message]) -> list[str]:
    """V4: the texts and results of one user's turn. Results are in the order of the calls, in places of results."""
    results = iter(_by_call([message for message in messages if message["role"] != "user"], calls))
    return [
        message["content"] if message["role"] == "user" else f"<tool_result>{next(results)['content']}</tool_result>"
        for message in messages
    ]


def _by_call(results: Sequence[Message], calls: Sequence[Message]) -> Sequence[Message]:
    """In the order of their calls, unless one names none of them: then as they came."""
    places = {call["id"]: place for place, call in enumerate(calls) if "id" in call}
    found = [places.get(result.get("tool_call_id", "")) for result in results]
    known = [place for place in found if place is not None]
    if len(known) < len(results):
        return results
    return [result for _, result in sorted(zip(known, results, strict=True), key=lambda pair: pair[0])]


def _call(function: Mapping[str, Any]) -> str:
    parameters = "\n".join(_parameter(key, value) for key, value in function["arguments"].items())
    return f'<｜DSML｜invoke name="{function["name"]}">\n{parameters}\n</｜DSML｜invoke>'


def _parameter(key: str, value: Any) -> str:
    kind, text = ("true", value) if isinstance(value, str) else ("false", _json(value))
    return f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>'


def _opened(message: Message, reasons: bool) -> tuple[str, str]:
    """The mark before an answer that is to be continued, and its text. One that begins with `<think>` reasons still."""
    if message["role"] != "assistant" or "tool_calls" in message:
        raise InvalidRequestError(
            "continue_final_message continues an assistant's message without calls", param="continue_final_message"
        )
    content: str = message["content"]
    if content.startswith(REASONS):
        return REASONS, content.removeprefix(REASONS)
    reasoning = message.get("reasoning_content", "") if reasons else ""
    return (REASONS, reasoning + ANSWERS + content) if reasoning else (ANSWERS, content)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
