"""A real cluster on this machine, started by `nanodeploy up` as a user would: every service a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from common.errors import UnavailableError
from common.rpc.admin import fetch_snapshot, fetch_status
from common.rpc.client import call, open_channel
from common.types import WorkerInfo
from nanodeploy.v1 import worker_pb2, worker_pb2_grpc
from services.cli.state import ClusterState, StateFolder

START_TIMEOUT_S = 150


class RunningCluster:
    def __init__(self, folder: StateFolder) -> None:
        self._folder = folder

    @property
    def state(self) -> ClusterState:
        state = self._folder.read()
        assert state is not None
        return state

    @property
    def url(self) -> str:
        return self.state.url

    @property
    def model(self) -> str:
        answer = httpx.get(f"{self.url}/v1/models", timeout=10)
        assert answer.status_code == 200, answer.text
        models = answer.json()["data"]
        assert models, "no model is served yet"
        name: str = models[0]["id"]
        return name

    def pid(self, service: str) -> int:
        return next(s.process.pid for s in self.state.services if s.name == service)

    def kill(self, service: str) -> int:
        """SIGKILL; the launcher starts it again."""
        pid = self.pid(service)
        os.kill(pid, signal.SIGKILL)
        return pid

    def engine_pid(self, worker: str) -> int:
        """Of the engine process behind a worker's gRPC process."""
        children = Path(f"/proc/{self.pid(worker)}/task/{self.pid(worker)}/children").read_text().split()
        for child in map(int, children):
            if b"common.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        raise AssertionError(f"{worker} has no engine process")

    def log(self, service: str) -> str:
        return (self._folder.logs_path / f"{service}.log").read_text(errors="replace")

    def workers(self) -> tuple[WorkerInfo, ...]:
        return asyncio.run(fetch_snapshot(self.state.controller, 5.0)).workers

    def transports(self) -> list[str]:
        """In use by the decode workers, as `status` shows them."""
        addresses = [w.ref.address for w in self.workers() if w.role == "decode"]
        return [p.transport for a in addresses for p in asyncio.run(fetch_status(a, 5.0)).peers]

    def ledgers(self) -> list[worker_pb2.GetLedgerResponse]:
        return asyncio.run(fetch_ledgers(self.state.controller))

    def is_idle(self) -> bool:
        """Nothing live, leased or in flight; free + cached is the pool. False while an engine is starting."""
        try:
            return all(g.free + g.cached == g.total for ledger in self.ledgers() for g in ledger.groups)
        except UnavailableError:
            return False

    def is_ready(self) -> bool:
        """A token comes through the whole path."""
        try:
            answer = self.complete("one two three four five six seven eight nine ten eleven twelve", max_tokens=1)
        except (httpx.HTTPError, AssertionError):
            return False
        return bool(answer["choices"])

    def complete(self, prompt: Any, timeout_s: float = 60.0, **params: Any) -> dict[str, Any]:
        """One completion with its timings, greedy unless told otherwise."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, **params}
        response = httpx.post(
            f"{self.url}/v1/completions", json=body, headers={"x-nanodeploy-timings": "1"}, timeout=timeout_s
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


async def fetch_ledgers(controller: str) -> list[worker_pb2.GetLedgerResponse]:
    """Of every worker that is a member. Raises `UnavailableError` when one does not answer."""

    async def ask(address: str) -> worker_pb2.GetLedgerResponse:
        async with open_channel(address) as channel:
            stub: Any = worker_pb2_grpc.WorkerServiceStub
            request = worker_pb2.GetLedgerRequest(with_blocks=True)
            return await call(stub(channel).GetLedger, request, timeout_s=5)

    members = (await fetch_snapshot(controller, 5.0)).workers
    return list(await asyncio.gather(*(ask(worker.ref.address) for worker in members)))


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until `condition` held; fails with `what` when it does not within `timeout_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


@contextmanager
def run_cluster(
    tmp: Path, model: Path, *flags: str, worker: dict[str, Any] | None = None, **engine: Any
) -> Iterator[RunningCluster]:
    """`nanodeploy up --detach` with free ports and its own state folder; `down` at the end."""
    section = {"engine": {"dtype": "float32", **engine}, **(worker or {})}
    config = tmp / "cluster.yaml"
    config.write_text(yaml.safe_dump({"prefill": section, "decode": section, "router": {"separation": "always"}}))
    env = {**os.environ, "NANODEPLOY_STATE_DIR": str(tmp / "state"), "PYTHONPATH": "."}
    command = [sys.executable, "-m", "services.cli.main"]
    up = [*command, "up", "--detach", "--model", str(model), "--port", "0", "--config", str(config), *flags]
    started = subprocess.run(up, env=env, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    cluster = RunningCluster(StateFolder(tmp / "state", "default"))
    try:
        assert started.returncode == 0, started.stdout[-3000:] + started.stderr[-3000:]
        yield cluster
    finally:
        stopped = subprocess.run([*command, "down"], env=env, capture_output=True, text=True, timeout=90, check=False)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
