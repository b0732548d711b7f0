"""Membership in a real Valkey and, where installed, a real Redis: every operation, alone and raced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from redis_support import RedisServer, binaries, fresh_namespace, run_redis
from rpc_support import make_worker

from common.errors import ConfigError, NotFoundError, UnavailableError
from common.rpc.codec import Change, ChangeKind, LoadEntry
from common.types import WorkerInfo, WorkerLoad, WorkerState
from services.controller.store import Store, StoredSnapshot, TailEntry

TTL_S = 30.0


@pytest.fixture(scope="module", params=sorted(binaries()))
def server(request) -> Iterator[RedisServer]:
    with run_redis(request.param) as running:
        yield running


@pytest.fixture
async def store(server) -> AsyncIterator[Store]:
    store = Store(server.url, fresh_namespace())
    yield store
    await store.close()


async def changes_since(store: Store, start: StoredSnapshot) -> list[Change]:
    entries, _ = await store.tail(start.cursor, 0.01)
    return [e.event for e in entries if isinstance(e.event, Change)]


def kinds(changes: list[Change]) -> list[tuple[str, str]]:
    return [(c.kind.value, c.reason) for c in changes]


async def test_a_worker_comes_beats_and_leaves(store):
    empty = await store.snapshot()
    assert (empty.snapshot.revision, empty.snapshot.workers) == (0, ())
    worker = make_worker(epoch=2**64 - 1)
    assert await store.register(worker, TTL_S) is False
    snapshot = (await store.snapshot()).snapshot
    assert snapshot.workers == (worker,)
    assert snapshot.incarnation == empty.snapshot.incarnation

    load = WorkerLoad(running=3, tokens_per_s=1.5)
    ref = worker.ref
    assert await store.heartbeat(ref.worker_id, ref.epoch, WorkerState.READY, load, TTL_S) is False
    assert (await store.snapshot()).snapshot.workers == (msgspec.structs.replace(worker, load=load),)
    await store.heartbeat(ref.worker_id, ref.epoch, WorkerState.UNREADY, load, TTL_S)
    assert await store.deregister(ref.worker_id, ref.epoch) is True
    assert await store.deregister(ref.worker_id, ref.epoch) is False

    changes = await changes_since(store, empty)
    assert kinds(changes) == [("added", ""), ("updated", ""), ("removed", "deregistered")]
    assert [c.revision for c in changes] == [1, 2, 3]
    assert changes[1].worker.state is WorkerState.UNREADY
    assert changes[2].worker.ref == ref
    assert (await store.head()) == (empty.snapshot.incarnation, 3)


async def test_only_what_changed_is_published(store):
    worker = make_worker()
    ref = worker.ref
    await store.register(worker, TTL_S)
    start = await store.snapshot()
    await store.register(worker, TTL_S)
    for _ in range(5):
        await store.heartbeat(ref.worker_id, ref.epoch, worker.state, worker.load, TTL_S)
    assert (await store.tail(start.cursor, 0.01))[0] == []
    load = WorkerLoad(running=1)
    await store.heartbeat(ref.worker_id, ref.epoch, worker.state, load, TTL_S)
    entries, cursor = await store.tail(start.cursor, 5)
    assert entries == [TailEntry(start.snapshot.incarnation, LoadEntry(ref.worker_id, ref.epoch, load))]
    assert (await store.tail(cursor, 0.01))[0] == []
    await store.register(msgspec.structs.replace(worker, device="cuda:0"), TTL_S)
    assert kinds(await changes_since(store, start)) == [("updated", "")]


async def test_a_new_epoch_replaces_the_old_one(store):
    old, new = make_worker(), make_worker()
    await store.register(old, TTL_S)
    start = await store.snapshot()
    await store.drain(old.ref.worker_id, 0)
    assert await store.register(new, TTL_S) is True
    changes = await changes_since(store, start)
    assert kinds(changes) == [("updated", ""), ("removed", "replaced"), ("added", "")]
    assert [c.worker.ref.epoch for c in changes] == [old.ref.epoch, old.ref.epoch, new.ref.epoch]
    assert changes[2].worker.state is WorkerState.READY  # being drained does not pass to the new process
    with pytest.raises(NotFoundError):
        await store.heartbeat(old.ref.worker_id, old.ref.epoch, WorkerState.READY, WorkerLoad(), TTL_S)
    assert await store.deregister(old.ref.worker_id, old.ref.epoch) is False
    assert (await store.snapshot()).snapshot.workers == (new,)


async def test_drain_outweighs_what_the_worker_reports(store):
    worker = make_worker()
    ref = worker.ref
    await store.register(worker, TTL_S)
    start = await store.snapshot()
    with pytest.raises(NotFoundError):
        await store.drain("nobody", 0)
    with pytest.raises(NotFoundError):
        await store.drain(ref.worker_id, ref.epoch ^ 2)
    await store.drain(ref.worker_id, ref.epoch)
    await store.drain(ref.worker_id, 0)
    assert await store.heartbeat(ref.worker_id, ref.epoch, WorkerState.READY, worker.load, TTL_S) is True
    changes = await changes_since(store, start)
    assert [(c.kind, c.worker.state) for c in changes] == [(ChangeKind.UPDATED, WorkerState.DRAINING)]


def end_lease(server: RedisServer, store: Store, *worker_ids: str) -> None:
    for worker_id in worker_ids:
        assert server.command("ZADD", store._keys["leases"], "XX", "1", worker_id) == b":0"


async def test_sweep_removes_exactly_once_however_many_sweep(store, server):
    for i in range(20):
        await store.register(make_worker(f"w{i:02}"), TTL_S)
    start = await store.snapshot()
    assert (await store.sweep(TTL_S, forgive=False)).expired == ()
    ended = [f"w{i:02}" for i in range(15)]
    end_lease(server, store, *ended)
    namespace = store._keys["meta"].split("}")[0][1:]
    others = [Store(server.url, namespace) for _ in range(4)]
    results = await asyncio.gather(*(s.sweep(TTL_S, forgive=False) for s in [store, *others] for _ in range(3)))
    assert sorted(worker_id for r in results for worker_id in r.expired) == ended
    changes = await changes_since(store, start)
    assert kinds(changes) == [("removed", "expired")] * len(ended)
    assert sorted(c.worker.ref.worker_id for c in changes) == ended
    assert all(0 < r.next_s <= TTL_S for r in results)
    for other in others:
        await other.close()


async def test_leases_run_on_the_servers_clock(store):
    worker = make_worker()
    ref = worker.ref
    await store.register(worker, 0.8)
    for _ in range(5):
        await asyncio.sleep(0.25)
        await store.heartbeat(ref.worker_id, ref.epoch, worker.state, worker.load, 0.8)
        swept = await store.sweep(TTL_S, forgive=False)
        assert swept.expired == ()
        assert 0 < swept.next_s <= 0.8
    await asyncio.sleep(0.85)
    assert (await store.sweep(TTL_S, forgive=False)).expired == (ref.worker_id,)
    assert (await store.sweep(TTL_S, forgive=False)).next_s is None


async def test_an_outage_forgives_leases_once(store, server):
    await store.register(make_worker(), TTL_S)
    await store.sweep(TTL_S, forgive=False)
    end_lease(server, store, "decode-0")
    swept = await store.sweep(TTL_S, forgive=True)
    assert (swept.expired, 0 < swept.next_s <= TTL_S) == ((), True)
    for swept_at in ("1", str(2**50)):  # nobody swept for long; the server's clock went back
        end_lease(server, store, "decode-0")
        server.command("HSET", store._keys["meta"], "swept_at", swept_at)
        assert (await store.sweep(TTL_S, forgive=False)).expired == ()
    end_lease(server, store, "decode-0")
    assert (await store.sweep(TTL_S, forgive=False)).expired == ("decode-0",)


async def test_flush_gives_a_new_incarnation_and_unknown_workers(store, server):
    worker = make_worker()
    await store.register(worker, TTL_S)
    before = await store.snapshot()
    assert server.command("FLUSHALL") == b"+OK"
    with pytest.raises(NotFoundError):
        await store.heartbeat(worker.ref.worker_id, worker.ref.epoch, worker.state, worker.load, TTL_S)
    after = await store.snapshot()
    assert after.snapshot.incarnation != before.snapshot.incarnation
    assert after.snapshot.workers == ()
    await store.register(worker, TTL_S)
    entries, _ = await store.tail(before.cursor, 5)  # an old cursor sees that the incarnation is another
    assert entries[0].incarnation == after.snapshot.incarnation


async def test_half_lost_data_begins_anew(store, server):
    await store.register(make_worker(), TTL_S)
    before = (await store.snapshot()).snapshot
    server.command("DEL", store._keys["meta"])
    after = (await store.snapshot()).snapshot
    assert after.incarnation != before.incarnation
    assert after.workers == ()
    assert server.command("EXISTS", store._keys["infos"]) == b":0"


async def test_what_another_version_wrote_is_skipped(store, server):
    good = make_worker("good")
    await store.register(good, TTL_S)
    await store.register(make_worker("bad"), TTL_S)
    start = await store.snapshot()
    server.command("HSET", store._keys["infos"], "bad", '{"role":"strange"}')
    assert (await store.snapshot()).snapshot.workers == (good,)
    await store.deregister("bad", 0)
    entries, _ = await store.tail(start.cursor, 0.01)
    assert [e.event for e in entries] == [None]


async def test_namespaces_are_apart(store, server):
    await store.register(make_worker(), TTL_S)
    other = Store(server.url, fresh_namespace())
    assert (await other.snapshot()).snapshot.workers == ()
    await other.close()


async def test_racing_registrations_keep_revisions_one_apart(store):
    start = await store.snapshot()

    async def live(worker: WorkerInfo) -> None:
        ref = worker.ref
        await store.register(worker, TTL_S)
        await store.heartbeat(ref.worker_id, ref.epoch, WorkerState.UNREADY, worker.load, TTL_S)
        await store.deregister(ref.worker_id, ref.epoch)

    await asyncio.gather(*(live(make_worker(f"w{i}")) for i in range(40)))
    changes = await changes_since(store, start)
    assert [c.revision for c in changes] == list(range(1, 121))
    assert (await store.snapshot()).snapshot.workers == ()


async def test_unreachable_storage_fails_quickly():
    store = Store("redis://127.0.0.1:1/0", "x", op_timeout_s=0.5)
    started = asyncio.get_running_loop().time()
    for attempt in (store.head(), store.snapshot(), store.sweep(1.0, forgive=False)):
        with pytest.raises(UnavailableError, match="storage"):
            await attempt
    assert asyncio.get_running_loop().time() - started < 5
    await store.close()


async def test_a_storage_that_cannot_write_is_unavailable_and_still_read(tmp_path):
    server = RedisServer(binaries()["valkey"], tmp_path)
    server.start()
    store = Store(server.url, "x")
    try:
        await store.register(make_worker(), TTL_S)
        (tmp_path / "dump.rdb").mkdir()  # nothing can be saved in its place
        server.command("CONFIG", "SET", "save", "3600 1")
        server.command("BGSAVE")
        async with asyncio.timeout(10):
            while not server.command("SET", "k", "v").startswith(b"-MISCONF"):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)
        with pytest.raises(UnavailableError, match="storage refuses: MISCONF"):
            await store.register(make_worker("decode-1"), TTL_S)
        assert [w.ref.worker_id for w in (await store.snapshot()).snapshot.workers] == ["decode-0"]
    finally:
        await store.close()
        server.kill()


async def test_a_storage_whose_replicas_are_away_is_unavailable(store, server):
    server.command("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        with pytest.raises(UnavailableError, match="storage refuses: NOREPLICAS"):
            await store.register(make_worker(), TTL_S)
    finally:
        server.command("CONFIG", "SET", "min-replicas-to-write", "0")


async def test_silent_storage_fails_within_the_limit():
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    store = Store(f"redis://127.0.0.1:{port}/0", "x", op_timeout_s=0.3)
    started = asyncio.get_running_loop().time()
    with pytest.raises(UnavailableError):
        await store.head()
    assert asyncio.get_running_loop().time() - started < 3
    await store.close()
    listener.close()


def test_bad_url_is_a_config_error():
    with pytest.raises(ConfigError, match="redis_url"):
        Store("http://nowhere", "x")
