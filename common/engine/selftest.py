"""Proof, before an engine says it is ready, that what it is for works.

A short prompt is computed as an order for ourselves, published, read back through the transport into other
blocks and verified; then a token is generated from a prompt, or its vector is made. Both leave nothing behind.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence

from common.engine.engine import Engine
from common.engine.messages import Deltas, FromEngine, ReaderEvent, ReaderGone, Submit
from common.engine.parts import EngineParts
from common.engine.sizing import MIN_MODEL_LEN
from common.errors import InternalError
from common.kvcache.layout import Retention
from common.kvtransfer.orders import OrderExtent, OrderFailed, OrderFinished, PlaceOrder
from common.kvtransfer.reads import Reads, Wanted
from common.kvtransfer.transport import Endpoint, PeerDown, ReadStatus
from common.types import ChoiceDelta, GenerationRequest, Pooling, SamplingParams
from common.types.prefix import pack_tokens

TIMEOUT_S = 60.0
OUTPUT_TOKENS = MIN_MODEL_LEN - 1
_READER = 0  # the servicer numbers its readers from 1
_SLOT = 0  # and requests
_SEQ = -1


def self_test(
    engine: Engine,
    parts: EngineParts,
    reads: Reads | None,
    endpoints: Sequence[Endpoint],
    wakeup_fds: Sequence[int],
    max_model_len: int,
) -> None:
    """`max_model_len` is at least `MIN_MODEL_LEN`; nothing is read back without `reads`, or where there is one block.
    `endpoints`: of all ranks.

    Raises InternalError that says what failed.
    """
    # two sequences hold them at once, in window groups of few blocks too
    twice = [g.num_blocks // 2 * g.block_size for g in parts.layout.groups if g.retention is not Retention.SNAPSHOT]
    num_tokens = max(1, min(parts.layout.groups[0].block_size + 3, 64, max_model_len - OUTPUT_TOKENS, *twice))
    prompt = tuple((i * 7) % min(64, parts.requests.vocab_size) for i in range(num_tokens))
    if reads is not None and all(twice):
        _read_back(engine, parts, reads, endpoints, wakeup_fds, prompt)
    if parts.requests.pools:
        _embed(engine, prompt)
    else:
        _generate(engine, prompt)
    parts.cache.reset_prefix_cache()
    parts.cache.check_idle()
    parts.cache.snapshots.checkpoints_made = parts.cache.snapshots.checkpoints_skipped = 0
    parts.requests.finished.clear()
    parts.requests.tokens_out = 0
    parts.supply.finished = 0
    parts.meter.clear()


def _read_back(
    engine: Engine,
    parts: EngineParts,
    reads: Reads,
    endpoints: Sequence[Endpoint],
    wakeup_fds: Sequence[int],
    prompt: tuple[int, ...],
) -> None:
    engine.handle(
        PlaceOrder(
            peer=_READER,
            order_id=1,
            request_id="self-test",
            packed_tokens=pack_tokens(prompt),
            start_position=0,
            adapter_id="",
            cache_salt="self-test",
            embeddings=(),
            priority=0,
            remaining_s=TIMEOUT_S,
        )
    )
    events = [m.event for m in _run(engine, ReaderEvent) if isinstance(m, ReaderEvent)]
    if not any(isinstance(e, OrderFinished) for e in events):
        failed = next((e.failure.message for e in events if isinstance(e, OrderFailed)), "no answer")
        raise InternalError(f"self-test: a one-block prompt was not computed: {failed}")
    cache = parts.cache
    cache.open(_SEQ, "self-test")
    reserved = cache.reserve(_SEQ, len(prompt)) and cache.snapshots.reserve_states(_SEQ)
    if not reserved or cache.snapshots.reserve_tail(_SEQ) is None:
        raise InternalError("self-test: no KV blocks to read back into")
    peer = reads.connect(parts.layout, endpoints)
    extents = [e for e in events if isinstance(e, OrderExtent)]
    try:
        for read_id, extent in enumerate(extents):
            table = cache.block_table(_SEQ, extent.group)
            reads.read(peer, read_id, reads.plan(peer, Wanted(extent, tuple(table), len(prompt))))
        _await_reads(reads, wakeup_fds, len(extents))
    finally:
        reads.disconnect(peer)
        cache.close(_SEQ)
    engine.handle(ReaderGone(_READER))
    parts.supply.release_all()


def _await_reads(reads: Reads, wakeup_fds: Sequence[int], count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    wakeup = select.poll()
    for fd in wakeup_fds:
        wakeup.register(fd, select.POLLIN)
    done = 0
    while done < count:
        if time.monotonic() > deadline:
            raise InternalError("self-test: published KV could not be read back in time")
        for result in reads.poll():
            if isinstance(result, PeerDown):
                raise InternalError(f"self-test: the transport cannot reach its own memory: {result.message}")
            if result.status is not ReadStatus.OK:
                raise InternalError(f"self-test: reading back published KV ended {result.status}: {result.message}")
            done += 1
        if done < count:
            wakeup.poll(50)


def _generate(engine: Engine, prompt: tuple[int, ...]) -> None:
    request = GenerationRequest(
        request_id="self-test",
        model="",
        prompt_token_ids=prompt,
        cache_salt="self-test",
        sampling=SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=0),
    )
    tokens = sum(len(delta.token_ids) for delta in _answer(engine, request, "token"))
    if tokens != OUTPUT_TOKENS:
        raise InternalError(f"self-test: {tokens} tokens were made instead of {OUTPUT_TOKENS}")


def _embed(engine: Engine, prompt: tuple[int, ...]) -> None:
    request = GenerationRequest(
        request_id="self-test",
        model="",
        prompt_token_ids=prompt,
        cache_salt="self-test",
        sampling=SamplingParams(max_tokens=1, seed=0),
        pooling=Pooling(),
    )
    vectors = sum(bool(delta.vector) for delta in _answer(engine, request, "vector"))
    if vectors != 1:
        raise InternalError(f"self-test: {vectors} vectors were made of one prompt")


def _answer(engine: Engine, request: GenerationRequest, wanted: str) -> list[ChoiceDelta]:
    """All that the request brings. Raises `InternalError` if it fails."""
    engine.handle(Submit(_SLOT, request))
    found: list[ChoiceDelta] = []
    for message in _run(engine, Deltas):
        assert isinstance(message, Deltas)
        found += [row.delta for row in message.rows]
        for failure in message.failures:
            raise InternalError(f"self-test: no {wanted}: {failure.failure.message}")
    return found


def _run(engine: Engine, kind: type[ReaderEvent | Deltas]) -> list[FromEngine]:
    messages: list[FromEngine] = []
    deadline = time.monotonic() + TIMEOUT_S
    engine.step()
    messages += engine.drain()
    while engine.has_work and time.monotonic() < deadline:
        engine.step()
        messages += engine.drain()
    return [m for m in messages if isinstance(m, kind)]
