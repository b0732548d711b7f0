"""What `LLM` takes for a prompt, in one of three plain forms."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanodeploy.outputs import MediaPrompt, Plain, Prompt

_FORMS = "a prompt is text, token ids, a MediaPrompt, or a dict with `prompt` or `prompt_token_ids`"


def many(prompts: Prompt | Sequence[Prompt]) -> list[Plain]:
    """One prompt or several. ValueError for what is neither."""
    if isinstance(prompts, str | MediaPrompt | Mapping):
        return [_plain(prompts)]
    if not isinstance(prompts, Collection):
        raise ValueError(f"got prompts of type {type(prompts).__name__}: {_FORMS}")
    listed: list[Any] = list(prompts)
    kinds = {_is_id(one) for one in listed}
    if kinds == {True}:
        return [_plain(listed)]
    if True in kinds:
        raise ValueError("prompts mixes token ids with prompts")
    return [_plain(one) for one in listed]


def _plain(prompt: Any) -> Plain:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, MediaPrompt):
        return replace(prompt, token_ids=_ids(prompt.token_ids))
    if isinstance(prompt, Mapping):
        return _of_dict(prompt)
    return _ids(prompt)


def _ids(prompt: Any) -> list[int]:
    if not isinstance(prompt, Collection):
        raise ValueError(f"got a prompt of type {type(prompt).__name__}: {_FORMS}")
    wrong = next((one for one in prompt if not _is_id(one)), None)
    if wrong is not None:
        raise ValueError(f"token ids are whole numbers, got {wrong!r}")
    return [operator.index(one) for one in prompt]


def _of_dict(prompt: Mapping[str, Any]) -> Plain:
    """A TextPrompt or TokensPrompt of vLLM's; the text beside token ids says nothing new."""
    unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
    if unknown:
        raise ValueError(f"got a prompt with {', '.join(sorted(map(repr, unknown)))}: {_FORMS}")
    found = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if found is None:
        raise ValueError(f"got an empty dict: {_FORMS}")
    return _plain(found)


def _is_id(value: object) -> bool:
    """Also a number of numpy's or torch's."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)
