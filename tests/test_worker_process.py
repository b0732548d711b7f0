"""A worker process started alone: what it says, and with which code it ends, when its engine cannot start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import tiny_models
import yaml

ROOT = Path(__file__).parent.parent
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 24, "num_threads": 1}


def run_worker(tmp: Path, role: str, engine: dict[str, object]) -> subprocess.CompletedProcess[str]:
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # a controller's address where none answers
        section = {"port": 0, "http_port": 0, "controllers": [f"127.0.0.1:{nobody.getsockname()[1]}"]}
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
