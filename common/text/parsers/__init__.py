"""Tool calls and reasoning in a model's text, family by family. Pure: text in, deltas out."""

from __future__ import annotations

from common.text.parsers.arguments import Tools
from common.text.parsers.constraint import Around, answer_or_calls, required, strict
from common.text.parsers.families import CALL_PARSERS, REASONING_PARSERS, call_format, reasoning_format
from common.text.parsers.llama import ARRAY
from common.text.parsers.out import CallDelta, Parsed
from common.text.parsers.parser import NO_LIMIT, CallFormat, OutputParser, ParserPlan
from common.text.parsers.reasoning import ReasoningFormat, Start

__all__ = [
    "ARRAY",
    "CALL_PARSERS",
    "NO_LIMIT",
    "REASONING_PARSERS",
    "Around",
    "CallDelta",
    "CallFormat",
    "OutputParser",
    "Parsed",
    "ParserPlan",
    "ReasoningFormat",
    "Start",
    "Tools",
    "answer_or_calls",
    "call_format",
    "reasoning_format",
    "required",
    "strict",
]
