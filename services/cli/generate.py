"""`nanodeploy generate`: prompts in, JSONL out, with the engine in this process and no services.

A line of input is a prompt, or a JSON object (`{"prompt": ...}` or `{"prompt_token_ids": [...]}`, and any
sampling parameter, which wins over the flags). A line of output answers one prompt, in the order of the input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO, cast

import msgspec

from common.errors import InvalidRequestError
from common.types import SamplingParams
from services.cli.report import make_console
from services.cli.up import resolve_model

Prompt = str | list[int]


def read_prompts(lines: Iterable[str], flags: Mapping[str, Any]) -> tuple[list[Prompt], list[SamplingParams]]:
    """Prompts and the sampling parameters of each. Blank lines are skipped.

    Raises `InvalidRequestError` that names the line.
    """
    prompts: list[Prompt] = []
    params: list[SamplingParams] = []
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\n")
        if not text.strip():
            continue
        try:
            prompt, fields = _parse(text)
            prompts.append(prompt)
            params.append(msgspec.convert({**flags, **fields}, SamplingParams))
        except (InvalidRequestError, msgspec.ValidationError) as error:
            raise InvalidRequestError(f"line {number}: {error}") from None
    return prompts, params


def _parse(text: str) -> tuple[Prompt, dict[str, Any]]:
    if not text.lstrip().startswith("{"):
        return text, {}
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        return text, {}  # a prompt that happens to begin with a brace
    prompt = fields.pop("prompt_token_ids", None)
    if prompt is None:
        prompt = fields.pop("prompt", None)
    is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
    if not (isinstance(prompt, str) or is_ids):
        raise InvalidRequestError("needs a string `prompt` or a list of numbers `prompt_token_ids`", param="prompt")
    unknown = sorted(set(fields) - set(SamplingParams.__struct_fields__))
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0]!r}", param=unknown[0])
    return prompt, fields


def write_outputs(outputs: Sequence[Any], out: TextIO) -> None:
    """One JSON object a line: index, text, token ids and finish reason; all choices when n > 1."""
    for index, output in enumerate(outputs):
        choices = [
            {"text": o.text, "token_ids": list(o.token_ids), "finish_reason": str(o.finish_reason or "")}
            for o in output.outputs
        ]
        line: dict[str, Any] = {"index": index, **choices[0]}
        if len(choices) > 1:
            line["choices"] = choices
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()


def run_generate(model: str, engine: Mapping[str, Any], flags: Mapping[str, Any], source: str, target: str) -> int:
    """Answer the prompts of file `source` into file `target`, `-` being stdin and stdout. The exit code.

    `model` is a folder; the demo model when empty. Both files are opened before it is loaded. Raises `OSError`.
    """
    with _opened(source, "r", sys.stdin) as lines:
        prompts, params = read_prompts(lines, flags)
    if not prompts:
        raise InvalidRequestError(f"no prompt in {'standard input' if source == '-' else source}")
    with _opened(target, "w", sys.stdout) as out:
        folder = resolve_model(model, make_console(stderr=True))
        from nanodeploy import LLM

        with LLM(folder, **engine) as llm:
            write_outputs(llm.generate(prompts, params), out)
    return 0


def _opened(path: str, mode: str, standard: TextIO) -> AbstractContextManager[TextIO]:
    if path == "-":
        return nullcontext(standard)
    return cast(TextIO, Path(path).open(mode, encoding="utf-8"))
