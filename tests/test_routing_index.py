"""From a worker's cache manager to the router's prefix index: real managers, the feed, the follower, the table."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import msgspec
import pytest
from router_support import StaticMembers
from test_routing_policies import MODEL, HandClock, worker

from common.config.schema import RouterConfig
from common.engine.load import LoadMeter
from common.engine.messages import KvChange, KvChanges
from common.engine.outbox import Outbox
from common.engine.scheduler import Scheduler, SchedulerLimits
from common.errors import UnavailableError
from common.kvcache.layout import TAIL_GROUP, GroupSpec, KVLayout, Retention
from common.kvcache.manager import KVCacheManager
from common.rpc.codec import KvBatch, kv_batch_from_proto, kv_batch_to_proto
from common.rpc.status import ErrorInterceptor
from common.types import Role, WorkerInfo, WorkerRef, WorkerState
from common.types.prefix import UNIT, LazyChain, extend_chain, hash_keys, keys_digest, root_hash
from nanodeploy.v1 import worker_pb2_grpc
from services.router.routing.board import Board
from services.router.routing.feed import Feeds, Follower, GapError
from services.router.routing.index import Popular, PrefixTable, Recall
from services.router.routing.peer import GrpcKvPeer
from services.worker.kv_feed import MAX_QUEUED, KvFeed
from services.worker.servicer import WorkerServicer

ROOT = root_hash(MODEL.model_hash)


def layout(block_size: int = 16, num_blocks: int = 64, *, states: bool = False) -> KVLayout:
    groups = [GroupSpec(name="full", retention=Retention.FULL, block_size=block_size, num_blocks=num_blocks)]
    if states:
        groups.append(GroupSpec(name="states", retention=Retention.SNAPSHOT, block_size=1, num_blocks=8))
    groups.append(GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=4))
    return KVLayout(model_hash=MODEL.model_hash, groups=tuple(groups), regions=())


class CachingWorker:
    """A worker without a model: its real manager, load meter and feed, and a follower of it."""

    def __init__(self, board: Board, info: WorkerInfo, kind: KVLayout) -> None:
        self.clock = HandClock()
        self.outbox = Outbox()
        self.cache = KVCacheManager(kind, self.clock, record_events=True)
        scheduler = Scheduler(self.cache, SchedulerLimits(8, 1024), self.clock)
        self.meter = LoadMeter(scheduler, self.cache, "full", self.outbox, self.clock, dict, tuple)
        self.feed = KvFeed()
        self.feed.begin(info.ref.epoch, kind)
        self.info = info
        self.follower = Follower(board, info.ref)
        self.stream: AsyncGenerator[KvBatch, None] | None = None
        self.told = KvBatch(0, 0)  # the newest batch
        self.seqs = iter(range(1, 1 << 30))

    def run(self, token_ids: list[int], *, state_at: int = 0) -> None:
        """Compute a prompt and let it go again."""
        seq_id = next(self.seqs)
        chain = [ROOT]
        extend_chain(chain, token_ids)
        hit = self.cache.match_prefix(chain, len(token_ids) - 1)
        self.cache.open(seq_id, "r")
        if self.cache.reserve(seq_id, len(token_ids), hit) and self.cache.snapshots.reserve_states(seq_id):
            if hit.num_tokens < state_at:
                self.cache.advance(seq_id, chain, state_at)
                self.cache.snapshots.checkpoint(seq_id, chain[state_at // UNIT])
            self.cache.advance(seq_id, chain, len(token_ids))
        self.cache.close(seq_id)

    def tell(self) -> None:
        """What the engine's loop and the worker's process do about it."""
        self.clock.at += 1
        self.meter.report(0, idle=False)
        for message in self.outbox.drain(0):
            if isinstance(message, KvChanges) and (batch := self.feed.take(message)) is not None:
                self.told = batch

    def hit(self, token_ids: list[int]) -> int:
        chain = [ROOT]
        extend_chain(chain, token_ids)
        return self.cache.match_prefix(chain, len(token_ids) - 1).num_tokens


def board_of(*infos: WorkerInfo, blocks: int = 10_000) -> Board:
    members = StaticMembers()
    for info in infos:
        members.put(info)
    return Board(members, RouterConfig(prefix_index_blocks=blocks), clock=HandClock(), rng=random.Random(0))


def sized(name: str, block_size: int) -> WorkerInfo:
    return msgspec.structs.replace(worker(name), kv_block_size=block_size)


def known(board: Board, one: CachingWorker, token_ids: list[int]) -> int:
    seat = board.seat(one.info.ref)
    assert seat is not None
    size = one.info.kv_block_size
    states = seat.bit if seat.has_states else 0
    hits = board.table.reach(LazyChain(ROOT, token_ids), len(token_ids), [(size, seat.bit)], states)
    return max((tokens for tokens, mask in hits if mask & seat.bit), default=0)


async def deliver(one: CachingWorker) -> None:
    """Read the stream, a new one from where the follower is if it broke, as far as it goes, in the wire's form."""
    if one.stream is None:
        one.stream = one.feed.follow(one.info.ref.epoch, one.follower.digest)
        await take(one)
    while one.follower._parts_left or any(follower.queue for follower in one.feed._followers):
        await take(one)


async def take(one: CachingWorker) -> None:
    assert one.stream is not None
    batch = await asyncio.wait_for(anext(one.stream), 1.0)
    one.follower.apply(kv_batch_from_proto(kv_batch_to_proto(one.info.ref, batch)))


async def break_stream(one: CachingWorker) -> None:
    if one.stream is not None:
        await one.stream.aclose()
    one.stream = None
    one.follower.restart()


def prompts(rng: random.Random) -> list[list[int]]:
    """A tree of prompts: those of a family share a beginning."""
    shared = [[rng.randrange(1000) for _ in range(rng.randrange(200))] for _ in range(4)]
    return [[*rng.choice(shared), *(rng.randrange(1000) for _ in range(rng.randrange(1, 200)))] for _ in range(30)]


@pytest.mark.parametrize("block_size", [16, 64])
async def test_the_index_says_what_the_managers_would(block_size: int) -> None:
    """For random prompts, evictions, lost streams and resets, on three workers at once."""
    rng = random.Random(block_size)
    infos = [sized(f"w{i}", block_size) for i in range(3)]
    board = board_of(*infos)
    workers = [CachingWorker(board, info, layout(block_size, 30)) for info in infos]
    asked = prompts(rng)
    hits = lost = 0
    for round_ in range(40):
        for one in workers:
            if rng.random() < 0.1:
                await break_stream(one)
                lost += 1
            for prompt in rng.sample(asked, 3):
                one.run(prompt)
            if round_ % 13 == 12:
                one.cache.reset_prefix_cache()
            one.tell()
            await deliver(one)
            for prompt in asked:
                assert known(board, one, prompt) == one.hit(prompt)
                hits += one.hit(prompt) > 0
    assert hits > 500
    assert 0 < sum(one.follower.resyncs for one in workers) <= lost
    for one in workers:
        before = one.follower.resyncs
        await break_stream(one)
        await deliver(one)
        assert one.follower.resyncs == before, "equal digests need no snapshot"
        await break_stream(one)


async def test_hits_of_models_with_states_end_at_cached_ones() -> None:
    info = sized("w", 16)
    board = board_of(info)
    one = CachingWorker(board, info, layout(16, 40, states=True))
    prompt = list(range(100))
    one.run(prompt, state_at=64)
    one.tell()
    await deliver(one)
    assert known(board, one, prompt) == one.hit(prompt) == 64


async def test_a_gap_degrades_and_a_digest_brings_it_back() -> None:
    info = sized("w", 16)
    board = board_of(info)
    one = CachingWorker(board, info, layout())
    one.run(list(range(64)))
    one.tell()
    stream = one.feed.follow(info.ref.epoch, None)
    one.follower.apply(await anext(stream))
    seat = board.seat(info.ref)
    assert seat is not None
    assert seat.exact
    for start in (1000, 2000):
        one.run(list(range(start, start + 64)))
        one.tell()
    await anext(stream)  # lost on the way
    with pytest.raises(GapError, match="seq 3 after 1"):
        one.follower.apply(await anext(stream))
    one.follower.restart()
    assert not seat.exact
    await stream.aclose()
    await deliver(one)
    assert known(board, one, list(range(2000, 2065))) == 64
    assert one.follower.resyncs == 1
    await break_stream(one)
    assert not seat.exact
    await deliver(one)
    assert one.follower.resyncs == 1
    assert seat.exact


async def test_a_wrong_digest_is_a_gap() -> None:
    info = sized("w", 16)
    board = board_of(info)
    one = CachingWorker(board, info, layout())
    one.run(list(range(64)))
    one.tell()
    batch = await anext(one.feed.follow(info.ref.epoch, None))
    with pytest.raises(GapError, match="digests differ"):
        one.follower.apply(batch._replace(digest=batch.digest ^ 1))
    assert one.follower.digest is None
    with pytest.raises(UnavailableError, match="another epoch"):
        await anext(one.feed.follow(info.ref.epoch + 1, None))


async def test_a_slow_follower_gets_a_snapshot_and_memory_stays_bounded() -> None:
    info = sized("w", 16)
    board = board_of(info)
    one = CachingWorker(board, info, layout(16, 30))
    stream = one.feed.follow(info.ref.epoch, one.feed.digest)
    first = await anext(stream)
    assert (first.seq, first.steps) == (0, ())
    for i in range(MAX_QUEUED + 10):
        one.run(list(range(i * 100, i * 100 + 64)))
        one.tell()
    assert all(len(follower.queue) <= MAX_QUEUED for follower in one.feed._followers)
    batch = await anext(stream)
    assert batch.reset
    one.follower.apply(batch)
    assert one.follower.digest == one.feed.digest
    await stream.aclose()
    assert not one.feed._followers


def test_snapshots_come_in_parts() -> None:
    board = board_of(info := sized("w", 16), blocks=100_000)
    feed = KvFeed()
    feed.begin(info.ref.epoch, layout(16, 20_000))
    hashes = tuple(i.to_bytes(16, "little") for i in range(1, 20_001))
    feed.take(KvChanges((KvChange("stored", "full", b"", hashes, 16),)))
    parts = feed.snapshot()
    assert [part.parts_left for part in parts] == [2, 1, 0]
    follower = Follower(board, info.ref)
    for part in parts[:2]:
        follower.apply(part)
        assert follower.digest is None
    follower.apply(parts[2])
    assert follower.digest == feed.digest == keys_digest(hash_keys(hashes), states=False)


def test_changes_that_change_nothing_are_left_out() -> None:
    """After a log that overflowed the manager tells of removals that nobody was told of."""
    feed = KvFeed()
    feed.begin(1, layout())
    one, two = (bytes([i]) * 16 for i in (1, 2))
    feed.take(KvChanges((KvChange("stored", "full", b"", (one,), 16),)))
    before = (feed.seq, feed.digest)
    feed.take(KvChanges((KvChange("stored", "full", b"", (one,), 16), KvChange("removed", "full", hashes=(two,)))))
    feed.take(KvChanges((KvChange("stored", "tail", b"", (two,), 1),)))
    assert (feed.seq, feed.digest) == before
    feed.take(KvChanges((KvChange("cleared"),)))
    assert (feed.digest, feed.held["full"]) == (0, set())


def test_bits_are_used_again_when_the_table_is_swept() -> None:
    table = PrefixTable(100_000)
    one, two = table.take_bit(), table.take_bit()
    assert (one, two) == (1, 2)
    table.store(one, range(20_000))
    table.store(two, range(10_000, 30_000))
    table.give_up(one)
    assert table.take_bit() == 4  # not the one that is still swept
    for _ in range(20):
        table.sweep()
    assert table.take_bit() == 1
    assert len(table) == 20_000


def test_a_full_table_takes_no_more_and_says_so() -> None:
    info = sized("w", 16)
    board = board_of(info, blocks=50)
    one = CachingWorker(board, info, layout(16, 64))
    one.run(list(range(60 * 16)))
    one.tell()
    one.follower.apply(one.feed.snapshot()[0])
    seat = board.seat(info.ref)
    assert seat is not None
    assert len(board.table) == 50
    assert not seat.exact
    assert one.follower.digest == one.feed.digest  # the stream itself is whole
    one.cache.reset_prefix_cache()
    one.run(list(range(160)))
    one.tell()
    with pytest.raises(GapError, match="room again"):
        one.follower.apply(one.told)


def test_memory_is_flat_under_churn() -> None:
    """A million blocks pass through an index of ten thousand."""
    table, bit = PrefixTable(10_000), 1
    rng = random.Random(0)

    def churn(rounds: int) -> int:
        held: list[int] = []
        for _ in range(rounds):
            keys = [rng.getrandbits(64) for _ in range(100)]
            table.store(bit, keys)
            held += keys
            if len(held) > 8_000:
                table.remove(bit, held[:4_000])
                del held[:4_000]
        table.remove(bit, held)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = churn(2_000)
        last = churn(8_000)
    finally:
        tracemalloc.stop()
    assert len(table) == 0
    assert last - first < 200_000


def test_a_lazy_chain_is_the_chain() -> None:
    rng = random.Random(4)
    for length in (0, 15, 16, 1023, 1024, 1025, 3000):
        ids = [rng.randrange(1 << 20) for _ in range(length)]
        media = ((5, b"i" * 16), (40, b"j" * 16))
        chain = [ROOT]
        extend_chain(chain, ids, media)
        lazy = LazyChain(ROOT, ids, media)
        assert [lazy.at(i) for i in range(len(chain))] == chain
        assert LazyChain(ROOT, ids, media).at(len(chain) - 1) == chain[-1]


def test_recall_forgets_in_time_and_is_bounded() -> None:
    recall = Recall(100, 10.0)
    keys = Recall.keys(ROOT, list(range(400)))
    assert len(keys) == 3
    recall.note(keys, 0b01, 0.0)
    recall.note(keys[:2], 0b10, 1.0)
    assert recall.reach(keys, 400, 0b11, 5.0) == [(384, 0b01), (256, 0b10)]
    assert recall.reach(keys, 384, 0b01, 5.0) == [(383, 0b01)]
    assert recall.reach(keys, 400, 0b11, 40.0) == []
    for i in range(1000):
        recall.note(Recall.keys(ROOT, [i] * 256), 1, 50.0)
    assert len(recall._new) + len(recall._old) <= 200


def test_what_many_begin_with_is_popular_for_a_while() -> None:
    popular = Popular(100, 2.0, many=3)
    shared = list(range(300))
    found = [popular.note(Recall.keys(ROOT, [*shared, *range(1000 * i, 1000 * i + 300)]), 0.1 * i) for i in range(5)]
    assert found == [0, 0, 0, 256, 256]
    assert popular.note(Recall.keys(ROOT, [7] * 300), 1.0) == 0
    assert popular.note(Recall.keys(ROOT, shared), 3.0) == 256  # the generation before counts
    assert popular.note(Recall.keys(ROOT, shared), 5.5) == 0  # it had one
    for i in range(1000):
        popular.note(Recall.keys(ROOT, [i] * 256), 6.0)
    assert len(popular._new) + len(popular._old) <= 200


# -- over gRPC ---------------------------------------------------------------------------------------


@asynccontextmanager
async def served(one: CachingWorker) -> AsyncIterator[WorkerInfo]:
    """The worker's own servicer on a real port."""
    host: Any = None  # WatchKv asks nothing of the engine's host
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    servicer = WorkerServicer(host, lambda: one.info, tuple, lambda grace_s: None, one.feed)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ref = WorkerRef(one.info.ref.worker_id, one.info.ref.epoch, f"127.0.0.1:{port}")
    try:
        yield msgspec.structs.replace(one.info, ref=ref)
    finally:
        await server.stop(0)


async def until(condition: Any, what: str) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


async def test_a_router_follows_a_worker_over_grpc() -> None:
    members = StaticMembers()
    rng = random.Random(0)
    board = Board(members, RouterConfig(), clock=HandClock(), rng=rng)
    one = CachingWorker(board, sized("w", 16), layout())
    one.run(list(range(64)))
    one.tell()
    async with served(one) as info:
        one.info = info
        feeds = Feeds(members, board, GrpcKvPeer, rng)
        feeds.start()
        members.put(info)
        await until(lambda: (seat := board.seat(info.ref)) is not None and seat.exact, "EXACT")
        assert known(board, one, list(range(65))) == 64
        one.run(list(range(500, 564)))
        one.tell()
        await until(lambda: known(board, one, list(range(500, 565))) == 64, "a change arrives")
        one.feed.end()
        await until(lambda: not board.seat(info.ref).exact, "the engine is gone")  # type: ignore[union-attr]
        members.put(worker("w", Role.DECODE, WorkerState.UNREADY))
        members.remove("w")
        await feeds.stop()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("kv-")]


def test_batches_survive_the_wire() -> None:
    ref = WorkerRef("w", 7, "h:1")
    feed = KvFeed()
    feed.begin(7, layout(states=True))
    feed.take(
        KvChanges(
            (
                KvChange("stored", "full", b"p" * 16, (b"a" * 16, b"b" * 16), 16),
                KvChange("stored", "states", b"", (b"b" * 16,), 1),
                KvChange("removed", "full", hashes=(b"a" * 16,)),
            )
        )
    )
    (batch,) = feed.snapshot()[:1]
    back = kv_batch_from_proto(kv_batch_to_proto(ref, batch))
    assert [tuple(step.hashes) for step in back.steps] == [tuple(step.hashes) for step in batch.steps]
    assert (back.seq, back.digest, back.reset) == (batch.seq, batch.digest, batch.reset)
    assert isinstance(back, KvBatch)
