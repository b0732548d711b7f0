"""What a parser puts out: content, reasoning and calls, collected between two pushes.

White space beside a call's marks belongs to the format: held back while content may end, dropped where a call
begins, given out where more content follows. So content has the same characters however the text was cut.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from common.text.parsers.tape import SPACE


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of the call `index`. `id` and `name` are in the first of a call; `arguments` parts add up to JSON."""

    index: int
    id: str
    name: str
    arguments: str


class Parsed(NamedTuple):
    content: str
    reasoning: str
    calls: Sequence[CallDelta]


NOTHING = Parsed("", "", ())


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class Out:
    """`limit`: calls after so many are left out. `inline`: reasoning is content, `hidden`: it is nothing."""

    __slots__ = (
        "_calls",
        "_content",
        "_held",
        "_last",
        "_make_id",
        "_reasoning",
        "_started",
        "answers",
        "ended_calls",
        "hidden",
        "inline",
        "limit",
        "num_calls",
        "reasons",
        "trims",
    )

    def __init__(
        self, *, limit: int, inline: bool, hidden: bool, trims: bool, make_id: Callable[[], str] = new_call_id
    ) -> None:
        self.limit = limit
        self.inline = inline
        self.hidden = hidden
        self.trims = trims  # calls may come: white space at the end of content is held back
        self.reasons = False  # what comes next is reasoning, unless it ends it; never with `inline`
        self.answers = inline  # there is no more reasoning
        self.num_calls = 0
        self.ended_calls = 0
        self._make_id = make_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[CallDelta] = []
        self._held = ""  # white space and marks around calls that may still turn out to be text
        self._last = self._content  # whose text is held
        self._started = True  # False: white space that begins a text is dropped

    def take(self) -> Parsed:
        """What came since the last time."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        self._content.clear()
        self._reasoning.clear()
        if not self._calls:
            return Parsed(content, reasoning, ()) if content or reasoning else NOTHING
        calls, self._calls = _joined(self._calls), []
        return Parsed(content, reasoning, calls)

    # -- text --

    def content(self, text: str) -> None:
        self._add(self._content, text, trims=self.trims)

    def reasoning(self, text: str) -> None:
        if self.inline:
            self._add(self._content, text, trims=False)
        elif not self.hidden:
            self._add(self._reasoning, text, trims=True)

    def _add(self, parts: list[str], text: str, *, trims: bool) -> None:
        if not self._started:
            text = text.lstrip(SPACE)
            self._started = bool(text)
        if not text:
            return
        if not trims:
            parts.append(text)
            return
        solid = text.rstrip(SPACE)
        if not solid:
            self._held += text
            self._last = parts
            return
        parts.append(self._held + solid)
        self._held = text[len(solid) :]
        self._last = parts

    def hold(self, mark: str) -> None:
        """A mark that frames calls: text only if no call follows."""
        self._held += mark
        self._last = self._content

    @property
    def at_begin(self) -> bool:
        """White space that comes now is dropped."""
        return not self._started

    @property
    def after_call(self) -> bool:
        """Nothing but white space since the last call."""
        return self.num_calls > 0 and not self._started and not self._held

    def begin_text(self) -> None:
        """Reasoning or calls are over, or begin: white space around belongs to their marks."""
        self._held = ""
        self._started = False

    def flush(self) -> None:
        """The text is over: what was held back was text."""
        if self._held:
            self._last.append(self._held)
            self._held = ""

    # -- calls --

    def begin_call(self, name: str, call_id: str = "") -> None:
        self.begin_text()
        if self.num_calls < self.limit:
            self._calls.append(CallDelta(self.num_calls, call_id or self._make_id(), name, ""))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        if text and self.num_calls <= self.limit:
            self._calls.append(CallDelta(self.num_calls - 1, "", "", text))

    def end_call(self) -> None:
        self.ended_calls += 1


def _joined(deltas: list[CallDelta]) -> list[CallDelta]:
    """Deltas of one call that came together, as one."""
    joined: list[CallDelta] = []
    for delta in deltas:
        if joined and joined[-1].index == delta.index:
            last = joined[-1]
            joined[-1] = replace(last, arguments=last.arguments + delta.arguments)
        else:
            joined.append(delta)
    return joined
