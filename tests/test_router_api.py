"""What a client of the OpenAI API gets: both endpoints, whole and streamed, through the official client too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from router_support import MAX_MODEL_LEN, MODEL, Cluster, Script, cluster, events, say, tokenizer

from common.types import FinishReason, GenerationRequest, RequestStats

ANSWER = "Hello, world! 你好 🙂 Because molecules scatter blue light."
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}


@pytest.fixture
async def tiny(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path / "model", say(ANSWER)) as made:
        yield made


async def test_chat_through_the_openai_client(tiny: Cluster) -> None:
    async with tiny.openai() as client:
        whole = await client.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == ANSWER
        assert whole.choices[0].finish_reason == "stop"
        assert whole.id.startswith("chatcmpl-")
        assert whole.system_fingerprint
        stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(tiny.worker.requests[0].prompt_token_ids)
    assert whole.usage.completion_tokens == len(tokenizer().encode(ANSWER)) + 1  # and EOS


async def test_completion_through_the_sync_client(tiny: Cluster) -> None:
    def work() -> tuple[Any, list[Any]]:
        with tiny.openai_sync() as client:
            whole = client.completions.create(model=MODEL, prompt="Hi", max_tokens=8)
            return whole, list(client.completions.create(model=MODEL, prompt="Hi", max_tokens=8, stream=True))

    whole, chunks = await asyncio.to_thread(work)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].text == tokenizer().decode(tokenizer().encode(ANSWER)[:8])
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.id.startswith("cmpl-")


async def test_the_prompt_is_the_template(tiny: Cluster) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]
    await tiny.post("/v1/chat/completions", model=MODEL, messages=messages)
    text = tokenizer().decode(tiny.worker.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    open_end = [*CHAT["messages"], {"role": "assistant", "content": "Because"}]
    answer = await tiny.post("/v1/chat/completions", model=MODEL, messages=open_end, continue_final_message=True)
    assert answer.status_code == 200
    text = tokenizer().decode(tiny.worker.requests[1].prompt_token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nBecause")


async def test_all_parameters_reach_the_worker(tiny: Cluster) -> None:
    wanted = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 5,
        "min_p": 0.25,
        "min_tokens": 2,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "seed": 12,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
    }
    extra = {"logit_bias": {"5": 2.5}, "max_completion_tokens": 4, "cache_salt": "s", "priority": -3, "n": 2}
    tolerated = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    answer = await tiny.post("/v1/chat/completions", **CHAT, **wanted, **extra, **tolerated)
    assert answer.status_code == 200, answer.text
    request = tiny.worker.requests[0]
    got = {name: getattr(request.sampling, name) for name in wanted}
    assert got == {**wanted, "stop_token_ids": (7, 8)}
    assert request.sampling.logit_bias == ((5, 2.5),)
    assert (request.sampling.max_tokens, request.sampling.n) == (4, 2)
    assert (request.cache_salt, request.priority) == ("s", -3)
    assert request.deadline_s > 0


async def test_defaults(tmp_path: Path) -> None:
    async with cluster(tmp_path / "plain", say("x")) as plain:
        for _ in range(2):
            await plain.post("/v1/chat/completions", **CHAT)
        await plain.post("/v1/completions", model=MODEL, prompt="Hi")
        chat, again, completion = plain.worker.requests
        assert chat.sampling.temperature == 1.0
        assert chat.sampling.max_tokens == MAX_MODEL_LEN - len(chat.prompt_token_ids)
        assert completion.sampling.max_tokens == 16
        assert chat.sampling.seed != again.sampling.seed
    defaults = {"temperature": 0.5, "top_k": 9, "do_sample": True}
    async with cluster(tmp_path / "tuned", say("x"), generation=defaults) as tuned:
        await tuned.post("/v1/chat/completions", **CHAT)
        await tuned.post("/v1/chat/completions", **CHAT, temperature=0, top_k=0)
        first, second = tuned.worker.requests
        assert (first.sampling.temperature, first.sampling.top_k) == (0.5, 9)
        assert (second.sampling.temperature, second.sampling.top_k) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_and_prompt_lists(tmp_path: Path, stream: bool) -> None:
    def script(request: GenerationRequest) -> Script:
        start = tokenizer().decode(request.prompt_token_ids)
        outputs = [tokenizer().encode(f"{start}{c} and so on"[: 3 + 2 * c]) for c in range(request.sampling.n)]
        return Script(outputs)

    async with cluster(tmp_path, script) as made:
        answer = await made.post("/v1/completions", model=MODEL, prompt=["a", "b"], n=3, stream=stream)
        expected = {3 * p + c: f"{'ab'[p]}{c} and so on"[: 3 + 2 * c] for p in range(2) for c in range(3)}
        if not stream:
            assert {c["index"]: c["text"] for c in answer.json()["choices"]} == expected
            assert answer.json()["usage"]["prompt_tokens"] == 2
            return
        texts = dict.fromkeys(expected, "")
        for event in events(answer.text):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == expected


@pytest.mark.parametrize("prompt", ["Hello", [39, 296], [[39, 296]], ["Hello"]])
async def test_forms_of_a_prompt(tiny: Cluster, prompt: Any) -> None:
    answer = await tiny.post("/v1/completions", model=MODEL, prompt=prompt)
    assert answer.status_code == 200, answer.text
    given = tiny.worker.requests[0].prompt_token_ids
    assert given == (tuple(tokenizer().encode("Hello")) if "Hello" in prompt else (39, 296))


async def test_chat_logprobs(tiny: Cluster) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 15}
    whole = (await tiny.post("/v1/chat/completions", **body)).json()["choices"][0]
    ids = tokenizer().encode(ANSWER)[:15]
    content = whole["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == [tokenizer().token_bytes(i) for i in ids]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace") == whole["message"]["content"]
    assert {entry["logprob"] for entry in content} == {-0.25}
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0] == {k: content[0][k] for k in ("token", "logprob", "bytes")}
    streamed = events((await tiny.post("/v1/chat/completions", **body, stream=True)).text)
    entries = [e for s in streamed for c in s["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert entries == content
    zero = (await tiny.post("/v1/chat/completions", **CHAT, logprobs=True)).json()["choices"][0]
    assert zero["logprobs"]["content"][0]["top_logprobs"] == []
    none = await tiny.post("/v1/chat/completions", **CHAT, logprobs=False, top_logprobs=0)  # as vLLM's clients say it
    assert (none.status_code, none.json()["choices"][0]["logprobs"]) == (200, None)
    async with tiny.openai() as client:
        parsed = await client.chat.completions.create(**body)
        assert parsed.choices[0].logprobs is not None
        assert len(parsed.choices[0].logprobs.content or []) == 15


async def test_completion_logprobs_with_echo(tiny: Cluster) -> None:
    body = {"model": MODEL, "prompt": "Why is", "logprobs": 2, "echo": True, "max_tokens": 6}
    whole = (await tiny.post("/v1/completions", **body)).json()["choices"][0]
    output = tokenizer().decode(tokenizer().encode(ANSWER)[:6])
    assert whole["text"] == "Why is" + output
    columns = whole["logprobs"]
    assert "".join(columns["tokens"]) == whole["text"]
    assert columns["token_logprobs"] == [None] + [-0.25] * (len(columns["tokens"]) - 1)
    assert columns["top_logprobs"][0] is None
    for token, offset, top in zip(columns["tokens"], columns["text_offset"], columns["top_logprobs"], strict=True):
        assert whole["text"][offset : offset + len(token)] == token
        assert top is None or token in top
    streamed = events((await tiny.post("/v1/completions", **body, stream=True)).text)
    assert "".join(c["text"] for s in streamed for c in s["choices"]) == whole["text"]
    for name in columns:
        joined = [v for s in streamed for c in s["choices"] if c["logprobs"] for v in c["logprobs"][name]]
        assert joined == columns[name]


async def test_echo_alone_scores_a_prompt(tiny: Cluster) -> None:
    body = {"model": MODEL, "prompt": "Why is the sky", "logprobs": 1, "echo": True, "max_tokens": 0}
    answer = (await tiny.post("/v1/completions", **body)).json()
    assert answer["choices"][0]["text"] == "Why is the sky"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(tokenizer().encode("Why is the sky"))
    assert answer["usage"]["completion_tokens"] == 0


async def test_tokens_that_are_no_text_are_spelled_out(tmp_path: Path) -> None:
    partial = tokenizer().token_id("ð")
    assert partial is not None
    async with cluster(tmp_path, lambda request: Script([[partial]])) as made:
        chat = (await made.post("/v1/chat/completions", **CHAT, logprobs=True)).json()["choices"][0]
        assert chat["message"]["content"] == "�"
        assert chat["logprobs"]["content"][0] == {
            "token": "\\xf0",
            "logprob": -0.25,
            "bytes": [0xF0],
            "top_logprobs": [],
        }
        body = {"model": MODEL, "prompt": "x", "logprobs": 0}
        assert (await made.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]["tokens"] == [
            "bytes:\\xf0"
        ]


async def test_special_tokens_and_stop_tokens_in_text(tmp_path: Path) -> None:
    ids = [*tokenizer().encode("a<|im_start|>b"), 2]
    ended = Script([ids], finish=FinishReason.STOP, stop_token_id=2)
    async with cluster(tmp_path, lambda request: ended) as made:

        async def text(**extra: Any) -> tuple[str, Any]:
            choice = (await made.post("/v1/chat/completions", **CHAT, **extra)).json()["choices"][0]
            return choice["message"]["content"], choice["stop_reason"]

        assert await text() == ("ab", None)
        assert await text(skip_special_tokens=False) == ("a<|im_start|>b", None)
        shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
        assert await text(**shown) == ("a<|im_start|>b<|im_end|>", None)
        assert await text(stop_token_ids=[2]) == ("ab", 2)


async def test_usage_counts_cached_tokens(tmp_path: Path) -> None:
    stats = RequestStats(cached_tokens=3, transferred_tokens=8, remote_cached_tokens=4, prefill_worker="p0")
    async with cluster(tmp_path, say("x", stats=stats)) as made:
        body = {"model": MODEL, "prompt": list(range(20, 40))}
        answer = await made.http.post("/v1/completions", json=body, headers={"x-nanodeploy-timings": "1"})
        assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
        timings = answer.json()["nanodeploy"]
        assert timings["requests"][0]["prefill_worker"] == "p0"
        assert 0 < timings["router"]["first_token_ms"] <= timings["router"]["total_ms"]
        stream = await made.http.post(
            "/v1/completions", json={**body, "stream": True}, headers={"x-nanodeploy-timings": "1"}
        )
        assert events(stream.text)[-1]["nanodeploy"]["requests"][0]["remote_cached_tokens"] == 4
        assert "nanodeploy" not in (await made.post("/v1/completions", **body)).json()


async def test_continuous_usage(tiny: Cluster) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await tiny.post("/v1/chat/completions", **CHAT, stream=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events(answer.text)]
    assert counts == sorted(counts)
    assert counts[-1] == len(tokenizer().encode(ANSWER)) + 1


async def test_ids_and_traces(tiny: Cluster) -> None:
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    headers = {"x-request-id": "mine-1", "traceparent": parent}
    answer = await tiny.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["traceparent"].split("-")[1] == "a" * 32
    sent = tiny.worker.requests[0]
    assert sent.traceparent == answer.headers["traceparent"] != parent
    assert len(sent.request_id) == 32
    plain = await tiny.post("/v1/chat/completions", **CHAT)
    assert len(plain.headers["x-request-id"]) == 32
    bad = await tiny.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "a b<script>"})
    assert bad.headers["x-request-id"] != "a b<script>"


async def test_tokenize_and_detokenize(tiny: Cluster) -> None:
    ids = tokenizer().encode("Hello 你好")
    answer = (await tiny.post("/tokenize", model=MODEL, prompt="Hello 你好", return_token_strs=True)).json()
    assert (answer["count"], answer["tokens"], answer["max_model_len"]) == (len(ids), ids, MAX_MODEL_LEN)
    assert answer["token_strs"] == [tokenizer().token_string(i) for i in ids]
    assert (await tiny.post("/detokenize", model=MODEL, tokens=ids)).json() == {"prompt": "Hello 你好"}
    chat = (await tiny.post("/tokenize", messages=CHAT["messages"])).json()
    await tiny.post("/v1/chat/completions", **CHAT)
    assert tuple(chat["tokens"]) == tiny.worker.requests[0].prompt_token_ids
    assert chat["token_strs"] is None


async def test_a_model_is_listed_once_and_its_other_names_are_answered(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("one two")) as made:
        info = made.workers[0].info()
        folder = "/models/of/somebody"
        model = msgspec.structs.replace(info.model, served_names=(folder,))
        made.members.put(msgspec.structs.replace(info, model=model))
        listed = (await made.http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == [MODEL]
        assert "somebody" not in str(listed)
        assert (await made.http.get(f"/v1/models/{folder}")).json()["id"] == folder
        body = {"model": folder, "prompt": "a", "max_tokens": 2}
        assert (await made.http.post("/v1/completions", json=body)).status_code == 200


async def test_small_routes(tiny: Cluster) -> None:
    async with tiny.openai() as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
    assert (await tiny.http.get("/v1/models")).json()["data"][0]["max_model_len"] == MAX_MODEL_LEN
    assert (await tiny.http.get("/health")).status_code == 200
    assert (await tiny.http.get("/ready")).json()["ready"] is True
    for path in ("/health", "/ready", "/v1/models", f"/v1/models/{MODEL}", "/dashboard", "/docs"):
        whole, head = await tiny.http.get(path), await tiny.http.head(path)
        assert (head.status_code, head.content, whole.status_code) == (200, b"", 200), path
        assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content)), path
    assert "Swagger" in (await tiny.http.get("/docs")).text
    document = (await tiny.http.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models"} <= set(
        document["paths"]
    )
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert "messages" in schema["required"]
    assert schema["additionalProperties"] is False


async def test_metrics(tiny: Cluster) -> None:
    await tiny.post("/v1/chat/completions", **CHAT)
    text = (await tiny.http.get("/metrics")).text
    for line in (
        'nanodeploy:request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
        'nanodeploy:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        'nanodeploy:http_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'nanodeploy:router_workers{role="decode",state="ready"} 1.0',
        'nanodeploy:num_requests_running{model_name="tiny"} 0.0',
        "nanodeploy:router_attached_streams 1.0",
    ):
        assert line in text, line


async def test_model_may_be_left_out_and_templates_may_lack(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x"), template=None) as made:
        assert (await made.post("/v1/completions", prompt="Hi")).json()["model"] == MODEL
        refused = await made.post("/v1/chat/completions", **CHAT)
        assert refused.status_code == 400
        assert "no chat template" in refused.json()["error"]["message"]


async def test_prompts_are_cut_on_request(tiny: Cluster) -> None:
    ids = [i % 400 for i in range(500)]
    await tiny.post("/v1/completions", model=MODEL, prompt=ids, truncate_prompt_tokens=10)
    await tiny.post("/v1/completions", model=MODEL, prompt=ids, truncate_prompt_tokens=-1, max_tokens=6)
    first, second = tiny.worker.requests
    assert first.prompt_token_ids == tuple(ids[-10:])
    assert second.prompt_token_ids == tuple(ids[-250:])


async def test_explain_says_why_whole_and_streamed(tmp_path: Path) -> None:
    async with cluster(tmp_path / "model", say(ANSWER), num_workers=2) as made:
        for stream in (False, True):
            body = {"model": MODEL, "prompt": "Why is the sky blue?", "max_tokens": 3, "stream": stream}
            answer = await made.http.post("/v1/completions", json=body, headers={"x-nanodeploy-explain": "1"})
            found = events(answer.text)[-1]["nanodeploy"] if stream else answer.json()["nanodeploy"]
            assert found["router"]["total_ms"] > 0
            ((placed,),) = found["routing"]
            assert placed["policy"] == "cost"
            assert {c["decode"] for c in placed["candidates"]} == {"d0", "d1"}
            assert placed["chosen"]["decode"] in ("d0", "d1")
            best = placed["candidates"][0]
            assert best["score"] == pytest.approx(sum(best["terms"].values()), abs=0.01)
