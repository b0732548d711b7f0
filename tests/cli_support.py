"""The command with a state folder of its own, and small real processes that serve HTTP as services do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from port_support import free_port
from rich.console import Console

from common.config.schema import ClusterConfig
from services.cli.plan import ClusterPlan
from services.cli.process import ServiceSpec
from services.cli.state import StateFolder

ROOT = Path(__file__).parent.parent
ENGINE = ("--dtype", "float32", "--kv-cache-memory-bytes", str(2**24), "--max-model-len", "512")

# argv: port, seconds until ready, seconds until it dies (0: never), seconds it takes to stop
SERVICE = """
import http.server, json, os, signal, subprocess, sys, threading, time
port, ready_after, die_after, stop_takes = int(sys.argv[1]), *map(float, sys.argv[2:5])
started = time.monotonic()
helper = subprocess.Popen(["sleep", "600"])
def stop(*_):
    time.sleep(stop_takes)
    helper.kill()
    print("drained", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
if die_after:
    def die():
        print("about to fail: no such model", flush=True)
        os._exit(7)
    threading.Timer(die_after, die).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        ready = time.monotonic() - started > ready_after and not os.path.exists("sick")
        self.answer(200 if ready else 503, {"ready": ready, "reason": "" if ready else "loading the model"})
    def do_POST(self):
        words = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"].split()
        usage = {"prompt_tokens": len(words), "completion_tokens": 2}
        stats = {"prefill_worker": "p", "transferred_tokens": 9, "transport": "t", "transfer_gbps": 1.5, "fallback": ""}
        assert self.headers["x-nanodeploy-timings"] == "1"
        self.answer(200, {"choices": [], "usage": usage, "nanodeploy": {"requests": [stats]}})
    def log_message(self, *_):
        pass
print("pid", os.getpid(), "helper", helper.pid, flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Cli:
    """The `nanodeploy` command with a state folder of its own."""

    def __init__(self, root: Path) -> None:
        self.folder = StateFolder(root, "default")
        any_port = {
            f"NANODEPLOY_{section}__{field}": "0"
            for section in ("CONTROLLER", "PREFILL", "DECODE")
            for field in ("PORT", "HTTP_PORT")
        }
        self.env = {**os.environ, **any_port, "NANODEPLOY_STATE_DIR": str(root), "COLUMNS": "200"}

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "services.cli.main", *args]

    def __call__(self, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*args), env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("status", "--json").stdout)
        return found


def service(
    folder: Path, name: str, role: str, *, ready_after: float = 0.0, die_after: float = 0.0, stop_takes: float = 0.0
) -> ServiceSpec:
    port = free_port()
    return ServiceSpec(
        name=name,
        role=role,
        argv=(sys.executable, "-c", SERVICE, str(port), str(ready_after), str(die_after), str(stop_takes)),
        env=dict(os.environ),
        cwd=folder,
        log=folder / "logs" / f"{name}.log",
        address=f"127.0.0.1:{port}",
        ready_url=f"http://127.0.0.1:{port}/ready",
    )


def plan_of(folder: Path, *specs: ServiceSpec) -> ClusterPlan:
    router = next(spec for spec in specs if spec.role == "router")
    return ClusterPlan(
        config=ClusterConfig(),
        services=specs,
        url=f"http://{router.address}",
        controller="127.0.0.1:1",
        model="test",
        files={folder / "config" / "cluster.yaml": "log: {}\n"},
    )


def console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=200, color_system=None, force_terminal=False), out


def logged_pids(spec: ServiceSpec) -> list[int]:
    """Pids of every process that the service and its restarts had, helpers included."""
    lines = [line.split() for line in spec.log.read_text().splitlines() if line.startswith("pid ")]
    return [int(word) for line in lines for word in (line[1], line[3])]
