"""Chat templates: Jinja as Hugging Face checkpoints write it, in a sandbox.

A template comes with the checkpoint (or from the operator), the messages come from anybody. Rendering may read
its inputs and nothing else, and it is bounded in time and size: what it yields, calls and looks up is counted
against a deadline, so a template that loops over a hostile message list ends with an error, not with the router.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import LoopContext

from common.errors import ConfigError, InvalidRequestError, UnsupportedError
from common.text.messages import ROLES, Message, check_ends, normalize_messages

MAX_RENDER_S = 5.0
MAX_RENDER_CHARS = 64 * 2**20
_DICT_NAMES = frozenset(dir(dict))
_LOOP_NAMES = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length"})
_FOR_TOOLS = "tool_use"
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
_MARK = "\ue000continue\ue001"  # private-use characters: no real content ends like this


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _TemplateError(Exception):
    """What a template says by `raise_exception`."""


class _RenderLimitError(Exception):
    pass


def _sources(folder: Path, file: Path, config: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The template, and those that a name was given."""
    found = config.get("chat_template")
    if file.is_file():
        extra = folder / "additional_chat_templates" / f"{_FOR_TOOLS}.jinja"
        named = {_FOR_TOOLS: extra.read_text(encoding="utf-8")} if extra.is_file() else {}
        return file.read_text(encoding="utf-8"), named
    legacy = folder / "chat_template.json"
    if legacy.is_file():
        found = json.loads(legacy.read_bytes()).get("chat_template", found)
    named = {one["name"]: one["template"] for one in found} if isinstance(found, list) else {}
    return (named.get("default", next(iter(named.values()))) if named else found), named


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a deadline, one per thread: a render stays on its thread.

    What is looked up most, a message's parts and where a loop is, is answered here as the sandbox would in the end.
    """

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = threading.local()

    def check_time(self) -> None:
        if time.monotonic() > getattr(self.limits, "deadline", float("inf")):
            raise _RenderLimitError(f"took longer than {MAX_RENDER_S:g} s")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        return super().call(context, obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
            return obj[attribute]
        if type(obj) is LoopContext and attribute in _LOOP_NAMES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = max((len(x) for x in (left, right) if isinstance(x, str | list | tuple)), default=0)
        times = max((x for x in (left, right) if isinstance(x, int)), default=0)
        if size * times > MAX_RENDER_CHARS or (operator == "**" and times > 64):
            raise _RenderLimitError(f"{operator} makes too large a value")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise _TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """One compiled template. Thread-safe: renders share nothing but the code."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: dict[str, str] | None = None,
        name: str = "template",
        for_tools: ChatTemplate | None = None,
    ) -> None:
        """`for_tools`: the one for what has tools. Raises `ConfigError` if `source` is not a valid template."""
        self.source = source
        self._for_tools = for_tools
        self._special_tokens = special_tokens or {}
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = _tojson
        self._environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{name} is not a valid chat template: {error}", param="chat_template") from error
        self._template.globals = dict(self._template.globals)  # copied for each render: a chain of maps is slow to copy
        quoted = set(re.findall(r"""role['"]?\]?\s*==\s*["'](\w+)["']""", source))
        self.extra_roles = tuple(sorted(quoted - set(ROLES)))
        self._knows_developer = bool(re.search(r"""['"]developer['"]""", source))
        self._knows_no_content = bool(re.search(r"""(?<!\w)content['"]?\]?\s+is\s+(not\s+)?none""", source))

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], special_tokens: dict[str, str]) -> ChatTemplate | None:
        """Of chat_template.jinja, chat_template.json or tokenizer_config.json, in this order; None if there is none.

        One that is named `tool_use` beside it is for what has tools, as in transformers.
        """
        file = folder / "chat_template.jinja"
        try:
            found, named = _sources(folder, file, config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__} {error}"
            raise ConfigError(f"the chat template of {folder} cannot be read: {what}", param="chat_template") from error
        if not isinstance(found, str):
            return None
        where = str(file) if file.is_file() else f"chat_template of {folder}"
        for_tools = None
        if _FOR_TOOLS in named:
            for_tools = cls(named[_FOR_TOOLS], special_tokens=special_tokens, name=f"{_FOR_TOOLS} of {where}")
        return cls(found, special_tokens=special_tokens, name=where, for_tools=for_tools)

    @property
    def shown(self) -> str:
        """What the model may be shown of calls and of reasoning."""
        return self.source if self._for_tools is None else f"{self.source}\n{self._for_tools.source}"

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
        """The prompt of a conversation.

        `messages` are checked here (`common.text.messages`); `tools` and `variables` reach the template as they
        are. `continue_final_message` leaves the last message open for the model to go on with. Raises
        `InvalidRequestError` that names the field, also for what the template itself refuses.
        """
        if tools and self._for_tools is not None:
            return self._for_tools.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                variables=variables,
                max_chars=max_chars,
            )
        checked = normalize_messages(messages, extra_roles=self.extra_roles)
        check_ends(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        if not self._knows_developer:
            for message in checked:
                if message["role"] == "developer":
                    message["role"] = "system"
        if continue_final_message:
            checked[-1]["content"] += _MARK
        names: dict[str, Any] = {
            **self._special_tokens,
            **(variables or {}),
            "messages": checked,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(names, max_chars)
        if not continue_final_message:
            return text
        before, mark, _ = text.rpartition(_MARK)
        if not mark:
            raise UnsupportedError(
                "the chat template cannot continue the final message", param="continue_final_message"
            )
        return before

    def _run(self, names: dict[str, Any], max_chars: int) -> str:
        self._environment.limits.deadline = time.monotonic() + MAX_RENDER_S
        try:
            if self._knows_no_content:  # it may take a message for calls only if it has none, or fail without
                with contextlib.suppress(*_FAILURES):
                    return self._rendered(names | {"messages": _without_content(names["messages"])}, max_chars)
            return self._rendered(names, max_chars)
        except _TemplateError as error:
            raise InvalidRequestError(f"the chat template refused the messages: {error}", param="messages") from error
        except _RenderLimitError as error:
            raise InvalidRequestError(f"the chat template {error}", param="messages") from error
        except _FAILURES as error:
            raise InvalidRequestError(
                f"the chat template failed on these messages: {error}", param="messages"
            ) from error
        except RecursionError as error:
            raise InvalidRequestError("the chat template recursed too deeply", param="messages") from error

    def _rendered(self, names: dict[str, Any], max_chars: int) -> str:
        parts: list[str] = []
        size = 0
        for part in self._template.root_render_func(self._template.new_context(names)):
            parts.append(part)
            size += len(part)
            if size > max_chars:
                raise _RenderLimitError(f"made more than {max_chars} characters")
            self._environment.check_time()
        return "".join(parts)


def _without_content(messages: Sequence[Message]) -> list[Message]:
    """With none in the place of the empty content of messages that have calls."""
    return [m | {"content": None} if "tool_calls" in m and not m["content"] else m for m in messages]
