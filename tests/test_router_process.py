"""The router as a process of its own: what it imports, weighs and does at its start and end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from router_support import StaticMembers

from common.config.schema import RouterConfig
from common.errors import ConfigError
from services.router.server import Router

ROOT = Path(__file__).parent.parent


def test_no_torch_no_transformers() -> None:
    code = (
        "import sys, services.router.__main__, services.router.app;"
        "bad = {'torch', 'transformers', 'redis'} & set(sys.modules); print(bad); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_it_runs_without_a_controller_and_leaves_on_sigterm(tmp_path: Path) -> None:
    """/health says alive, /ready says why not, memory stays under 250 MB."""
    config = tmp_path / "router.yaml"
    config.write_text("router: {port: 0, controllers: ['127.0.0.1:9']}\n")
    command = [sys.executable, "-m", "services.router", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "router listens" in line)
        port = int(line.split('"port":')[1].split(",")[0].strip("} \n"))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            assert http.get("/health").status_code == 200
            ready = http.get("/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "no decode worker is ready")
            refused = http.post("/v1/completions", json={"model": "x", "prompt": "y"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert http.get("/openapi.json").status_code == 200
        assert psutil.Process(process.pid).memory_info().rss < 250e6
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_a_wrong_config_is_said_in_one_line(tmp_path: Path) -> None:
    config = tmp_path / "router.yaml"
    config.write_text("router: {prot: 1}\n")
    command = [sys.executable, "-m", "services.router", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'port'" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_taken_port_is_a_config_error() -> None:
    router = Router(RouterConfig(port=0), StaticMembers())
    port = await router.start()
    with pytest.raises(ConfigError, match=str(port)):
        await Router(RouterConfig(port=port), StaticMembers()).start()
    await asyncio.sleep(0)
    await router.stop()
