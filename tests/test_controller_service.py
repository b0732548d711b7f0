"""Whole controllers over real gRPC and a real storage server: agreement, faults, recovery, cost at rest."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import msgspec
import psutil
import pytest
from controller_support import CALL_S, rig, serving, start_process
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from port_support import free_port
from redis_support import RedisServer, run_redis
from rpc_support import eventually, make_worker

from common.errors import InvalidRequestError, NotFoundError, UnavailableError
from common.rpc.client import open_channel
from common.rpc.codec import ChangeKind, Loads, Ping, Snapshot
from common.rpc.codec.objects import ObjectKey
from common.rpc.membership import Membership, MembershipChange
from common.types import Role, WorkerLoad, WorkerState
from common.types.keys import ApiKey, hashed_key
from services.controller import __main__ as main_module
from services.controller import watch as watch_module
from services.controller.app import Controller
from services.controller.servicer import SERVICE


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with run_redis() as server:
        yield server


async def test_two_controllers_on_one_storage_agree(shared_server):
    async with rig(shared_server) as r:
        one, two = await r.controller(), await r.controller()
        watches = [r.watch(one), r.watch(two)]
        await eventually(lambda: all(w.snapshots for w in watches))
        worker = make_worker()
        ref = worker.ref
        terms = await r.peer(one).register(worker, timeout_s=CALL_S)
        assert (terms.lease_ttl_s, terms.heartbeat_s) == (2.0, 0.1)
        load = WorkerLoad(running=5)
        assert not await r.peer(two).heartbeat(ref.worker_id, ref.epoch, worker.state, load, timeout_s=CALL_S)
        await r.peer(two).drain(ref.worker_id, 0, timeout_s=CALL_S)
        assert await r.peer(one).heartbeat(ref.worker_id, ref.epoch, worker.state, load, timeout_s=CALL_S)
        await r.peer(one).deregister(ref.worker_id, ref.epoch, timeout_s=CALL_S)
        await eventually(lambda: all(len(w.changes) == 3 for w in watches))
        for w in watches:
            assert w.told() == [("added", ""), ("updated", ""), ("removed", "deregistered")]
            assert [c.revision for c in w.changes] == [1, 2, 3]
            assert w.changes[1].worker.state is WorkerState.DRAINING
        await eventually(lambda: all(any(isinstance(e, Loads) for e in w.events) for w in watches))
        await eventually(lambda: all(any(isinstance(e, Ping) for e in w.events) for w in watches))


async def test_expiry_is_published_once_however_many_controllers(shared_server):
    async with rig(shared_server, lease_ttl_s=0.5) as r:
        controllers = [await r.controller() for _ in range(3)]
        watches = [r.watch(c) for c in controllers]
        await eventually(lambda: all(w.snapshots for w in watches))
        peer = r.peer(controllers[0])
        for i in range(5):
            await peer.register(make_worker(f"w{i}"), timeout_s=CALL_S)
        await eventually(lambda: all(len(w.changes) >= 10 for w in watches))
        await asyncio.sleep(0.6)
        for w in watches:
            assert w.told() == [("added", "")] * 5 + [("removed", "expired")] * 5
            assert [c.revision for c in w.changes] == list(range(1, 11))
        late = r.watch(controllers[1])
        await eventually(lambda: bool(late.snapshots))
        assert (late.snapshots[0].revision, late.snapshots[0].workers) == (10, ())


async def test_restarted_worker_replaces_its_old_epoch(shared_server):
    async with rig(shared_server) as r:
        controller = await r.controller()
        watch, peer = r.watch(controller), r.peer(controller)
        await eventually(lambda: bool(watch.snapshots))
        old, new = make_worker(), make_worker()
        await peer.register(old, timeout_s=CALL_S)
        await peer.register(new, timeout_s=CALL_S)
        with pytest.raises(NotFoundError):
            await peer.heartbeat(old.ref.worker_id, old.ref.epoch, old.state, old.load, timeout_s=CALL_S)
        await peer.deregister(old.ref.worker_id, old.ref.epoch, timeout_s=CALL_S)
        await eventually(lambda: watch.told() == [("added", ""), ("removed", "replaced"), ("added", "")])
        late = r.watch(controller)
        await eventually(lambda: bool(late.snapshots))
        assert [w.ref for w in late.snapshots[0].workers] == [new.ref]


async def test_a_lost_change_is_a_resync(shared_server):
    async with rig(shared_server) as r:
        controller = await r.controller()
        watch, peer = r.watch(controller), r.peer(controller)
        await eventually(lambda: bool(watch.snapshots))
        meta = "{" + r.config.namespace + "}:controller:meta"
        shared_server.command("HINCRBY", meta, "revision", "3")  # as if three changes were trimmed away
        await peer.register(make_worker(), timeout_s=CALL_S)
        await eventually(lambda: len(watch.snapshots) >= 2)
        assert watch.snapshots[-1].revision == 4
        assert [w.ref.worker_id for w in watch.snapshots[-1].workers] == ["decode-0"]
        assert watch.error is None
        shared_server.command("HINCRBY", meta, "revision", "1")  # lost without any later change
        await eventually(lambda: watch.snapshots[-1].revision == 5)


async def test_flush_is_noticed_workers_come_back_and_routers_keep_them(shared_server):
    with run_redis() as server:
        async with rig(server) as r:
            await r.controller()
            await r.controller()
            watch = r.watch(r.controllers[0])
            changes: list[MembershipChange] = []
            following = r.membership(changes)
            r.worker(make_worker("a"))
            gone = r.worker(make_worker("b"))
            await eventually(lambda: set(following.workers) == {"a", "b"})
            await eventually(lambda: gone.registered)
            gone._task.cancel()  # this one will not come back
            assert server.command("FLUSHALL") == b"+OK"
            await eventually(lambda: len({s.incarnation for s in watch.snapshots}) == 2)
            await eventually(lambda: "a" in {w.ref.worker_id for w in r.controllers[1].hub.workers})
            assert set(following.workers) == {"a", "b"}
            assert [c for c in changes if c.kind is ChangeKind.REMOVED] == []


async def test_grace_ends_for_workers_that_do_not_come_back(shared_server):
    with run_redis() as server:
        async with rig(server) as r:
            await r.controller()
            changes: list[MembershipChange] = []
            following = r.membership(changes, grace_s=1.0)
            peer = r.peer(r.controllers[0])
            r.worker(make_worker("a"))
            await peer.register(make_worker("b"), timeout_s=CALL_S)
            await eventually(lambda: set(following.workers) == {"a", "b"})
            server.command("FLUSHALL")
            await eventually(lambda: set(following.workers) == {"a"})
            removed = [c for c in changes if c.kind is ChangeKind.REMOVED]
            assert [(c.worker.ref.worker_id, c.reason) for c in removed] == [("b", "not re-registered")]


@pytest.mark.parametrize("durable", [False, True], ids=["empty", "durable"])
async def test_storage_killed_and_restarted(durable):
    with run_redis(durable=durable) as server:
        async with rig(server, lease_ttl_s=1.0) as r:
            controller = await r.controller()
            changes: list[MembershipChange] = []
            following = r.membership(changes)
            r.worker(make_worker("a"))
            await eventually(lambda: following.connected and "a" in following.workers)
            watch, peer = r.watch(controller), r.peer(controller)
            server.kill()
            await eventually(lambda: isinstance(watch.error, UnavailableError))
            started = asyncio.get_running_loop().time()
            with pytest.raises(UnavailableError, match="storage"):
                await peer.register(make_worker("c"), timeout_s=CALL_S)
            assert asyncio.get_running_loop().time() - started < 3
            assert not controller.hub.synced
            assert controller._alive().ok
            assert not controller._ready().ok
            await asyncio.sleep(1.5)  # longer than the lease: no worker could renew
            assert set(following.workers) == {"a"}
            server.start()
            await eventually(lambda: controller.hub.synced and following.connected)
            await eventually(lambda: [w.ref.worker_id for w in controller.hub.workers] == ["a"])
            assert [c for c in changes if c.kind is ChangeKind.REMOVED] == []
            assert set(following.workers) == {"a"}


async def test_a_new_run_on_an_old_storage_has_what_was_stored_and_its_own_members_alone():
    """All processes of a cluster died at once, with members, one of them draining; the storage's files are there."""
    key, document = ApiKey(key_hash=hashed_key("sk-1"), name="kept", created_s=1), ObjectKey("file", "", "file-1")
    with run_redis(durable=True) as server:
        async with rig(server, admin_token="t", lease_ttl_s=2.0) as r:  # longer than the restart takes
            first, old = await r.controller(), make_worker()
            await r.keys(first).put_keys([key])
            await r.objects(first).put(document, b"about", ttl_s=60)
            await r.objects(first).put_parts(document, {0: b"content"})
            for worker in (old, make_worker("prefill-0", role=Role.PREFILL)):
                await r.peer(first).register(worker, timeout_s=CALL_S)
            await r.peer(first).drain("decode-0", 0, timeout_s=CALL_S)
            await r.controllers.pop().stop(0.1)
            server.kill()
            server.start()

            second, new = await r.controller(), make_worker()
            watch, peer = r.watch(second), r.peer(second)
            await eventually(lambda: bool(watch.snapshots))
            r.worker(new)
            await eventually(lambda: {w.ref for w in second.hub.workers} == {new.ref})
            await eventually(lambda: ("removed", "expired") in watch.told())
            assert ("removed", "replaced") in watch.told()
            assert second.hub.workers[0].state is WorkerState.READY, "the one before was asked to drain"
            with pytest.raises(NotFoundError):
                await peer.heartbeat("decode-0", old.ref.epoch, old.state, old.load, timeout_s=CALL_S)
            assert [(k.key_hash, k.name) for k in (await r.keys(second).list_keys()).keys] == [(key.key_hash, "kept")]
            assert (await r.objects(second).get(document)).data == b"about"
            assert await r.objects(second).get_parts(document, [0]) == {0: b"content"}


async def test_slow_watcher_is_cut_off_and_others_are_not(shared_server, monkeypatch):
    monkeypatch.setattr(watch_module, "MAX_PENDING", 20)
    async with rig(shared_server) as r:
        controller = await r.controller()
        watch = r.watch(controller)
        slow = controller.hub.watch()
        assert isinstance(await anext(slow), Snapshot)
        await eventually(lambda: bool(watch.snapshots) and controller.hub.num_watchers == 2)
        peer = r.peer(controller)
        for _ in range(15):
            worker = make_worker()
            await peer.register(worker, timeout_s=CALL_S)
            await peer.deregister("decode-0", 0, timeout_s=CALL_S)
        await eventually(lambda: len(watch.changes) == 30)
        with pytest.raises(UnavailableError, match="slow"):
            await anext(slow)
        assert watch.error is None
        await eventually(lambda: controller.hub.num_watchers == 1)


async def test_controller_killed_and_another_takes_over(shared_server, tmp_path):
    async with rig(shared_server, lease_ttl_s=5.0) as r:  # a controller that starts takes both cores for seconds
        kept = await r.controller()
        port = free_port()
        process = start_process(r, tmp_path, port)
        try:
            await serving(port)
            changes: list[MembershipChange] = []
            following = Membership([f"127.0.0.1:{port}", f"127.0.0.1:{kept.port}"], watcher_id="t", ping_interval_s=1.0)
            following.subscribe(changes.append)
            following.start()
            r._closers.append(following.stop)
            client = r.worker(make_worker("a"), [port, kept.port])
            await eventually(lambda: "a" in following.workers and client.registered)
            process.kill()
            process.wait()
            await eventually(lambda: following.connected and client.registered and kept.hub.num_watchers == 1)
            await asyncio.sleep(5.1)  # a lease that nobody renewed would be over
            assert set(following.workers) == {"a"}
            process = start_process(r, tmp_path, port)
            await serving(port)
            await kept.stop(0.1)
            await eventually(lambda: following.connected and client.registered)
            assert [c.kind for c in changes] == [ChangeKind.ADDED]
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()


async def test_cost_at_rest(shared_server, tmp_path):
    """One controller process with a worker and a watcher: under 100 MB, no torch, and hardly any CPU."""
    async with rig(shared_server, heartbeat_s=1.0, lease_ttl_s=3.0) as r:
        port = free_port()
        process = start_process(r, tmp_path, port)
        try:
            await serving(port)
            client = r.worker(make_worker(), [port])
            following = Membership([f"127.0.0.1:{port}"], watcher_id="t")
            following.start()
            r._closers.append(following.stop)
            await eventually(lambda: client.registered and following.connected)
            seen = psutil.Process(process.pid)
            before, used = asyncio.get_running_loop().time(), seen.cpu_times()
            await asyncio.sleep(3)
            after = seen.cpu_times()
            share = (after.user + after.system - used.user - used.system) / (asyncio.get_running_loop().time() - before)
            rss = seen.memory_info().rss
            assert not [m.path for m in seen.memory_maps() if "libtorch" in m.path]
            print(f"controller at rest: {rss / 2**20:.1f} MiB RSS, {share:.2%} of a core")
            assert rss < 100e6
            assert share < 0.03  # 0.5 % seen; CPU time is counted in steps of 10 ms
        finally:
            process.kill()
            process.wait()


def test_bad_configuration_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("controller: {redis_url: 'http://nowhere'}\n")
    monkeypatch.setattr(main_module, "configure_logging", lambda config, service: None)
    for name in (str(path), str(tmp_path / "absent.yaml")):
        monkeypatch.setattr(sys, "argv", ["controller", "--config", name])
        assert main_module.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("controller: ")


def test_a_port_that_is_taken_is_told_in_one_line(tmp_path):
    path = tmp_path / "c.yaml"
    port = free_port()
    path.write_text(f"controller: {{port: {port}, http_port: {port}}}\n")
    argv = [sys.executable, "-m", "services.controller", "--config", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"controller: cannot listen on 127.0.0.1:{port} for HTTP")


async def test_bad_input_is_refused_by_field_and_nothing_breaks(shared_server):
    async with rig(shared_server) as r:
        controller = await r.controller()
        peer = r.peer(controller)
        bad = msgspec.structs.replace(make_worker(), http_address="nonsense")
        with pytest.raises(InvalidRequestError) as caught:
            await peer.register(bad, timeout_s=CALL_S)
        assert caught.value.param == "worker.http_address"
        with pytest.raises(InvalidRequestError):
            await peer.drain("no such\nname", 0, timeout_s=CALL_S)
        with pytest.raises(NotFoundError):
            await peer.drain("nobody", 0, timeout_s=CALL_S)
        await peer.deregister("nobody", 0, timeout_s=CALL_S)

        channel = open_channel(f"127.0.0.1:{controller.port}", max_message_bytes=2**30)
        for method in ("Register", "Heartbeat", "Drain", "Deregister"):
            raw = channel.unary_unary(f"/{SERVICE}/{method}")
            with pytest.raises(grpc.RpcError) as refused:
                await raw(random.Random(4).randbytes(64) + b"\xff", timeout=CALL_S)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.RpcError) as refused:
                await raw(b"\x00" * (64 * 2**20 + 1), timeout=CALL_S)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError):
            await channel.unary_stream(f"/{SERVICE}/Watch")(b"\xff\xff", timeout=CALL_S).read()
        half_open = [await asyncio.open_connection("127.0.0.1", controller.port) for _ in range(30)]
        await peer.register(make_worker(), timeout_s=CALL_S)
        for _, writer in half_open:
            writer.close()
        await channel.close()
        assert controller._alive().ok


async def test_health_reflection_and_http(shared_server):
    async with rig(shared_server) as r:
        controller = await r.controller()
        channel = open_channel(f"127.0.0.1:{controller.port}")
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=CALL_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=CALL_S)
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert SERVICE in {s.name for s in (await stream.read()).list_services_response.service}
        stream.cancel()
        await channel.close()

        await r.peer(controller).register(make_worker(), timeout_s=CALL_S)
        await eventually(lambda: len(controller.hub.workers) == 1)
        bodies = {}
        for path in ("/metrics", "/health", "/ready"):
            reader, writer = await asyncio.open_connection("127.0.0.1", controller.http_port)
            writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.startswith(b"HTTP/1.1 200 OK")
            bodies[path] = body
        assert b'nanodeploy:controller_workers{role="decode",state="ready"} 1.0' in bodies["/metrics"]
        assert b"nanodeploy:controller_storage_up 1.0" in bodies["/metrics"]
        assert json.loads(bodies["/ready"]) == {"ready": True, "reason": "", "workers": 1}
        assert json.loads(bodies["/health"])["alive"] is True


async def test_starts_without_a_storage_and_waits_for_it():
    with run_redis() as server:
        server.kill()
        async with rig(server) as r:
            controller = Controller(r.config, ping_s=0.2, op_timeout_s=0.5)
            await controller.start()
            r.controllers.append(controller)
            peer = r.peer(controller)
            with pytest.raises(UnavailableError):
                await peer.register(make_worker(), timeout_s=CALL_S)
            server.start()
            await eventually(lambda: controller.hub.synced)
            await peer.register(make_worker(), timeout_s=CALL_S)
