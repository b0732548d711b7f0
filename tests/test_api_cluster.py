"""Every API over a real cluster, with prefill workers and without, through the official clients: same answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import tiny_models
from api_support import ended
from cluster_support import RunningCluster, eventually, run_cluster

SMALL = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512, "max_num_seqs": 32}
TEXT = " ".join(tiny_models.SENTENCES)[:400]
TURN: Any = [{"role": "user", "content": TEXT}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["1", "0"], ids=["separated", "together"])
def cluster(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tiny_models.make_llama(tmp_path_factory.mktemp("model"), seed=1)
    with run_cluster(tmp_path_factory.mktemp("cluster"), folder, "--prefill", request.param, **SMALL) as running:
        yield running


def clients(cluster: RunningCluster) -> tuple[openai.AsyncOpenAI, anthropic.AsyncAnthropic]:
    return (
        openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none"),
        anthropic.AsyncAnthropic(base_url=cluster.url, api_key="none"),
    )


async def test_one_conversation_has_one_answer_in_every_api(cluster: RunningCluster) -> None:
    model, (first, second) = cluster.model, clients(cluster)
    async with first, second:
        chat = await first.chat.completions.create(model=model, messages=TURN, max_tokens=20, temperature=0)
        text = chat.choices[0].message.content
        assert text
        asked: Any = {"model": model, "input": TURN, "max_output_tokens": 20, "temperature": 0}
        whole = await first.responses.create(**asked)
        events = [event async for event in await first.responses.create(**asked, stream=True)]
        response = events[-1].response
        assert [whole.output_text, response.output_text] == [text] * 2
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
        assert chat.usage is not None
        assert {r.usage.input_tokens for r in (whole, response)} == {chat.usage.prompt_tokens}
        greedy: Any = {"model": model, "max_tokens": 20, "messages": TURN, "extra_body": {"temperature": 0}}
        message = await second.messages.create(**greedy)
        async with second.messages.stream(**greedy) as stream:
            streamed = await stream.get_final_message()
        assert [message.content[0].text, streamed.content[0].text] == [text] * 2
        usage = message.usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
        counted = await second.messages.count_tokens(model=model, messages=TURN)
        assert counted.input_tokens == chat.usage.prompt_tokens


async def test_a_stored_response_is_gone_on_with(cluster: RunningCluster) -> None:
    model, (client, other) = cluster.model, clients(cluster)
    async with client, other:
        one = await client.responses.create(model=model, input=TEXT, max_output_tokens=8, temperature=0)
        two = await client.responses.create(
            model=model, input="And?", previous_response_id=one.id, max_output_tokens=8, temperature=0
        )
        turns: Any = [*TURN, {"role": "assistant", "content": one.output_text}, {"role": "user", "content": "And?"}]
        chat = await client.chat.completions.create(model=model, messages=turns, max_tokens=8, temperature=0)
        assert two.output_text == chat.choices[0].message.content
        assert (await client.responses.retrieve(two.id)).output_text == two.output_text
        made = await client.responses.create(
            model=model, input=TEXT, max_output_tokens=8, temperature=0, background=True
        )
        done = await ended(lambda: client.responses.retrieve(made.id))
        assert done.output_text == one.output_text


async def test_the_form_of_an_answer(cluster: RunningCluster) -> None:
    model, (client, other) = cluster.model, clients(cluster)
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}
    async with client, other:
        response = await client.responses.create(model=model, input="Yes?", text=form, max_output_tokens=200)
        assert isinstance(json.loads(response.output_text)["a"], bool)
        config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
        message = await other.messages.create(
            model=model, max_tokens=200, messages=[{"role": "user", "content": "Yes?"}], output_config=config
        )
        assert isinstance(json.loads(message.content[0].text)["a"], bool)
        wrong: Any = {"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}, "strict": True}}
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model=model, input="Yes?", text=wrong)


async def test_a_batch_over_workers(cluster: RunningCluster) -> None:
    model, (client, other) = cluster.model, clients(cluster)
    prompts = [f"{i} {TEXT}"[: 60 + 7 * i] for i in range(12)]
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0},
        }
        for i, prompt in enumerate(prompts)
    ]
    async with client, other:
        content = b"\n".join(json.dumps(line).encode() for line in lines)
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        done = await ended(lambda: client.batches.retrieve(batch.id), 60)
        assert done.status == "completed"
        rows = (await client.files.content(done.output_file_id or "")).text.splitlines()
        found = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in map(json.loads, rows)}

        async def alone(prompt: str) -> str:
            answer = await client.completions.create(model=model, prompt=prompt, max_tokens=6, temperature=0)
            return answer.choices[0].text

        assert found == {str(i): text for i, text in enumerate(await asyncio.gather(*map(alone, prompts)))}


def test_a_router_that_is_killed_loses_no_line(cluster: RunningCluster) -> None:
    if any(worker.role == "prefill" for worker in cluster.workers()):
        pytest.skip("once is enough")
    body = {"model": cluster.model, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": f"{i} {TEXT}"}}
        for i in range(700)
    ]
    content = b"\n".join(json.dumps(line).encode() for line in lines)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=10) as client:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        id_ = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="1h").id

        def completed() -> int:
            counts = client.batches.retrieve(id_).request_counts
            return counts.completed if counts else 0

        eventually(lambda: completed() > 0, 60, "lines are done")
        assert completed() < len(lines), "it is killed in the middle"
        cluster.kill("router")
        eventually(lambda: client.batches.retrieve(id_).status == "completed", 90, "the batch ends")
        assert completed() == len(lines)
        rows = client.files.content(client.batches.retrieve(id_).output_file_id or "").text.splitlines()
        assert sorted(int(json.loads(row)["custom_id"]) for row in rows) == [*range(len(lines))]


async def test_prompt_logprobs_are_the_models(cluster: RunningCluster) -> None:
    """An echo's logprobs and a prompt's are the same numbers, told in two forms."""
    body: dict[str, Any] = {"model": cluster.model, "prompt": TEXT[:100], "echo": True, "logprobs": 2, "max_tokens": 1}
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        choice: Any = (await client.completions.create(**body, extra_body={"prompt_logprobs": 2})).choices[0]
        shown = choice.prompt_logprobs
        for entry, logprob in zip(shown[1:], choice.logprobs.token_logprobs[1 : len(shown)], strict=True):
            assert logprob in {found["logprob"] for found in entry.values()}
            assert max(found["logprob"] for found in entry.values()) == next(
                found["logprob"] for found in entry.values() if found["rank"] == 1
            )
