"""`nanodeploy generate`: prompts in, JSONL out, with the engine in this process and no services.

A line of input is a prompt, or a JSON object (`{"prompt": ...}` or `{"prompt_token_ids": [...]}`, and any
sampling parameter, which wins over the flags). In a file named `*.jsonl`, and in any input that begins with such an
object, every line must be one. A line of output answers one prompt, in the order of the input; a prompt that cannot
be answered has `error` with the number of its line, and the others go on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import msgspec

from common.errors import ConfigError, InvalidRequestError, NanoDeployError
from common.types import SamplingParams
from services.cli.report import bars, make_console
from services.cli.up import resolve_model

Prompt = str | list[int]
_DEFAULTS = SamplingParams()


@dataclass(frozen=True)
class Line:
    """A prompt of the input, or why its line holds none. `number` counts from 1."""

    number: int
    prompt: Prompt = ""
    params: SamplingParams = _DEFAULTS
    error: NanoDeployError | None = None


def read_prompts(lines: Iterable[str], flags: Mapping[str, Any], *, objects_only: bool = False) -> list[Line]:
    """All lines that are not blank. Raises `ConfigError` for flags that no prompt could have."""
    try:
        msgspec.convert(dict(flags), SamplingParams)
    except (InvalidRequestError, msgspec.ValidationError) as error:
        raise ConfigError(str(error)) from None
    found: list[Line] = []
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\n")
        if not text.strip():
            continue
        try:
            prompt, fields = _parse(text, objects_only)
            found.append(Line(number, prompt, msgspec.convert({**flags, **fields}, SamplingParams)))
        except NanoDeployError as error:
            found.append(Line(number, error=error))
        except msgspec.ValidationError as error:
            found.append(Line(number, error=InvalidRequestError(str(error))))
        objects_only = objects_only or (len(found) == 1 and _is_object(text))
    return found


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _parse(text: str, objects_only: bool) -> tuple[Prompt, dict[str, Any]]:
    try:
        fields = json.loads(text) if objects_only or text.lstrip().startswith("{") else None
    except json.JSONDecodeError as error:
        if objects_only:
            raise InvalidRequestError(f"not valid JSON: {error.msg} at column {error.colno}") from None
        fields = None  # a prompt that happens to begin with a brace
    if fields is None and not objects_only:
        return text, {}
    if not isinstance(fields, dict):
        raise InvalidRequestError("not a JSON object")
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


def write_outputs(lines: Sequence[Line], outputs: Sequence[Any], out: TextIO) -> list[str]:
    """One JSON object a line: index, text, token ids and finish reason; all choices when n > 1. Returns the errors.

    `outputs` answer those of `lines` that hold a prompt.
    """
    answers = iter(outputs)
    errors: list[str] = []
    for index, line in enumerate(lines):
        output = None if line.error is not None else next(answers)
        error: NanoDeployError | None = line.error if output is None else output.error
        if error is not None:
            errors.append(f"line {line.number}: {error.message}")
            about = {"line": line.number, "code": error.code, "message": error.message, "param": error.param or None}
            row: dict[str, Any] = {"index": index, "error": about}
        else:
            row = {"index": index, **_answer(output)}
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
    out.flush()
    return errors


def _answer(output: Any) -> dict[str, Any]:
    choices = [
        {"text": o.text, "token_ids": list(o.token_ids), "finish_reason": str(o.finish_reason or "")}
        for o in output.outputs
    ]
    return {**choices[0], "choices": choices} if len(choices) > 1 else choices[0]


def run_generate(model: str, engine: Mapping[str, Any], flags: Mapping[str, Any], source: str, target: str) -> int:
    """Answer the prompts of file `source` into file `target`, `-` being stdin and stdout.

    `model` is a folder; the demo model when empty. Both files are opened before it is loaded. The exit code is 1
    when a prompt was not answered. Raises `OSError`.
    """
    with _opened(source, "r", sys.stdin) as file:
        lines = read_prompts(file, flags, objects_only=source.endswith(".jsonl"))
    if not lines:
        raise InvalidRequestError(f"no prompt in {'standard input' if source == '-' else source}")
    with _opened(target, "w", sys.stdout) as out:
        errors = write_outputs(lines, _generate(model, engine, [line for line in lines if line.error is None]), out)
    if errors:
        print(f"error: {len(errors)} of {len(lines)} prompts failed; {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


def _generate(model: str, engine: Mapping[str, Any], lines: Sequence[Line]) -> Sequence[Any]:
    if not lines:
        return []
    console = make_console(stderr=True)
    folder = resolve_model(model, console)
    from nanodeploy import LLM

    with bars(console) as bar, LLM(folder, loading=bar, **engine) as llm:
        prompts = [line.prompt for line in lines]
        if llm.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(f"{folder} has no tokenizer.json: give `prompt_token_ids`", param="model")
        params = [line.params for line in lines]
        return llm.generate(prompts, params, progress=partial(bar, "answering"), keep_errors=True)


def _opened(path: str, mode: str, standard: TextIO) -> AbstractContextManager[TextIO]:
    if path == "-":
        return nullcontext(standard)
    return cast(TextIO, Path(path).open(mode, encoding="utf-8"))
