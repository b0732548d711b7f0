"""Hypothesis strategies for everything that travels, and small samples of the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from hypothesis import strategies as st

from common.kvcache.layout import GroupSpec, KVLayout, RegionSpec, Retention, Sharding
from common.kvtransfer.orders import (
    OrderAccepted,
    OrderExtent,
    OrderFailed,
    OrderFinished,
    OrderStarted,
    PlaceOrder,
)
from common.kvtransfer.transport import Endpoint, MemoryHandle
from common.types import (
    BlockStates,
    ChoiceDelta,
    EmbeddingHandle,
    Failure,
    FinishReason,
    GenerationRequest,
    Grammar,
    GrammarKind,
    ModelInfo,
    Pooling,
    RequestStats,
    Role,
    SamplingParams,
    TokenLogprobs,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerState,
    new_epoch,
)
from common.types.prefix import pack_tokens

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
token_id = st.integers(0, 2**31 - 1)
token_tuples = st.lists(token_id, max_size=8).map(tuple)
f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
text = st.text(max_size=20)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,20}", fullmatch=True)
addresses = st.builds(
    lambda host, port: f"{host}:{port}", st.sampled_from(["localhost", "10.0.0.1", "[::1]"]), st.integers(1, 65535)
)
hashes = st.binary(min_size=16, max_size=16)
traceparents = st.one_of(st.just(""), st.from_regex(r"00-[1-9a-f]{32}-[1-9a-f]{16}-0[01]", fullmatch=True))


def between(low: float, high: float, *, exclude_min: bool = False) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, exclude_min=exclude_min)


refs = st.builds(WorkerRef, names, st.integers(1, 2**64 - 1), addresses)
models = st.builds(
    ModelInfo,
    name=st.text(min_size=1, max_size=20),
    architecture=text,
    model_hash=st.one_of(hashes, st.just(b"")),
    max_model_len=u32,
    vocab_size=u32,
    dtype=text,
    path=text,
    served_names=st.lists(text, max_size=3).map(tuple),
    embedding_size=u32,
)
block_states = st.builds(BlockStates, group=text, total=u32, free=u32, live=u32, cached=u32, leased=u32, in_flight=u32)
loads = st.builds(
    WorkerLoad,
    running=u32,
    waiting=u32,
    waiting_tokens=u64,
    kv_blocks_total=u32,
    kv_blocks_available=u32,
    steps=u64,
    tokens_per_s=f32,
    kv_states=st.lists(block_states, max_size=3).map(tuple),
    transport_bytes=st.lists(u64, max_size=3).map(tuple),
    prefill_tokens_per_s=f32,
    decode_step_ms=f32,
)
workers = st.builds(
    WorkerInfo,
    ref=refs,
    role=st.sampled_from(Role),
    state=st.sampled_from(WorkerState),
    model=models,
    http_address=st.one_of(st.just(""), addresses),
    host=text,
    pid=u32,
    version=text,
    device=text,
    transports=st.lists(text, max_size=3).map(tuple),
    layout_fingerprint=st.one_of(hashes, st.just(b"")),
    max_num_seqs=u32,
    max_num_batched_tokens=u32,
    kv_block_size=u32,
    min_remote_tokens=u32,
    load=loads,
)


grammars = st.one_of(
    st.just(Grammar(kind=GrammarKind.JSON_OBJECT)),
    st.builds(Grammar, kind=st.just(GrammarKind.JSON_SCHEMA), source=st.just('{"type": "integer"}')),
    st.builds(
        Grammar,
        kind=st.sampled_from([GrammarKind.REGEX, GrammarKind.GRAMMAR]),
        source=st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=20),
        param=st.sampled_from(["guided_regex", "response_format"]),
    ),
    st.builds(Grammar, kind=st.just(GrammarKind.CHOICE), source=st.just('["yes"]'), skip_open=text, skip_close=text),
)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 2**32 - 1))
    return SamplingParams(
        temperature=draw(between(0, 100)),
        top_p=draw(between(0, 1, exclude_min=True)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        min_p=draw(between(0, 1)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(token_tuples),
        ignore_eos=draw(st.booleans()),
        seed=draw(u64),
        presence_penalty=draw(between(-2, 2)),
        frequency_penalty=draw(between(-2, 2)),
        repetition_penalty=draw(between(0, 2, exclude_min=True)),
        logit_bias=draw(st.lists(st.tuples(token_id, between(-100, 100)), max_size=4).map(tuple)),
        logprobs=draw(st.one_of(st.none(), st.integers(0, 20))),
        prompt_logprobs=draw(st.one_of(st.none(), st.integers(0, 20))),
        n=draw(st.integers(1, 128)),
        grammar=draw(st.one_of(st.none(), grammars)),
    )


@st.composite
def grids(draw: st.DrawFn, num_rows: int) -> tuple[int, int, int]:
    frames = draw(st.sampled_from([n for n in range(1, num_rows + 1) if num_rows % n == 0]))
    height = draw(st.sampled_from([n for n in range(1, num_rows // frames + 1) if num_rows // frames % n == 0]))
    return frames, height, num_rows // frames // height


@st.composite
def embedding_lists(draw: st.DrawFn, num_tokens: int) -> tuple[EmbeddingHandle, ...]:
    cuts = sorted(draw(st.sets(st.integers(0, num_tokens), max_size=5)))
    return tuple(
        EmbeddingHandle(
            owner_id=draw(names),
            owner_epoch=draw(u64),
            owner_address=draw(addresses),
            lease_id=draw(u64),
            media_hash=draw(hashes),
            position=start,
            num_tokens=end - start,
            grid=draw(grids(end - start)),
            hidden_size=draw(st.integers(1, 2**32 - 1)),
            dtype=draw(text),
            descriptor=draw(st.binary(max_size=8)),
            digest=draw(u64),
            transport=draw(text),
            remaining_ms=draw(u32),
        )
        for start, end in itertools.pairwise(cuts)
    )


@st.composite
def requests(draw: st.DrawFn, now_s: float) -> GenerationRequest:
    sampling = draw(samplings())
    prompt = draw(st.lists(token_id, min_size=1, max_size=30).map(tuple))
    sent = list(draw(st.lists(token_tuples, max_size=min(sampling.n, 4))))
    while sent and not sent[-1]:
        sent.pop()
    return GenerationRequest(
        request_id=draw(names),
        model=draw(text),
        prompt_token_ids=prompt,
        sampling=sampling,
        adapter_id=draw(text),
        cache_salt=draw(text),
        sent=tuple(sent),
        ended_choices=tuple(sorted(draw(st.sets(st.integers(0, sampling.n - 1), max_size=4)))),
        embeddings=draw(embedding_lists(len(prompt))),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        deadline_s=draw(st.one_of(st.just(0.0), st.integers(1, 2**31).map(lambda ms: now_s + ms / 1000))),
        traceparent=draw(traceparents),
        pooling=draw(st.one_of(st.none(), st.builds(Pooling, u32))),
    )


stats = st.builds(
    RequestStats,
    **{
        name: text
        if name in ("prefill_worker", "fallback", "transport")
        else u64
        if name == "transfer_bytes"
        else f32
        if name.endswith(("_ms", "_gbps"))
        else u32
        for name in RequestStats.__struct_fields__
    },
)
failures = st.builds(
    Failure,
    st.sampled_from(
        [
            "invalid_request",
            "not_found",
            "overloaded",
            "unavailable",
            "deadline_exceeded",
            "cancelled",
            "internal",
            "kv_transfer",
            "layout_mismatch",
        ]
    ),
    text,
    text,
)


@st.composite
def token_logprobs(draw: st.DrawFn, num_tokens: int) -> TokenLogprobs:
    top_n = draw(st.integers(0, 3))
    flat = num_tokens * top_n
    return TokenLogprobs(
        tuple(draw(st.lists(f32, min_size=num_tokens, max_size=num_tokens))),
        top_n,
        tuple(draw(st.lists(token_id, min_size=flat, max_size=flat))),
        tuple(draw(st.lists(f32, min_size=flat, max_size=flat))),
    )


@st.composite
def choice_deltas(draw: st.DrawFn) -> ChoiceDelta:
    tokens = draw(token_tuples)
    finish = draw(st.one_of(st.none(), st.sampled_from(FinishReason)))
    return ChoiceDelta(
        choice=draw(u32),
        position=draw(u32),
        token_ids=tokens,
        finish=finish,
        vector=draw(st.integers(0, 8).map(lambda n: bytes(range(4 * n)))) if finish is FinishReason.STOP else b"",
        stop_token_id=draw(st.one_of(st.none(), token_id)),
        logprobs=draw(st.one_of(st.none(), token_logprobs(len(tokens)))),
    )


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    tp_size = draw(st.sampled_from([1, 2, 4]))
    groups, regions = [], []
    for i in range(draw(st.integers(1, 3))):
        retention = draw(st.sampled_from(Retention))
        snapshot = retention is Retention.SNAPSHOT
        group = GroupSpec(
            name=f"g{i}",
            retention=retention,
            block_size=1 if snapshot else 16 * draw(st.integers(1, 4)),
            num_blocks=draw(st.integers(16, 2**20)),
            window=draw(st.integers(1, 4096)) if retention is Retention.WINDOW else 0,
        )
        groups.append(group)
        for j in range(draw(st.integers(1, 2))):
            sharding = draw(st.sampled_from(Sharding))
            units = 1 if sharding is Sharding.GROUPED else tp_size * draw(st.integers(1, 4))
            regions.append(
                RegionSpec(
                    name=f"g{i}.r{j}",
                    group=group.name,
                    dtype=draw(st.sampled_from(["float32", "bfloat16"])),
                    num_layers=draw(st.integers(1, 80)),
                    num_parts=draw(st.integers(1, 2)),
                    num_units=units,
                    width=draw(st.integers(1, 8)) * 16,
                    sharding=sharding,
                    scale_format=draw(text),
                    required=draw(st.booleans()),
                    scales_hash=draw(st.one_of(st.just(b""), hashes)),
                )
            )
    return KVLayout(
        model_hash=draw(hashes),
        groups=tuple(groups),
        regions=tuple(regions),
        adapter_id=draw(text),
        tp_size=tp_size,
        tp_rank=draw(st.integers(0, tp_size - 1)),
    )


@st.composite
def endpoints_of(draw: st.DrawFn, layout: KVLayout) -> Endpoint:
    return Endpoint(
        transport=draw(names),
        address=draw(st.binary(max_size=40)),
        memory=tuple(
            MemoryHandle(
                g.name,
                draw(st.integers(0, 2**47)),
                g.num_blocks * layout.block_nbytes(g.name),
                draw(st.binary(max_size=9)),
            )
            for g in layout.groups
        ),
        hint=draw(text),
    )


@st.composite
def order_events(draw: st.DrawFn, layout: KVLayout) -> object:
    group = draw(st.sampled_from(layout.groups))
    block_ids = tuple(draw(st.lists(st.integers(0, group.num_blocks - 1), min_size=1, max_size=5, unique=True)))
    num_digests = len(block_ids) * layout.num_digests(group.name)
    extent = OrderExtent(
        draw(u64),
        draw(u64),
        group.name,
        draw(st.integers(0, 1000)) * group.block_size,
        draw(st.integers((len(block_ids) - 1) * group.block_size + 1, len(block_ids) * group.block_size)),
        block_ids,
        draw(hashes),
        tuple(draw(st.lists(u64, min_size=num_digests, max_size=num_digests))),
    )
    return draw(
        st.one_of(
            st.builds(OrderAccepted, u64, u32, u32),
            st.builds(OrderStarted, u64, u64, u32),
            st.just(extent),
            st.builds(OrderFinished, u64, u64, u32, f32, f32),
            st.builds(OrderFailed, u64, failures),
        )
    )


@st.composite
def orders(draw: st.DrawFn, peer: int) -> PlaceOrder:
    tokens = draw(st.lists(token_id, min_size=1, max_size=40))
    return PlaceOrder(
        peer,
        draw(u64),
        draw(names),
        pack_tokens(tokens),
        draw(st.integers(0, len(tokens) - 1)),
        draw(text),
        draw(text),
        draw(embedding_lists(len(tokens))),
        draw(st.integers(-(2**31), 2**31 - 1)),
        draw(st.integers(0, 2**31)) / 1000,
        draw(traceparents),
    )


def make_worker(
    worker_id: str = "decode-0",
    *,
    epoch: int = 0,
    state: WorkerState = WorkerState.READY,
    role: Role = Role.DECODE,
    load: WorkerLoad | None = None,
) -> WorkerInfo:
    """A plausible worker; a fresh epoch unless one is given."""
    return WorkerInfo(
        ref=WorkerRef(worker_id, epoch or new_epoch(), "127.0.0.1:7300"),
        role=role,
        state=state,
        model=ModelInfo(
            name="tiny",
            architecture="llama",
            model_hash=b"m" * 16,
            max_model_len=2048,
            vocab_size=512,
            dtype="float32",
            path="/models/tiny",
        ),
        http_address="127.0.0.1:7301",
        host="localhost",
        pid=1,
        version="0.1.0",
        transports=("ucx/cma", "ucx/tcp"),
        layout_fingerprint=b"f" * 16,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        kv_block_size=16,
        load=load or WorkerLoad(kv_blocks_total=100, kv_blocks_available=100),
    )


async def eventually(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait for `true()`; TimeoutError after `limit_s`."""
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)
