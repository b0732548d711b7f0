"""A worker process started alone: how it ends when its engine cannot start, and when somebody still reads from it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
import yaml
from port_support import free_port
from wire_support import order, responses_of

from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.engine.build import build_engine
from common.kvcache.layout import KVLayout
from common.rpc import codec
from common.rpc.admin import fetch_status
from common.rpc.client import open_channel
from common.types import MonotonicClock, Role, WorkerRef
from nanodeploy.v1 import prefill_pb2, prefill_pb2_grpc
from services.cli.ports import Ports

ROOT = Path(__file__).parent.parent
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 24, "num_threads": 1}


def run_worker(tmp: Path, role: str, engine: dict[str, object]) -> subprocess.CompletedProcess[str]:
    section = {"port": 0, "http_port": 0, "controllers": [f"127.0.0.1:{free_port()}"]}  # where none answers
    config = tmp / "worker.yaml"
    config.write_text(yaml.safe_dump({role: {**section, "engine": {**ENGINE, **engine}}}))
    return subprocess.run(
        [sys.executable, "-m", f"services.{role}_worker", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_worker(tmp_path, "decode", {"model": str(tmp_path / "nowhere")})
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere" in last
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 40


def test_a_broken_checkpoint(tmp_path: Path) -> None:
    model = tiny_models.make_llama(tmp_path / "m")
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run_worker(tmp_path, "prefill", {"model": str(model)})
    assert done.returncode == 2, done.stderr
    assert weights.name in done.stderr.splitlines()[-1]


def layout_of(model: Path) -> KVLayout:
    """What a prefill worker of this model and `ENGINE` has."""
    config = WorkerConfig(
        engine=EngineConfig.model_validate({"model": str(model), **ENGINE}),
        handoff=HandoffConfig(transports=("memory",)),
    )
    built = build_engine(config, Role.PREFILL, MonotonicClock(), lambda *progress: None)
    built.close()
    return built.ready.layout


@contextmanager
def prefill_worker(tmp: Path, model: Path, grace_s: float) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A worker that is ready, and its gRPC address."""
    with Ports() as ports:
        port, http_port, nobody = (ports.take("127.0.0.1", 0) for _ in range(3))
        section = {
            "port": port,
            "http_port": http_port,
            "controllers": [f"127.0.0.1:{nobody}"],
            "drain_grace_s": grace_s,
        }
        config = tmp / "worker.yaml"
        config.write_text(yaml.safe_dump({"prefill": {**section, "engine": {**ENGINE, "model": str(model)}}}))
        command = [sys.executable, "-m", "services.prefill_worker", "--config", str(config)]
        with (tmp / "worker.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None, (tmp / "worker.log").read_text()
                assert time.monotonic() < deadline
                try:
                    if httpx.get(f"http://127.0.0.1:{http_port}/ready", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            yield process, f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("releases", [True, False])
async def test_a_drained_prefill_worker_waits_for_its_reader_but_not_for_ever(tmp_path: Path, releases: bool) -> None:
    model = tiny_models.make_llama(tmp_path / "m")
    layout, grace_s = layout_of(model), 20.0 if releases else 2.0
    with prefill_worker(tmp_path, model, grace_s) as (process, address):
        async with open_channel(address) as channel:
            stub: Any = prefill_pb2_grpc.PrefillServiceStub
            session = stub(channel).Session()
            epoch = (await fetch_status(address, 10)).worker.ref.epoch
            hello = codec.Hello(WorkerRef("decode-0", 3, "127.0.0.1:1"), layout, ("ucx",), epoch)
            await session.write(codec.hello_to_proto(hello))
            await session.write(codec.order_to_proto(order(0)))
            async with asyncio.timeout(20):
                while not (response := responses_of(await session.read())[-1]).HasField("finished"):
                    pass
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            await asyncio.sleep(1.5)
            assert process.poll() is None
            if releases:
                lease = prefill_pb2.LeaseRelease(lease_id=response.finished.lease_id)
                await session.write(prefill_pb2.SessionRequest(release=lease))
            assert await asyncio.to_thread(process.wait, 15) == 0
            assert time.monotonic() - began > (1.5 if releases else 2.0)
    log = (tmp_path / "worker.log").read_text()
    assert ('"cut_off":0' in log) == releases
