"""`item_reference` in the input of `/v1/responses`: items of earlier responses by their ids, as clients send them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_support import PARSERS, Stored, ended, stored_cluster
from redis_support import RedisServer, server
from router_support import MODEL, cluster, say

from services.router.api.references import MAX_REFERRED

__all__ = ["server"]

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
ANSWER = f"<think>It is a sum.</think>I add them.{CALL}"
TOOLS: list[Any] = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
QUESTION: dict[str, Any] = {"role": "user", "content": "1 + 2?"}
ASKED: Any = {"model": MODEL, "tools": TOOLS}


@pytest.fixture
async def stored(server: RedisServer, tmp_path: Path) -> AsyncIterator[Stored]:
    async with stored_cluster(server, tmp_path / "model", say(ANSWER), max_model_len=2048, **PARSERS) as made:
        yield made


def refer(item: Any) -> dict[str, Any]:
    return {"type": "item_reference", "id": item if isinstance(item, str) else item.id}


def spelled(response: Any) -> list[Any]:
    """A response's output as items of an input."""
    return [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]


def last_prompt(stored: Stored) -> tuple[int, ...]:
    return tuple(stored.cluster.worker.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("how", ["whole", "stream", "background"])
async def test_references_are_the_items_that_they_name(stored: Stored, how: str) -> None:
    async with stored.cluster.openai() as client:
        if how == "stream":
            async with client.responses.stream(**ASKED, input=[QUESTION]) as events:
                first = await events.get_final_response()
        else:
            first = await client.responses.create(**ASKED, input=[QUESTION], background=how == "background")
            first = await ended(lambda: client.responses.retrieve(first.id))
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
        result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "3"}
        (asked,) = (await client.responses.input_items.list(first.id)).data

        await client.responses.create(**ASKED, input=[QUESTION, *spelled(first), result])
        wanted = last_prompt(stored)
        named: Any = [refer(asked), *map(refer, first.output), result]
        second = await client.responses.create(**ASKED, input=named)
        assert last_prompt(stored) == wanted
        untyped: Any = [{"id": entry["id"]} if entry["type"] == "item_reference" else entry for entry in named]
        await client.responses.create(**ASKED, input=untyped)
        assert last_prompt(stored) == wanted

        items = (await client.responses.input_items.list(second.id, order="asc")).data
        assert [item.type for item in items] == [
            *("message", "reasoning", "message", "function_call", "function_call_output")
        ]
        assert [item.id for item in items[:4]] == [asked.id, *(item.id for item in first.output)]


async def test_items_of_several_responses_may_be_named(stored: Stored) -> None:
    """Those of a response whose input was references too. A deleted one takes none of its followers' items along."""
    async with stored.cluster.openai() as client:
        first = await client.responses.create(**ASKED, input=[QUESTION])
        second = await client.responses.create(**ASKED, input=[*map(refer, first.output), QUESTION])
        both: Any = [QUESTION, *map(refer, first.output), QUESTION, *map(refer, second.output), QUESTION]
        await client.responses.create(**ASKED, input=both)
        wanted = last_prompt(stored)
        await client.responses.create(**ASKED, input=[QUESTION, *spelled(first), QUESTION, *spelled(second), QUESTION])
        assert last_prompt(stored) == wanted

        await client.responses.delete(first.id)
        third = await client.responses.create(**ASKED, input=[QUESTION], previous_response_id=second.id)
        assert third.status == "completed"
        with pytest.raises(openai.NotFoundError, match=first.output[0].id):
            await client.responses.create(**ASKED, input=both)


async def test_what_is_not_there_is_named(stored: Stored) -> None:
    async with stored.cluster.openai() as client:
        first = await client.responses.create(**ASKED, input=[QUESTION])
        unstored = await client.responses.create(**ASKED, input=[QUESTION], store=False)
        own = await client.responses.create(**ASKED, input=[{**QUESTION, "id": "msg_mine"}])
        (mine,) = (await client.responses.input_items.list(own.id)).data
        assert mine.id == "msg_mine"
        lost = [unstored.output[0].id, mine.id, first.id, first.output[0].id[:-2] + "77", "", "x" * 5000]
        for id_ in lost:
            for stream in (False, True):
                with pytest.raises(openai.NotFoundError) as wrong:
                    await client.responses.create(**ASKED, input=[QUESTION, refer(id_)], stream=stream)
                assert wrong.value.param == "input[1].id"
                assert f"'{id_[:128]}'" in wrong.value.message
        for id_ in (None, 5):
            with pytest.raises(openai.BadRequestError) as wrong_type:
                await client.responses.create(**ASKED, input=[{"type": "item_reference", "id": id_}])
            assert wrong_type.value.param == "input[0].id"
        many: Any = [refer(f"msg_{i:032x}00") for i in range(MAX_REFERRED + 1)]
        with pytest.raises(openai.BadRequestError, match="the limit is"):
            await client.responses.create(**ASKED, input=many)


async def test_nobody_refers_to_items_of_others(server: RedisServer, tmp_path: Path) -> None:
    async with stored_cluster(server, tmp_path, say("Yes."), api_keys=("one", "two")) as made:
        one, two = (
            openai.AsyncOpenAI(base_url=f"{made.cluster.url}/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        async with one, two:
            mine = await one.responses.create(model=MODEL, input="One?")
            given: Any = [refer(mine.output[0]), QUESTION]
            assert (await one.responses.create(model=MODEL, input=given)).status == "completed"
            with pytest.raises(openai.NotFoundError, match=mine.output[0].id):
                await two.responses.create(model=MODEL, input=given)


async def test_without_a_controller_a_reference_cannot_be_read(tmp_path: Path) -> None:
    async with cluster(tmp_path, say(ANSWER), controllers=("127.0.0.1:9",)) as made:
        answer = await made.post("/v1/responses", model=MODEL, input=[refer(f"msg_{0:032x}00")])
        assert answer.status_code == 503
