"""What a request must be like to enter an engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from common.engine.media import Media, outside
from common.engine.messages import prompt_logprobs_nbytes
from common.errors import InvalidRequestError, OverloadedError, UnsupportedError
from common.models.pooling import PoolingSpec
from common.types import GenerationRequest, Pooling


@dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against. `max_model_len` and `vocab_size` in tokens."""

    model_hash: bytes
    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    max_waiting_seqs: int
    max_num_seqs: int
    pooling: PoolingSpec | None = None  # vectors are made, and no text
    max_prompt_logprobs_nbytes: int = 56 << 20  # of one reply on the wire: gRPC's limit is 64 MiB


def check_request(request: GenerationRequest, limits: ModelLimits, media: Media, waiting: int) -> None:
    """Raises what a client is told. `waiting`: sequences that are queued."""
    params = request.sampling
    prompt = request.prompt_token_ids
    if waiting >= limits.max_waiting_seqs:
        raise OverloadedError(f"{waiting} sequences wait already; the limit is {limits.max_waiting_seqs}")
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    if (limits.pooling is None) != (request.pooling is None):
        made = "text and no embeddings" if limits.pooling is None else "embeddings and no text"
        raise UnsupportedError(f"this model makes {made}", param="model")
    if request.pooling is not None:
        _check_pooling(request, request.pooling, limits)
    elif len(prompt) >= limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens; the model takes at most {limits.max_model_len - 1} "
            f"and one of output (max_model_len {limits.max_model_len})",
            param="prompt",
        )
    if params.prompt_logprobs is not None:
        _check_prompt_logprobs(prompt, params.prompt_logprobs, limits)
    if params.n > limits.max_num_seqs:
        raise InvalidRequestError(f"n is {params.n}; this worker runs {limits.max_num_seqs} at most", param="n")
    if params.seed is None:
        raise InvalidRequestError("seed must be set before a request reaches an engine", param="seed")
    if request.adapter_id:
        raise UnsupportedError(f"adapter {request.adapter_id!r} is not loaded here", param="adapter_id")
    media.check(request.embeddings, prompt)
    text = outside(prompt, request.embeddings)
    _check_ids(limits, "prompt", (*text, *itertools.chain.from_iterable(request.sent)))
    _check_ids(limits, "logit_bias", (i for i, _ in params.logit_bias))
    if len({c for c in request.ended_choices if c < params.n}) >= params.n:
        raise InvalidRequestError("every choice has ended already", param="ended_choices")
    for choice, sent in enumerate(request.sent):
        if choice in request.ended_choices:
            continue
        if choice >= params.n or len(sent) >= params.max_tokens or len(prompt) + len(sent) >= limits.max_model_len:
            raise InvalidRequestError(f"choice {choice} has nothing left to generate", param="sent")


def _check_pooling(request: GenerationRequest, pooling: Pooling, limits: ModelLimits) -> None:
    params = request.sampling
    assert limits.pooling is not None
    if len(request.prompt_token_ids) > limits.max_model_len:
        raise InvalidRequestError(
            f"the input has {len(request.prompt_token_ids)} tokens; the model takes at most {limits.max_model_len}",
            param="input",
        )
    if pooling.dimensions > limits.pooling.size:
        raise InvalidRequestError(
            f"dimensions is {pooling.dimensions}; the model's vectors have {limits.pooling.size}", param="dimensions"
        )
    if params.n != 1 or params.grammar is not None or params.prompt_logprobs is not None or any(request.sent):
        raise InvalidRequestError("an embedding has one choice, no grammar, no logprobs and no output", param="pooling")


def _check_prompt_logprobs(prompt: tuple[int, ...], top_n: int, limits: ModelLimits) -> None:
    num_tokens = len(prompt)
    _check_ids(limits, "prompt_logprobs", prompt)  # a placeholder past the vocabulary has none
    nbytes, limit = prompt_logprobs_nbytes(num_tokens, top_n), limits.max_prompt_logprobs_nbytes
    if nbytes > limit:
        raise InvalidRequestError(
            f"prompt logprobs of {num_tokens} tokens with {top_n} alternatives would be a reply of up to "
            f"{nbytes} bytes; the limit is {limit}",
            param="prompt_logprobs",
        )


def _check_ids(limits: ModelLimits, field: str, ids: Iterable[int]) -> None:
    vocab = limits.vocab_size
    found = tuple(ids)
    if found and not 0 <= min(found) <= max(found) < vocab:
        wrong = next(i for i in found if not 0 <= i < vocab)
        raise InvalidRequestError(f"token id {wrong} is outside the vocabulary of {vocab}", param=field)
