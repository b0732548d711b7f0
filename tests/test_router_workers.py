"""Several routers on one port: real processes, a real controller, a decode worker that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import text_support
from redis_support import fresh_namespace, run_redis
from router_support import MODEL, ScriptedWorker, events, say, tokenizer

from common.config.schema import ControllerConfig, RouterConfig
from common.errors import ConfigError
from common.rpc.registry import RegistryClient
from services.cli.ports import Ports
from services.controller.app import Controller
from services.router.workers import Supervisor, hold, listen

ROOT = Path(__file__).parent.parent
ANSWER = "one two three four five six seven eight nine ten " * 4
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "count"}], "max_tokens": 200}


@asynccontextmanager
async def routers(folder: Path, controller: str, **config: Any) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """The supervisor's process, which holds the port from now on, and the URL of its routers, two by default."""
    lines = {"port": 0, "workers": 2, "controllers": f"['{controller}']", "drain_grace_s": 5, **config}
    file = folder / "router.yaml"
    file.write_text("router: {" + ", ".join(f"{key}: {value}" for key, value in lines.items()) + "}\n")
    command = [sys.executable, "-m", "services.router", "--config", str(file)]
    with (folder / "log").open("wb") as log:
        process = await asyncio.to_thread(subprocess.Popen, command, cwd=ROOT, stderr=log, env={**os.environ})
    try:
        yield process, f"http://127.0.0.1:{await shared_port(process, folder / 'log')}"
    finally:
        process.kill()
        process.wait()


async def shared_port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port that the supervisor has taken, as its log says."""
    for _ in range(600):
        written = await asyncio.to_thread(log.read_text)
        if found := re.search(r'"port":(\d+),.*"routers share a port"', written):
            return int(found[1])
        assert process.poll() is None, written
        await asyncio.sleep(0.05)
    raise AssertionError(written)


def children(process: subprocess.Popen[bytes]) -> set[int]:
    return {child.pid for child in psutil.Process(process.pid).children()}


async def pid_of(http: httpx.AsyncClient) -> int:
    """The process behind this client's connection; 0 while none answers."""
    try:
        return int((await http.get("/dashboard/data")).json()["router"]["pid"])
    except httpx.HTTPError:
        return 0


async def client_of(url: str, wanted: set[int], timeout_s: float = 30.0) -> tuple[httpx.AsyncClient, int]:
    """A connection that one of the wanted processes has taken."""
    end_s = asyncio.get_running_loop().time() + timeout_s
    while asyncio.get_running_loop().time() < end_s:
        http = httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=1))
        if (pid := await pid_of(http)) in wanted:
            return http, pid
        await http.aclose()
        await asyncio.sleep(0.05)
    raise AssertionError("none of the wanted routers answers")


@asynccontextmanager
async def backend(folder: Path) -> AsyncIterator[tuple[str, ScriptedWorker]]:
    """A controller with a decode worker that takes two seconds for an answer; its address."""
    text_support.write_checkpoint(folder)
    worker = ScriptedWorker(say(ANSWER, delay_s=0.02), folder)
    await worker.start()
    with run_redis() as redis:
        config = ControllerConfig(port=0, http_port=0, redis_url=redis.url, namespace=fresh_namespace())
        controller = Controller(config)
        await controller.start()
        address = f"127.0.0.1:{controller.port}"
        registry = RegistryClient([address], worker.info)
        registry.start()
        try:
            yield address, worker
        finally:
            await registry.stop()
            await controller.stop()
            await worker.kill()


async def test_one_router_is_restarted_while_the_other_streams(tmp_path: Path) -> None:
    async with backend(tmp_path / "model") as (controller, worker), routers(tmp_path, controller) as (process, url):
        first, pid = await client_of(url, await started(process, 2))
        other, other_pid = await client_of(url, children(process) - {pid})
        assert await ready(first)
        assert await ready(other)
        streaming = asyncio.create_task(first.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        cut = asyncio.create_task(other.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        while len(worker.entries) < 2:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.01)
        assert len({entry.router_id for entry in worker.entries.values()}) == 2
        os.kill(other_pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            await cut
        answer = await streaming
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in events(answer.text) if c["choices"])
        assert text == tokenizer().decode(tokenizer().encode(ANSWER)[:200])
        assert await pid_of(first) == pid
        fresh, _ = await client_of(url, await started(process, 2) - {pid})
        assert await ready(fresh)
        whole = await fresh.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3})
        assert whole.status_code == 200
        for http in (first, other, fresh):
            await http.aclose()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 15) == 0


async def started(process: subprocess.Popen[bytes], count: int) -> set[int]:
    for _ in range(400):
        if len(found := children(process)) == count:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"{count} routers were not started")


async def ready(http: httpx.AsyncClient) -> bool:
    for _ in range(400):
        if (await http.get("/ready")).status_code == 200:
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.fixture
def own() -> Iterator[int]:
    """A port that is held together with the next one."""
    with Ports() as ports:
        for _ in range(50):
            first = ports.take("127.0.0.1", 0)
            with contextlib.suppress(ConfigError):
                ports.take_exactly("127.0.0.1", first + 1, "worker_port")
                yield first
                return
        raise AssertionError("no two ports in a row are free")


async def test_routers_answer_apart_and_end_with_their_supervisor(tmp_path: Path, own: int) -> None:
    async with routers(tmp_path, "127.0.0.1:9", worker_port=own) as (process, url):
        pids = await started(process, 2)
        http, _ = await client_of(url, pids)
        await http.aclose()
        apart = [await client_of(f"http://127.0.0.1:{own + index}", pids) for index in range(2)]
        assert {pid for _, pid in apart} == pids
        for http, _ in apart:
            await http.aclose()
        os.kill(process.pid, signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, [psutil.Process(p) for p in pids], 15)
        assert not alive


async def test_the_ports_of_each_are_kept_while_none_listens_there(own: int) -> None:
    """A router that is started again finds its own port, whatever happened meanwhile."""
    config = RouterConfig(port=0, workers=2, worker_port=own)
    supervisor = Supervisor(config, [sys.executable, "-c", "import time; time.sleep(60)"])
    running = asyncio.create_task(supervisor.run())
    while len(supervisor.running) < 2:  # noqa: ASYNC110 - until both are there
        await asyncio.sleep(0.01)
    for port in (own, own + 1):
        with socket.socket() as sock, pytest.raises(OSError, match="in use"):
            sock.bind(("127.0.0.1", port))
        listen("127.0.0.1", port, shared=False).close()
    supervisor.stop()
    assert await running == 0


async def test_a_port_of_one_that_is_taken_is_named_before_any_starts(own: int) -> None:
    with listen("127.0.0.1", own + 1, shared=False):
        supervisor = Supervisor(RouterConfig(port=0, workers=2, worker_port=own), [sys.executable])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{own + 1}") as caught:
            await supervisor.run()
    assert caught.value.param == "router.worker_port"
    assert not supervisor.running


def test_a_port_is_shared_only_among_ourselves() -> None:
    with hold("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with listen("127.0.0.1", port, shared=True), listen("127.0.0.1", port, shared=True):
            with pytest.raises(ConfigError, match=str(port)):
                listen("127.0.0.1", port, shared=False)
            with pytest.raises(ConfigError, match=str(port)):
                hold("127.0.0.1", port)
