"""The conformance suite of parsers (`tests/data/parsers`): read, run over pieces of a text, compared.

A line of a `.jsonl` file is one golden text: `family` (a name of `CALL_PARSERS`), `start` (where the prompt leaves
reasoning), `text`, and `expected`: content, reasoning, and calls by name, arguments to the letter, and the id where
the text has one. `cut`: the text ends or breaks within a call, whose arguments are then not JSON. The functions are
those of `tools.json`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from common.text.parsers import OutputParser, ParserPlan, Start, Tools, call_format, reasoning_format
from common.text.parsers.out import Parsed

FOLDER = Path(__file__).parent / "data" / "parsers"
MADE_ID = "made"


@dataclasses.dataclass
class Answer:
    """What deltas add up to. Calls are [id, name, arguments]."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = dataclasses.field(default_factory=list)

    def add(self, parsed: Parsed) -> None:
        self.content += parsed.content
        self.reasoning += parsed.reasoning
        for delta in parsed.calls:
            if delta.index == len(self.calls):
                assert delta.id
                assert delta.name
                self.calls.append([delta.id, delta.name, delta.arguments])
            else:
                assert (delta.index, delta.id, delta.name) == (len(self.calls) - 1, "", "")
                self.calls[-1][2] += delta.arguments

    def begins(self, other: Answer) -> bool:
        """Whether it is what `other` was at an earlier time."""
        return (
            other.content.startswith(self.content)
            and other.reasoning.startswith(self.reasoning)
            and len(self.calls) <= len(other.calls)
            and all(a[:2] == b[:2] and b[2].startswith(a[2]) for a, b in zip(self.calls, other.calls, strict=False))
        )


@cache
def tools() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / "tools.json").read_text())
    return found


@cache
def goldens() -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(FOLDER.glob("*.jsonl")) for line in path.read_text().splitlines()]


def plan(family: str, start: str = "maybe", **changes: Any) -> ParserPlan:
    calls, reasoning = call_format(family, "", ""), reasoning_format("think", "", "")
    return ParserPlan(calls, Tools(tools()), reasoning, Start(start), **changes)


def parser(made: ParserPlan) -> OutputParser:
    return made.parser(lambda: MADE_ID)


def parse(made: ParserPlan, pieces: Iterable[str]) -> Answer:
    reader, answer = parser(made), Answer()
    for piece in pieces:
        answer.add(reader.push(piece))
    answer.add(reader.finish())
    return answer


def expected(golden: dict[str, Any]) -> Answer:
    want = golden["expected"]
    calls = [[call.get("id", MADE_ID), call["name"], call["arguments"]] for call in want["calls"]]
    return Answer(want["content"], want["reasoning"], calls)


def cut(text: str, rng: random.Random) -> list[str]:
    """Into pieces of random lengths."""
    longest, pieces, at = rng.choice((2, 5, 20)), [], 0
    while at < len(text):
        size = rng.randint(1, longest)
        pieces.append(text[at : at + size])
        at += size
    return pieces
