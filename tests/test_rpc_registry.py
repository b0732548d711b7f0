"""RegistryClient and Membership against controllers made of plain Python: every failure on demand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_support import eventually, make_worker

from common.errors import DeadlineExceededError, NotFoundError, UnavailableError
from common.rpc.codec import Change, ChangeKind, LoadEntry, Loads, Ping, Snapshot, WatchEvent
from common.rpc.controller import Registered
from common.rpc.membership import Membership, MembershipChange, MembershipTable, RevisionGapError
from common.rpc.registry import RegistryClient
from common.rpc.tasks import end_tasks
from common.types import WorkerInfo, WorkerLoad, WorkerState


class Cluster:
    """Controllers by address over one table; `down` addresses do not answer."""

    def __init__(self) -> None:
        self.members: dict[str, WorkerInfo] = {}
        self.draining: set[str] = set()
        self.down: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.watches: dict[str, list[asyncio.Queue[WatchEvent | Exception]]] = {}
        self.greeting: list[WatchEvent] = []
        self.closed = 0
        self.terms = Registered(0.3, 0.02)

    def connect(self, address: str) -> FakePeer:
        return FakePeer(self, address)

    def count(self, method: str) -> int:
        return sum(name == method for _, name in self.calls)

    def say(self, event: WatchEvent | Exception) -> None:
        for queues in self.watches.values():
            for queue in queues:
                queue.put_nowait(event)


class FakePeer:
    def __init__(self, cluster: Cluster, address: str) -> None:
        self._cluster = cluster
        self._address = address

    def _enter(self, method: str) -> None:
        self._cluster.calls.append((self._address, method))
        if self._address in self._cluster.down:
            raise UnavailableError(f"{self._address} is down")

    async def register(self, worker: WorkerInfo, *, timeout_s: float) -> Registered:
        self._enter("register")
        self._cluster.members[worker.ref.worker_id] = worker
        return self._cluster.terms

    async def heartbeat(
        self, worker_id: str, epoch: int, state: WorkerState, load: WorkerLoad, *, timeout_s: float
    ) -> bool:
        self._enter("heartbeat")
        member = self._cluster.members.get(worker_id)
        if member is None or member.ref.epoch != epoch:
            raise NotFoundError("not registered")
        self._cluster.members[worker_id] = msgspec.structs.replace(member, state=state, load=load)
        return worker_id in self._cluster.draining

    async def drain(self, worker_id: str, epoch: int, *, timeout_s: float) -> None:
        self._enter("drain")

    async def deregister(self, worker_id: str, epoch: int, *, timeout_s: float) -> None:
        self._enter("deregister")
        self._cluster.members.pop(worker_id, None)

    async def watch(self, watcher_id: str, *, silence_s: float) -> AsyncGenerator[WatchEvent, None]:
        self._enter("watch")
        queue: asyncio.Queue[WatchEvent | Exception] = asyncio.Queue()
        self._cluster.watches.setdefault(self._address, []).append(queue)
        try:
            for event in self._cluster.greeting:
                yield event
            while True:
                try:
                    async with asyncio.timeout(silence_s):
                        item = await queue.get()
                except TimeoutError:
                    raise DeadlineExceededError("silent") from None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._cluster.watches[self._address].remove(queue)

    async def close(self) -> None:
        self._cluster.closed += 1


@asynccontextmanager
async def registry(cluster: Cluster, worker: list[WorkerInfo], **kwargs) -> AsyncIterator[RegistryClient]:
    client = RegistryClient(["a:1", "b:1"], lambda: worker[0], connect=cluster.connect, rng=random.Random(1), **kwargs)
    client.start()
    try:
        yield client
    finally:
        await client.stop()


async def test_registers_beats_and_leaves():
    cluster, worker = Cluster(), [make_worker()]
    async with registry(cluster, worker) as client:
        await eventually(lambda: cluster.count("heartbeat") >= 3)
        assert client.registered
        assert cluster.count("register") == 1
        load = WorkerLoad(running=7)
        worker[0] = msgspec.structs.replace(worker[0], load=load, state=WorkerState.UNREADY)
        await eventually(lambda: cluster.members["decode-0"].load == load)
        assert cluster.members["decode-0"].state is WorkerState.UNREADY
        assert cluster.count("register") == 1
    assert cluster.members == {}
    assert cluster.count("deregister") == 1
    assert cluster.closed == 1


async def test_registers_again_after_a_flush_and_after_its_description_changed():
    cluster, worker = Cluster(), [make_worker()]
    async with registry(cluster, worker):
        await eventually(lambda: cluster.count("heartbeat") >= 1)
        cluster.members.clear()
        await eventually(lambda: "decode-0" in cluster.members)
        assert cluster.count("register") == 2
        worker[0] = msgspec.structs.replace(worker[0], device="cuda:0")
        await eventually(lambda: cluster.members["decode-0"].device == "cuda:0")


async def test_goes_on_with_another_controller_without_registering_again():
    cluster, worker = Cluster(), [make_worker()]
    async with registry(cluster, worker) as client:
        await eventually(lambda: cluster.count("heartbeat") >= 2)
        cluster.down = {"a:1"}
        await eventually(lambda: cluster.calls[-1] == ("b:1", "heartbeat"))
        assert client.registered
        assert cluster.count("register") == 1
        cluster.down = {"a:1", "b:1"}
        await eventually(lambda: not client.registered)
        cluster.down = {"b:1"}
        await eventually(lambda: client.registered)
        assert cluster.count("register") == 1


async def test_controllers_that_come_late_and_a_worker_that_fails_to_describe_itself():
    cluster, worker = Cluster(), [make_worker()]
    cluster.down = {"a:1", "b:1"}
    broken = [True]

    def describe() -> WorkerInfo:
        if broken[0]:
            raise RuntimeError("not ready to tell")
        return worker[0]

    client = RegistryClient(["a:1", "b:1"], describe, connect=cluster.connect, rng=random.Random(1))
    client.start()
    await asyncio.sleep(0.05)
    assert not client.registered
    broken[0] = False
    await eventually(lambda: {address for address, _ in cluster.calls} == {"a:1", "b:1"})
    cluster.down = set()
    await eventually(lambda: client.registered)
    await client.stop()


async def test_tries_are_spaced_when_nobody_answers():
    cluster = Cluster()
    cluster.down = {"a:1", "b:1"}
    async with registry(cluster, [make_worker()]):
        await asyncio.sleep(0.5)
        assert 2 <= len(cluster.calls) <= 16
    assert cluster.count("deregister") == 0


async def test_drain_is_told_once_and_poke_speaks_at_once():
    cluster, worker, told = Cluster(), [make_worker()], []
    cluster.draining.add("decode-0")
    async with registry(cluster, worker, on_drain=lambda: told.append(1)) as client:
        await eventually(lambda: cluster.count("heartbeat") >= 4)
        assert told == [1]

    cluster.terms = Registered(300.0, 100.0)
    async with registry(cluster, worker) as client:
        await eventually(lambda: client.registered)
        for _ in range(3):
            beats = cluster.count("heartbeat")
            client.poke()
            await eventually(lambda beats=beats: cluster.count("heartbeat") == beats + 1)


# -- the table ---------------------------------------------------------------------------------------


def told(changes: list[MembershipChange]) -> list[tuple[str, str, str]]:
    return [(c.kind.value, c.worker.ref.worker_id, c.reason) for c in changes]


def test_table_follows_changes():
    table, a, b = MembershipTable(grace_s=5), make_worker("a"), make_worker("b")
    assert told(table.apply(Snapshot("i", 4, (a,)), 0)) == [("added", "a", "")]
    assert told(table.apply(Change(5, ChangeKind.ADDED, b), 0)) == [("added", "b", "")]
    drained = msgspec.structs.replace(a, state=WorkerState.DRAINING)
    assert told(table.apply(Change(6, ChangeKind.UPDATED, drained), 0)) == [("updated", "a", "")]
    load = WorkerLoad(running=9)
    stale = LoadEntry("b", b.ref.epoch ^ 2, WorkerLoad(running=1))
    assert table.apply(Loads((LoadEntry("b", b.ref.epoch, load), stale, LoadEntry("zz", 1, load))), 0) == []
    assert table.workers["b"].load == load
    assert table.apply(Ping(6), 0) == []
    assert told(table.apply(Change(7, ChangeKind.REMOVED, b, "expired"), 0)) == [("removed", "b", "expired")]
    assert set(table.workers) == {"a"}


@pytest.mark.parametrize(
    "event",
    [
        Change(6, ChangeKind.ADDED, make_worker("x")),
        Change(4, ChangeKind.ADDED, make_worker("x")),
        Ping(5),
        Ping(3),
    ],
)
def test_table_notices_gaps(event):
    table = MembershipTable(grace_s=5)
    with pytest.raises(RevisionGapError):
        table.apply(event, 0)
    table.apply(Snapshot("i", 4, ()), 0)
    with pytest.raises(RevisionGapError):
        table.apply(event, 0)
    assert table.workers == {}


def test_table_trusts_a_snapshot_of_the_same_storage():
    table, a, b = MembershipTable(grace_s=5), make_worker("a"), make_worker("b")
    table.apply(Snapshot("i", 4, (a, b)), 0)
    assert told(table.apply(Snapshot("i", 9, (b,)), 0)) == [("removed", "a", "unlisted")]
    successor = make_worker("b")
    assert told(table.apply(Snapshot("i", 12, (successor,)), 0)) == [("removed", "b", "replaced"), ("added", "b", "")]


@pytest.mark.parametrize("empty", [Snapshot("j", 0, ()), Snapshot("i", 2, ())], ids=["flushed", "restored-older"])
def test_table_keeps_workers_of_a_lost_storage_for_a_grace(empty):
    table, a, b, c = MembershipTable(grace_s=5), make_worker("a"), make_worker("b"), make_worker("c")
    table.apply(Snapshot("i", 4, (a, b, c)), 0)
    assert table.apply(empty, 100) == []
    assert set(table.workers) == {"a", "b", "c"}
    revision = empty.revision
    assert table.apply(Change(revision + 1, ChangeKind.ADDED, a), 101) == []  # the same process is back
    successor = make_worker("b")
    changes = table.apply(Change(revision + 2, ChangeKind.ADDED, successor), 102)
    assert told(changes) == [("removed", "b", "replaced"), ("added", "b", "")]
    assert table.apply(Ping(revision + 2), 104.9) == []
    again = Snapshot(empty.incarnation, revision + 2, (a, successor))
    assert table.apply(again, 104.9) == []  # a resync within the grace keeps it, and starts it anew
    assert table.apply(Ping(revision + 2), 109) == []
    assert told(table.apply(Ping(revision + 2), 109.9)) == [("removed", "c", "not re-registered")]
    assert set(table.workers) == {"a", "b"}
    assert table.apply(Ping(revision + 2), 999) == []


def test_the_grace_ends_in_a_busy_cluster_that_has_loads_to_tell_and_no_pings():
    table, a, b = MembershipTable(grace_s=5), make_worker("a"), make_worker("b")
    table.apply(Snapshot("i", 4, (a, b)), 0)
    table.apply(Snapshot("j", 1, (a,)), 100)
    loads = Loads((LoadEntry("a", a.ref.epoch, WorkerLoad(steps=7)),))
    assert table.apply(loads, 104.9) == []
    assert told(table.apply(loads, 105)) == [("removed", "b", "not re-registered")]


STEPS = ["join", "leave", "replace", "beat", "flush"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(STEPS)), max_size=30))
def test_listeners_can_rebuild_the_table(steps):
    """Whatever happens, the changes told add up to the table, and no worker is removed that was not added."""
    table, mirror, truth = MembershipTable(grace_s=1e9), {}, {}
    incarnation, revision = 0, 0

    def feed(event: WatchEvent) -> None:
        for change in table.apply(event, 0):
            worker_id = change.worker.ref.worker_id
            if change.kind is ChangeKind.ADDED:
                assert worker_id not in mirror
            else:
                assert mirror[worker_id].ref == change.worker.ref
            if change.kind is ChangeKind.REMOVED:
                del mirror[worker_id]
            else:
                mirror[worker_id] = change.worker

    feed(Snapshot("0", 0, ()))
    for worker_id, step in steps:
        if step == "flush":
            incarnation, revision, truth = incarnation + 1, 0, {}
            feed(Snapshot(str(incarnation), 0, ()))
        elif step == "beat" and worker_id in truth:
            feed(Loads((LoadEntry(worker_id, truth[worker_id].ref.epoch, WorkerLoad(running=revision)),)))
        elif step == "leave" and worker_id in truth:
            revision += 1
            feed(Change(revision, ChangeKind.REMOVED, truth.pop(worker_id), "deregistered"))
        elif step in ("join", "replace") and (step == "replace" or worker_id not in truth):
            if worker_id in truth:
                revision += 1
                feed(Change(revision, ChangeKind.REMOVED, truth.pop(worker_id), "replaced"))
            revision += 1
            truth[worker_id] = make_worker(worker_id)
            feed(Change(revision, ChangeKind.ADDED, truth[worker_id]))
    plain = {k: msgspec.structs.replace(w, load=WorkerLoad()) for k, w in table.workers.items()}
    assert plain == {k: msgspec.structs.replace(w, load=WorkerLoad()) for k, w in mirror.items()}
    assert all(table.workers[k].ref == w.ref for k, w in truth.items())


# -- following ---------------------------------------------------------------------------------------


@asynccontextmanager
async def membership(cluster: Cluster, changes: list[MembershipChange], **kwargs) -> AsyncIterator[Membership]:
    following = Membership(
        ["a:1", "b:1"],
        watcher_id="r",
        connect=cluster.connect,
        rng=random.Random(1),
        **{"ping_interval_s": 1.0, **kwargs},
    )
    following.subscribe(changes.append)
    following.start()
    try:
        yield following
    finally:
        await following.stop()


async def test_membership_follows_resyncs_on_a_gap_and_reconnects():
    cluster, changes, a, b = Cluster(), [], make_worker("a"), make_worker("b")
    cluster.greeting = [Snapshot("i", 1, (a,))]
    async with membership(cluster, changes) as following:
        assert await following.wait_synced(5)
        assert (following.connected, dict(following.workers)) == (True, {"a": a})
        cluster.greeting = [Snapshot("i", 5, (a, b))]
        cluster.say(Change(5, ChangeKind.ADDED, b))  # 2 to 4 were missed
        await eventually(lambda: "b" in following.workers)
        assert [address for address, _ in cluster.calls] == ["a:1", "a:1"]
        cluster.down = {"a:1"}
        cluster.say(UnavailableError("storage lost"))
        await eventually(lambda: ("b:1", "watch") in cluster.calls and following.connected)
        cluster.down = {"a:1", "b:1"}
        cluster.say(UnavailableError("storage lost"))
        await eventually(lambda: not following.connected)
        await asyncio.sleep(0.1)
        assert set(following.workers) == {"a", "b"}  # it serves on
        assert following.synced
        cluster.down = set()
        await eventually(lambda: following.connected)
    assert told(changes) == [("added", "a", ""), ("added", "b", "")]


async def test_membership_leaves_a_silent_controller():
    cluster, changes = Cluster(), []
    cluster.greeting = [Snapshot("i", 1, (make_worker("a"),))]
    async with membership(cluster, changes, ping_interval_s=0.05):
        await eventually(lambda: [address for address, _ in cluster.calls][:2] == ["a:1", "b:1"])


async def test_membership_survives_listeners_and_never_synced():
    cluster, changes, a = Cluster(), [], make_worker("a")
    cluster.down = {"a:1", "b:1"}
    async with membership(cluster, changes) as following:
        assert not await following.wait_synced(0.05)
        following.subscribe(lambda change: 1 / 0)
        cluster.greeting = [Snapshot("i", 1, (a,))]
        cluster.down = set()
        assert await following.wait_synced(5)
        late: list[MembershipChange] = []
        following.subscribe(late.append)
        assert told(late) == told(changes) == [("added", "a", "")]


async def test_a_task_that_loses_a_cancellation_ends_all_the_same() -> None:
    lost = 0

    async def forgetful() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 1:
                    raise

    async def broken() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("on its own")

    tasks = [asyncio.create_task(forgetful()), asyncio.create_task(broken())]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await end_tasks(tasks)
    assert lost == 2
    assert all(task.done() for task in tasks)
