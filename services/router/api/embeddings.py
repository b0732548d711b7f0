"""`POST /v1/embeddings`: the vectors of texts, by models that make them.

    body -> prompts, each a request of its own, all at once -> (relay, workers) -> one vector each -> one answer

A request goes the way of a completion whose prompts end with a vector and bring no token: what limits, queues, moves
and counts those does the same here.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import orjson

from common.errors import InternalError
from common.types import Clock, ModelInfo, Pooling
from services.router.admission.sizes import check_prompts
from services.router.api.schemas import EmbeddingsBody
from services.router.exchange import Exchange
from services.router.gateway import Gateway
from services.router.models import ModelText, ModelTexts
from services.router.params import Job, embedding_job
from services.router.replies import Ended, Head, Usage
from services.router.schemas import CompletionBody


class EmbeddingStyle:
    """`as_base64`: vectors as bytes, which is what the `openai` client asks for unless told otherwise."""

    prefix = "embd-"
    columns = False
    finished = None

    def __init__(self, *, as_base64: bool) -> None:
        self._as_base64 = as_base64

    def chunks(self, head: Head, usage: bytes | None) -> NoReturn:
        raise AssertionError("embeddings are not streamed")

    def whole(self, head: Head, choices: Sequence[Ended], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        data = [{"object": "embedding", "index": c.number, "embedding": self._shown(c.vector)} for c in choices]
        counted = {
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
        answer: dict[str, Any] = {"object": "list", "data": data, "model": head.model, "usage": counted}
        if timings is not None:
            answer["nanodeploy"] = timings
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    def _shown(self, vector: bytes) -> object:
        if not vector:
            raise InternalError("a worker ended an embedding without its vector")
        return base64.b64encode(vector).decode() if self._as_base64 else np.frombuffer(vector, "<f4")


class Embeddings:
    """`max_prompts`: inputs of one request."""

    def __init__(self, gateway: Gateway, clock: Clock, max_prompts: int) -> None:
        self._gateway = gateway
        self._clock = clock
        self._max_prompts = max_prompts

    async def create(self, exchange: Exchange) -> None:
        with self._gateway.admitted():
            started_s = self._clock.now()
            body = await self._gateway.body(exchange, EmbeddingsBody)
            check_prompts(body.input, self._max_prompts, "input")
            pooling = Pooling(body.dimensions or 0)

            async def make_job(
                prompts: CompletionBody, model: ModelInfo, text: ModelText, texts: ModelTexts, rng: random.Random
            ) -> Job:
                return await embedding_job(prompts, model, text, texts, pooling)

            style = EmbeddingStyle(as_base64=body.encoding_format == "base64")
            await self._gateway.serve(exchange, _as_completion(body), make_job, style, started_s, pools=True)


def _as_completion(body: EmbeddingsBody) -> CompletionBody:
    """What was checked already is not checked again: inputs may be large."""
    return CompletionBody.model_construct(
        model=body.model,
        prompt=body.input,
        user=body.user,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        add_special_tokens=body.add_special_tokens,
        cache_salt=body.cache_salt,
        priority=body.priority,
        timeout=body.timeout,
    )
