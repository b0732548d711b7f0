"""Proof, before an engine says it is ready, that what it is for works.

A short prompt is computed as an order for ourselves, published, read back through the transport into other
blocks and verified; then a token is generated from a prompt. Both leave nothing behind.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping

from common.engine.engine import Engine, EngineParts
from common.engine.messages import Deltas, FromEngine, ReaderEvent, ReaderGone, Submit
from common.engine.sizing import MIN_MODEL_LEN
from common.errors import InternalError
from common.kvcache.layout import Retention
from common.kvtransfer.orders import OrderExtent, OrderFailed, OrderFinished, PlaceOrder
from common.kvtransfer.plan import plan_extent
from common.kvtransfer.transport import PeerDown, ReadStatus, Transport
from common.types import GenerationRequest, SamplingParams

TIMEOUT_S = 60.0
OUTPUT_TOKENS = MIN_MODEL_LEN - 1
_READER = 0  # the servicer numbers its readers from 1
_SLOT = 0  # and requests
_SEQ = -1


def self_test(
    engine: Engine, parts: EngineParts, transport: Transport | None, bases: Mapping[str, int], max_model_len: int
) -> None:
    """`max_model_len` is at least `MIN_MODEL_LEN`; without a `transport` nothing is read back. Raises InternalError
    that says what failed.
    """
    # two sequences hold them at once, in window groups of few blocks too
    twice = (g.num_blocks // 2 * g.block_size for g in parts.layout.groups if g.retention is not Retention.SNAPSHOT)
    num_tokens = max(1, min(parts.layout.groups[0].block_size + 3, 64, max_model_len - OUTPUT_TOKENS, *twice))
    prompt = tuple((i * 7) % min(64, parts.requests.vocab_size) for i in range(num_tokens))
    if transport is not None:
        _read_back(engine, parts, transport, bases, prompt)
    _generate(engine, prompt)
    parts.cache.reset_prefix_cache()
    parts.cache.check_idle()
    parts.cache.checkpoints_made = parts.cache.checkpoints_skipped = 0
    parts.requests.finished.clear()
    parts.requests.tokens_out = 0
    parts.supply.finished = 0
    parts.meter.clear()


def _read_back(
    engine: Engine, parts: EngineParts, transport: Transport, bases: Mapping[str, int], prompt: tuple[int, ...]
) -> None:
    engine.handle(
        PlaceOrder(
            peer=_READER,
            order_id=1,
            request_id="self-test",
            token_ids=prompt,
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
    reserved = cache.reserve(_SEQ, len(prompt)) and cache.reserve_states(_SEQ)
    if not reserved or cache.reserve_tail(_SEQ) is None:
        raise InternalError("self-test: no KV blocks to read back into")
    peer = transport.connect(transport.endpoint())
    extents = [e for e in events if isinstance(e, OrderExtent)]
    try:
        for read_id, extent in enumerate(extents):
            table = cache.block_table(_SEQ, extent.group)
            plan = plan_extent(parts.layout, parts.layout, extent, table, bases[extent.group], len(prompt))
            transport.read(peer, read_id, plan.pieces, plan.checks)
        _await_reads(transport, len(extents))
    finally:
        transport.disconnect(peer)
        cache.close(_SEQ)
    engine.handle(ReaderGone(_READER))
    parts.supply.release_all()


def _await_reads(transport: Transport, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    wakeup = select.poll()
    wakeup.register(transport.wakeup_fd, select.POLLIN)
    done = 0
    while done < count:
        if time.monotonic() > deadline:
            raise InternalError("self-test: published KV could not be read back in time")
        for result in transport.poll():
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
    engine.handle(Submit(_SLOT, request))
    tokens = 0
    for message in _run(engine, Deltas):
        assert isinstance(message, Deltas)
        tokens += sum(len(r.delta.token_ids) for r in message.rows)
        for failure in message.failures:
            raise InternalError(f"self-test: no token: {failure.failure.message}")
    if tokens != OUTPUT_TOKENS:
        raise InternalError(f"self-test: {tokens} tokens were made instead of {OUTPUT_TOKENS}")


def _run(engine: Engine, kind: type[ReaderEvent | Deltas]) -> list[FromEngine]:
    messages: list[FromEngine] = []
    deadline = time.monotonic() + TIMEOUT_S
    engine.step()
    messages += engine.drain()
    while engine.has_work and time.monotonic() < deadline:
        engine.step()
        messages += engine.drain()
    return [m for m in messages if isinstance(m, kind)]
