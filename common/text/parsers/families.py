"""Which parser reads a model: by name, or by what its chat template shows the model of calls and reasoning.

Names are those of vLLM's `--tool-call-parser` and `--reasoning-parser`, so that configurations carry over.
"""

from __future__ import annotations

from typing import Final, TypeVar

from common.errors import ConfigError
from common.text.parsers.llama import LLAMA
from common.text.parsers.marked import (
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    DEEPSEEK_V31,
    DEEPSEEK_V32,
    GLM45,
    GLM47,
    HERMES,
    KIMI,
    QWEN3_CODER,
)
from common.text.parsers.parser import CallFormat
from common.text.parsers.reasoning import KINDS, THINK, ReasoningFormat

T = TypeVar("T")

CALL_PARSERS: Final[dict[str, CallFormat]] = {
    "hermes": HERMES,
    "qwen3": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "qwen3_xml": QWEN3_CODER,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v4": DEEPSEEK_V4,
    "kimi_k2": KIMI,
    "glm45": GLM45,
    "glm47": GLM47,
    "llama3_json": LLAMA,
    "llama4_json": LLAMA,
    "llama4_pythonic": LLAMA,
    "pythonic": LLAMA,
}
REASONING_PARSERS: Final[dict[str, ReasoningFormat]] = {
    "deepseek_r1": THINK._replace(unmarked=True),
    **dict.fromkeys(("deepseek_v3", "deepseek_v4", "glm45", "kimi_k2", "qwen3", "think"), THINK),
}
_IN_TEMPLATE: Final = (  # the first whose marks are all in a template decides
    (("<|tool_call_begin|>",), KIMI),
    (("｜DSML｜tool_calls",), DEEPSEEK_V4),
    (("｜DSML｜",), DEEPSEEK_V32),
    (("<｜tool▁call▁begin｜>", "```json"), DEEPSEEK_V3),
    (("<｜tool▁call▁begin｜>",), DEEPSEEK_V31),
    (("{function-name}<arg_key>",), GLM47),
    (("<arg_key>",), GLM45),
    (("<function=",), QWEN3_CODER),
    (("<tool_call>",), HERMES),
    (("<|python_tag|>",), LLAMA),
    (("<|python_start|>",), LLAMA),
    (('"parameters": dictionary of argument name',), LLAMA),
)
_BY_ARCHITECTURE: Final = {
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v4": DEEPSEEK_V4,
}  # without a template


def call_format(name: str, template: str, architecture: str) -> CallFormat | None:
    """`name` is one of `CALL_PARSERS`, auto or none. Raises `ConfigError` for any other."""
    if name == "none":
        return None
    if name != "auto":
        return _named(CALL_PARSERS, name, "tool_call_parser")
    found = next((form for marks, form in _IN_TEMPLATE if all(mark in template for mark in marks)), None)
    return found or _BY_ARCHITECTURE.get(architecture)


def reasoning_format(name: str, template: str, architecture: str) -> ReasoningFormat | None:
    """`name` is one of `REASONING_PARSERS`, auto or none. Raises `ConfigError` for any other."""
    if name == "none":
        return None
    if name != "auto":
        return _named(REASONING_PARSERS, name, "reasoning_parser")
    found = next((form for form in KINDS if form.closing in template), None)
    return found or (THINK if architecture in _BY_ARCHITECTURE else None)


def _named(known: dict[str, T], name: str, setting: str) -> T:
    if name not in known:
        raise ConfigError(f"router.{setting} must be auto, none or one of {', '.join(known)}, got {name!r}")
    return known[name]
