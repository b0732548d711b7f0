"""Every field of every body, given what it cannot be: an error that names it, or an answer, and never a 5xx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_support import PARSERS
from pydantic import BaseModel, ValidationError
from router_support import MODEL, Cluster, Script, cluster, say

from common.types import FinishReason
from services.router import schemas
from services.router.api import schemas as api_schemas

MESSAGES = [{"role": "user", "content": "Hi"}]
WRONG: list[Any] = [
    10**30, -(10**30), 2**31, 2**32, 2**63, 0, -1, 1e300, 1e-300, True, "", "x", [], [[]], [5], ["x"], [{}], {},
    {"x": 1}, {"type": "x"}, [{"type": "x"}], {"type": "function"}, {"type": "json_schema"}, {"effort": 5},
    {"format": {"type": "x"}}, {"thinking": "yes"}, {"include_usage": True}, {"5": 1e300}, {"x": 1.0},
    [{"role": "user"}], [{"role": "x", "content": "x"}], [{"role": "user", "content": [{"type": "x"}]}],
    [{"role": "user", "content": [{"type": "tool_result"}]}], [{"type": "function_call"}], [{"name": "f"}],
    [{"type": "function", "function": {"name": ""}}], [{"name": "f", "input_schema": 5}],
]  # fmt: skip
BODIES: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("/v1/chat/completions", schemas.ChatBody, {"messages": MESSAGES, "max_tokens": 2}),
    ("/v1/completions", schemas.CompletionBody, {"prompt": "Hi", "max_tokens": 2}),
    ("/tokenize", schemas.TokenizeBody, {"prompt": "Hi"}),
    ("/tokenize", schemas.TokenizeBody, {"messages": MESSAGES}),
    ("/detokenize", schemas.DetokenizeBody, {"tokens": [1]}),
    ("/v1/responses", api_schemas.ResponsesBody, {"input": "Hi", "store": False, "max_output_tokens": 2}),
    ("/v1/messages", api_schemas.MessagesBody, {"messages": MESSAGES, "max_tokens": 2}),
    ("/v1/messages/count_tokens", api_schemas.CountBody, {"messages": MESSAGES}),
    ("/v1/embeddings", api_schemas.EmbeddingsBody, {"input": "Hi"}),
]
STORED = {"store", "background", "previous_response_id"}  # need a storage, which is not there


@pytest.mark.parametrize(("kind", "name"), [(schemas.CompletionBody, "prompt"), (api_schemas.EmbeddingsBody, "input")])
@pytest.mark.parametrize("wrong", ["5", 2.5, None, [5]], ids=str)
def test_each_kind_of_prompt_stops_at_its_first_mistake(kind: type[BaseModel], name: str, wrong: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({"model": MODEL, name: [*range(4096), wrong, *range(4096), wrong]})
    errors = raised.value.errors()
    assert [error["loc"][1] for error in errors] == ["str", "list[str]", "list[int]", "list[list[int]]"]
    assert errors[2]["loc"] == (name, "list[int]", 4096)


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "5"], [5, 6], [[5, 6], [7]]], ids=str)
def test_prompts_of_every_kind_stay_what_they_are(prompt: Any) -> None:
    assert schemas.CompletionBody.model_validate({"model": MODEL, "prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(("path", "kind", "base"), BODIES, ids=lambda value: value if isinstance(value, str) else "")
async def test_every_field_is_named_in_its_errors(
    path: str, kind: type[BaseModel], base: dict[str, Any], tmp_path: Path
) -> None:
    embeds: dict[str, Any] = {"embedding_size": 64} if "embeddings" in path else {}
    script = say("Hi") if not embeds else lambda _: Script([[]], finish=FinishReason.STOP, vector=bytes(256))
    async with cluster(tmp_path / "model", script, **PARSERS, **embeds) as made:
        refused = 0
        for name, info in kind.model_fields.items():
            field = info.alias or name
            for wrong in WRONG if field not in STORED else ():
                refused += await _try(made, path, {"model": MODEL, **base}, field, wrong)
        assert refused > 10 * len(kind.model_fields)


async def _try(made: Cluster, path: str, base: dict[str, Any], field: str, wrong: Any) -> bool:
    """Whether it was refused."""
    answer = await made.post(path, **base | {field: wrong})
    if answer.status_code == 200 or (field, answer.status_code) == ("timeout", 504):
        return False
    error = answer.json()["error"]
    told = (path, field, wrong, answer.status_code, error)
    assert answer.status_code in (400, 404), told
    assert field in error["message"] or (field, answer.status_code) == ("model", 404), told
    if not path.startswith("/v1/messages"):  # Anthropic's errors have no param
        both = path == "/tokenize" and "either prompt or messages" in error["message"]
        assert both or error["param"].partition("[")[0].partition(".")[0] == field, told
    return True
