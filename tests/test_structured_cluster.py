"""Structured output through all services, each its own process, while a decode worker is killed under it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import tiny_models
from cluster_support import RunningCluster, eventually, run_cluster

TEXT = " ".join(tiny_models.SENTENCES)[:300]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"way": {"type": "array", "items": {"enum": ["left", "right"]}, "minItems": 40, "maxItems": 60}},
    "required": ["way"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "way", "schema": SCHEMA, "strict": True}}
IMPOSSIBLE = {"type": "integer", "minimum": 5, "maximum": 3}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tiny_models.make_llama(tmp_path_factory.mktemp("model"), seed=1, max_position_embeddings=2048)
    speculation = {"method": "ngram", "num_speculative_tokens": 3}
    with run_cluster(
        tmp_path_factory.mktemp("cluster"),
        folder,
        "--decode",
        "2",
        kv_cache_memory_bytes=32 << 20,
        max_num_batched_tokens=64,
        speculative_config=speculation,
    ) as running:
        eventually(running.is_ready, 60, "the cluster serves")
        yield running
        eventually(running.is_idle, 35, "every block is free or cached again")


def chat(cluster: RunningCluster, **more: Any) -> dict[str, Any]:
    return {
        "model": cluster.model,
        "messages": [{"role": "user", "content": TEXT}],
        "response_format": FORMAT,
        "temperature": 1.0,
        "max_tokens": 1200,
        **more,
    }


def test_the_official_client_gets_what_its_schema_says(cluster: RunningCluster) -> None:
    client: Any = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none")
    for seed in range(3):
        whole = client.chat.completions.create(**chat(cluster, seed=seed, n=2))
        for choice in whole.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        chunks = list(client.chat.completions.create(**chat(cluster, seed=seed, stream=True)))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    extra = {"guided_choice": ["north", "south"]}
    array = SCHEMA["properties"]["way"] | {"uniqueItems": False, "default": []}
    idle = SCHEMA | {"$schema": "http://json-schema.org/schema#", "propertyNames": {"type": "string"}}
    idle["properties"] = {"way": array}
    form = {"type": "json_schema", "name": "way", "schema": idle, "strict": True}
    response = client.responses.create(model=cluster.model, input=TEXT, max_output_tokens=1200, text={"format": form})
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    answer = client.completions.create(model=cluster.model, prompt=TEXT, max_tokens=40, extra_body=extra)
    assert answer.choices[0].text in extra["guided_choice"]


def test_demanded_calls_are_calls_of_the_functions(cluster: RunningCluster) -> None:
    """A model that knows nothing of tools is made to call: one named function, or any; with its arguments' schema."""
    client: Any = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none")
    schema = SCHEMA | {"properties": {"way": {"enum": ["left", "right"]}}}
    names = ["go", "look"]
    tools = [{"type": "function", "function": {"name": n, "parameters": schema, "strict": True}} for n in names]
    named = {"type": "function", "function": {"name": "look"}}
    for choice, parallel, finish in (("required", False, "tool_calls"), (named, None, "stop")):
        body = chat(
            cluster, response_format=None, tools=tools, tool_choice=choice, parallel_tool_calls=parallel, seed=1
        )
        whole = client.chat.completions.create(**body).choices[0]
        (call,) = whole.message.tool_calls
        assert (whole.finish_reason, whole.message.content) == (finish, None)
        assert call.function.name in (names if choice == "required" else ["look"])
        jsonschema.validate(json.loads(call.function.arguments), schema)
        parts = [
            part.function
            for chunk in client.chat.completions.create(**body, stream=True)
            for part in chunk.choices[0].delta.tool_calls or ()
        ]
        assert parts[0].name == call.function.name
        assert "".join(part.arguments for part in parts) == call.function.arguments


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_a_400_before_the_first_byte(cluster: RunningCluster, stream: bool) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": IMPOSSIBLE}}},
            "response_format",
        ),
        ({"response_format": None, "guided_regex": "(a"}, "guided_regex"),
        ({"response_format": None, "structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
    ]
    for more, param in cases:
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=chat(cluster, stream=stream, **more), timeout=60)
        assert answer.status_code == 400
        assert answer.headers["content-type"].startswith("application/json")
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"].startswith(f"{param} ")


def test_a_killed_decode_worker_leaves_valid_json(cluster: RunningCluster) -> None:
    """Its streams go on elsewhere from the tokens that were sent, to the end of what they would have been."""
    eventually(lambda: sum(w.role == "decode" for w in cluster.workers()) == 2, 60, "two decode workers")
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    begun = threading.Barrier(5, timeout=60)

    def follow(seed: int) -> None:
        body = chat(cluster, seed=seed, stream=True)
        parts: list[str] = []
        with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=90) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                (choice,) = event["choices"]
                parts.append(choice["delta"].get("content") or "")
                if len(parts) == 20:
                    begun.wait()
                if choice["finish_reason"]:
                    finishes[seed] = choice["finish_reason"]
        texts[seed] = "".join(parts)

    threads = [threading.Thread(target=follow, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    cluster.kill("decode-0")
    for thread in threads:
        thread.join(90)
    assert finishes == dict.fromkeys(range(4), "stop")
    for text in texts.values():
        jsonschema.validate(json.loads(text), SCHEMA)
    eventually(lambda: sum(w.role == "decode" for w in cluster.workers()) == 2, 60, "it is there again")
    for seed, text in texts.items():
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=chat(cluster, seed=seed), timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == text
