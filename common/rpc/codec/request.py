"""Requests: SamplingParams, EmbeddingHandle, GenerationRequest, RequestStats.

A deadline is an instant on the local monotonic clock inside a process and remaining milliseconds on the
wire, so both directions take `now_s` of that clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from common.rpc.codec import checks
from common.types import EmbeddingHandle, GenerationRequest, Grammar, GrammarKind, Pooling, RequestStats, SamplingParams
from nanodeploy.v1 import types_pb2 as pb

_SEED_MASK = 2**64 - 1
_GRAMMAR_TO_WIRE = {
    GrammarKind.JSON_OBJECT: pb.GRAMMAR_KIND_JSON_OBJECT,
    GrammarKind.JSON_SCHEMA: pb.GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: pb.GRAMMAR_KIND_REGEX,
    GrammarKind.CHOICE: pb.GRAMMAR_KIND_CHOICE,
    GrammarKind.GRAMMAR: pb.GRAMMAR_KIND_GRAMMAR,
    GrammarKind.STRUCTURAL_TAG: pb.GRAMMAR_KIND_STRUCTURAL_TAG,
}
_GRAMMAR_FROM_WIRE: dict[int, GrammarKind] = {number: kind for kind, number in _GRAMMAR_TO_WIRE.items()}
_STATS_FIELDS = RequestStats.__struct_fields__


def remaining_ms(seconds: float) -> int:
    """Seconds left as wire milliseconds, rounded up from a microsecond on: whole milliseconds stay what they are.

    0 s means no limit and stays 0; time that ran out becomes 1.
    """
    if seconds == 0:
        return 0
    return min(max(1, math.ceil(round(seconds * 1000, 3))), 2**32 - 1)


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """`stop` strings and `n` do not travel here. `seed` must be set (ValueError): whoever sends drew it."""
    if params.seed is None:
        raise ValueError("seed must be drawn before a request is sent")
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        seed=params.seed & _SEED_MASK,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias_ids=[token for token, _ in params.logit_bias],
        logit_bias_values=[bias for _, bias in params.logit_bias],
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        grammar=grammar_to_proto(params.grammar) if params.grammar is not None else None,
    )


def sampling_from_proto(params: pb.SamplingParams, num_choices: int = 1) -> SamplingParams:
    """`SamplingParams` itself checks the ranges (NaN included)."""
    checks.equal_lengths("sampling", logit_bias_ids=params.logit_bias_ids, logit_bias_values=params.logit_bias_values)
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=checks.token_ids(params.stop_token_ids, "stop_token_ids"),
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=tuple(
            zip(checks.token_ids(params.logit_bias_ids, "logit_bias"), params.logit_bias_values, strict=True)
        ),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        n=num_choices,
        grammar=grammar_from_proto(params.grammar) if params.HasField("grammar") else None,
    )


def grammar_to_proto(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(
        kind=_GRAMMAR_TO_WIRE[grammar.kind],
        source=grammar.source,
        param=grammar.param,
        skip_open=grammar.skip_open,
        skip_close=grammar.skip_close,
    )


def grammar_from_proto(grammar: pb.Grammar) -> Grammar:
    """`Grammar` itself checks size and JSON syntax."""
    return Grammar(
        kind=checks.enum_value(_GRAMMAR_FROM_WIRE, grammar.kind, "grammar.kind"),
        source=grammar.source,
        param=checks.short_text(grammar.param, "grammar.param") or "response_format",
        skip_open=checks.short_text(grammar.skip_open, "grammar.skip_open"),
        skip_close=checks.short_text(grammar.skip_close, "grammar.skip_close"),
    )


def embedding_to_proto(handle: EmbeddingHandle) -> pb.EmbeddingHandle:
    return pb.EmbeddingHandle(
        owner=pb.WorkerRef(worker_id=handle.owner_id, epoch=handle.owner_epoch, address=handle.owner_address),
        lease_id=handle.lease_id,
        media_hash=handle.media_hash,
        position=handle.position,
        num_tokens=handle.num_tokens,
        hidden_size=handle.hidden_size,
        dtype=handle.dtype,
        descriptor=handle.descriptor,
        digest=handle.digest,
        remaining_ms=handle.remaining_ms,
        transport=handle.transport,
        grid=pb.GridShape(frames=handle.grid[0], height=handle.grid[1], width=handle.grid[2]),
    )


def embedding_from_proto(handle: pb.EmbeddingHandle, field: str = "embedding") -> EmbeddingHandle:
    checks.identifier(handle.owner.worker_id, f"{field}.owner.worker_id")
    num_tokens = checks.at_least(handle.num_tokens, 1, f"{field}.num_tokens")
    grid = (handle.grid.frames, handle.grid.height, handle.grid.width)
    if math.prod(grid) != num_tokens:
        raise checks.fail(f"{field}.grid", f"is {grid}, there are {num_tokens} rows")
    return EmbeddingHandle(
        owner_id=handle.owner.worker_id,
        owner_epoch=handle.owner.epoch,
        owner_address=checks.address(handle.owner.address, f"{field}.owner.address"),
        lease_id=handle.lease_id,
        media_hash=checks.hash_bytes(handle.media_hash, f"{field}.media_hash"),
        position=handle.position,
        num_tokens=num_tokens,
        grid=grid,
        hidden_size=checks.at_least(handle.hidden_size, 1, f"{field}.hidden_size"),
        dtype=handle.dtype,
        descriptor=handle.descriptor,
        digest=handle.digest,
        remaining_ms=handle.remaining_ms,
        transport=handle.transport,
    )


def embeddings_from_proto(
    handles: Sequence[pb.EmbeddingHandle], num_prompt_tokens: int, field: str = "embeddings"
) -> tuple[EmbeddingHandle, ...]:
    """Handles in prompt order; each lies inside the prompt and none overlaps the one before."""
    decoded = tuple(embedding_from_proto(h, f"{field}[{i}]") for i, h in enumerate(handles))
    end = 0
    for i, handle in enumerate(decoded):
        if handle.position < end:
            raise checks.fail(f"{field}[{i}].position", f"is {handle.position}, inside or before the one before it")
        end = handle.position + handle.num_tokens
        if end > num_prompt_tokens:
            raise checks.fail(f"{field}[{i}]", f"ends at token {end}, the prompt has {num_prompt_tokens}")
    return decoded


def request_to_proto(request: GenerationRequest, now_s: float, *, prompt: bool = True) -> pb.GenerationRequest:
    """A deadline that has passed travels as 1 ms, never as 0 (no limit). `prompt` False: its ids are left out."""
    remaining = remaining_ms(request.deadline_s - now_s) or 1 if request.deadline_s else 0
    return pb.GenerationRequest(
        request_id=request.request_id,
        model=request.model,
        adapter_id=request.adapter_id,
        cache_salt=request.cache_salt,
        prompt_token_ids=request.prompt_token_ids if prompt else (),
        sampling=sampling_to_proto(request.sampling),
        num_choices=request.sampling.n,
        sent=[pb.ChoiceOutput(choice=c, token_ids=ids) for c, ids in enumerate(request.sent) if ids],
        embeddings=[embedding_to_proto(e) for e in request.embeddings],
        priority=request.priority,
        remaining_ms=remaining,
        traceparent=request.traceparent,
        ended_choices=request.ended_choices,
        pooling=pb.Pooling(dimensions=request.pooling.dimensions) if request.pooling is not None else None,
    )


def request_from_proto(request: pb.GenerationRequest, now_s: float) -> GenerationRequest:
    """Bounds that need the model (vocabulary, length) are the worker's to check."""
    if not request.prompt_token_ids:
        raise checks.fail("prompt_token_ids", "must not be empty")
    prompt = checks.token_ids(request.prompt_token_ids, "prompt_token_ids")
    checks.at_least(request.num_choices, 1, "num_choices")
    sampling = sampling_from_proto(request.sampling, request.num_choices)
    return GenerationRequest(
        request_id=checks.identifier(request.request_id, "request_id"),
        model=checks.short_text(request.model, "model"),
        prompt_token_ids=prompt,
        sampling=sampling,
        adapter_id=checks.short_text(request.adapter_id, "adapter_id"),
        cache_salt=checks.short_text(request.cache_salt, "cache_salt"),
        sent=_sent_from_proto(request, sampling.n),
        embeddings=embeddings_from_proto(request.embeddings, len(prompt)),
        priority=request.priority,
        deadline_s=now_s + request.remaining_ms / 1000 if request.remaining_ms else 0.0,
        traceparent=checks.traceparent(request.traceparent),
        ended_choices=_ended_from_proto(request, sampling.n),
        pooling=Pooling(request.pooling.dimensions) if request.HasField("pooling") else None,
    )


def _ended_from_proto(request: pb.GenerationRequest, num_choices: int) -> tuple[int, ...]:
    wrong = next((choice for choice in request.ended_choices if choice >= num_choices), None)
    if wrong is not None:
        raise checks.fail("ended_choices", f"names choice {wrong}, there are {num_choices}")
    return tuple(request.ended_choices)


def _sent_from_proto(request: pb.GenerationRequest, num_choices: int) -> tuple[tuple[int, ...], ...]:
    if not request.sent:
        return ()
    by_choice: dict[int, tuple[int, ...]] = {}
    for output in request.sent:
        if output.choice >= num_choices or output.choice in by_choice:
            raise checks.fail("sent.choice", f"{output.choice} is named twice or not below {num_choices}")
        by_choice[output.choice] = checks.token_ids(output.token_ids, "sent.token_ids")
    return tuple(by_choice.get(c, ()) for c in range(max(by_choice) + 1))


def stats_to_proto(stats: RequestStats) -> pb.RequestStats:
    return pb.RequestStats(**{name: getattr(stats, name) for name in _STATS_FIELDS})


def stats_from_proto(stats: pb.RequestStats) -> RequestStats:
    return msgspec.convert(stats, RequestStats, from_attributes=True)
