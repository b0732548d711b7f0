"""Models and what they can do; embeddings, where a model has none; logprobs of prompts, as vLLM shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from api_support import PARSERS
from router_support import MODEL, cluster, say, tokenizer

PROMPT = "Why is the sky blue?"


async def test_models_say_what_they_can_do(tmp_path: Path) -> None:
    async with cluster(tmp_path / "chat", say("x"), **PARSERS) as made, made.openai() as client:
        await client.completions.create(model=MODEL, prompt="x")  # its texts have been read
        (model,) = (await client.models.list()).data
        assert model.model_dump()["capabilities"] == {
            "completions": True,
            "chat": True,
            "responses": True,
            "messages": True,
            "tool_calls": True,
            "reasoning": True,
            "embeddings": False,
        }
        assert await client.models.retrieve(MODEL) == model
    bare = {"tool_call_parser": "none", "reasoning_parser": "none"}
    async with cluster(tmp_path / "base", say("x"), template=None, **bare) as made, made.openai() as client:
        await client.completions.create(model=MODEL, prompt="x")
        able = (await client.models.retrieve(MODEL)).model_dump()["capabilities"]
        assert [name for name, can in able.items() if can] == ["completions"]
        for path, body in (("responses", {"input": "x"}), ("messages", {"max_tokens": 5, "messages": [USER]})):
            refused = await made.post(f"/v1/{path}", **body)
            assert refused.status_code == 400
            assert "no chat template" in refused.json()["error"]["message"]


USER = {"role": "user", "content": PROMPT}


async def test_embeddings_are_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x")) as made, made.openai() as client:
        with pytest.raises(openai.BadRequestError, match="has no embeddings") as wrong:
            await client.embeddings.create(model=MODEL, input="x")
        assert wrong.value.param == "model"
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="other", input="x")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_prompt_logprobs(tmp_path: Path, path: str) -> None:
    asked: dict[str, Any] = {"messages": [USER]} if "chat" in path else {"prompt": PROMPT}
    async with cluster(tmp_path, say("x")) as made:
        answer = (await made.post(path, model=MODEL, prompt_logprobs=2, max_tokens=3, **asked)).json()
        found = answer["prompt_logprobs"] if "chat" in path else answer["choices"][0]["prompt_logprobs"]
        ids = made.worker.requests[0].prompt_token_ids
        assert made.worker.requests[0].sampling.prompt_logprobs == 2
        assert found[0] is None
        assert len(found) == len(ids)
        for token, entry in zip(ids[1:], found[1:], strict=True):
            best, second = str(token % 400), str((token + 1) % 400)
            assert set(entry) == {str(token), best, second}
            assert (entry[best]["rank"], entry[best]["logprob"], entry[second]["rank"]) == (1, -0.25, 2)
            assert entry[str(token)]["decoded_token"] == tokenizer().decode([token], skip_special_tokens=False)
        none = (await made.post(path, model=MODEL, prompt_logprobs=0, max_tokens=3, **asked)).json()
        shown = none["prompt_logprobs"] if "chat" in path else none["choices"][0]["prompt_logprobs"]
        assert [len(entry) for entry in shown[1:]] == [1] * (len(ids) - 1)
        for wrong in ({"prompt_logprobs": 21}, {"prompt_logprobs": 1, "stream": True}):
            refused = await made.post(path, model=MODEL, **asked, **wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


async def test_prompt_logprobs_beside_an_echo(tmp_path: Path) -> None:
    async with cluster(tmp_path, say("x")) as made:
        body: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "Hi"], "echo": True, "logprobs": 1, "max_tokens": 3}
        plain = (await made.post("/v1/completions", **body)).json()["choices"]
        both = (await made.post("/v1/completions", **body, prompt_logprobs=2)).json()["choices"]
        for one, other in zip(plain, both, strict=True):
            assert len(other["prompt_logprobs"]) == len(tokenizer().encode(PROMPT if other["index"] == 0 else "Hi"))
            assert other["logprobs"] == one["logprobs"], "an echo shows as many as it was asked for"
