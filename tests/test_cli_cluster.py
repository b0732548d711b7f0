"""The command line against a real cluster of real processes, on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import surfaces
import tiny_models
import yaml
from cli_support import ENGINE, ROOT, Cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path_factory.mktemp("state"))
    done = cli("up", "--model", str(model), "--port", "0", "--detach", *ENGINE, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"first token: 2 tokens .*KV of \d+ from prefill-0 over ucx/", done.stdout), done.stdout
    yield cli
    cli("down")


def test_status_names_everything(cluster: Cli) -> None:
    status = cluster.status()
    assert (status["phase"], status["model"], status["error"]) == ("ready", "tiny-llama", "")
    assert {s["name"]: s["alive"] for s in status["services"]} == dict.fromkeys(
        ("storage", "controller", "prefill-0", "decode-0", "router"), True
    )
    workers = {w["worker_id"]: w for w in status["workers"]}
    assert {name: (w["role"], w["state"]) for name, w in workers.items()} == {
        "decode-0": ("decode", "ready"),
        "prefill-0": ("prefill", "ready"),
    }
    (peer,) = workers["decode-0"]["peers"]
    assert (peer["worker_id"], peer["state"], peer["digest_mismatches"]) == ("prefill-0", "ready", 0)
    assert peer["transport"].startswith("ucx/")
    for worker in workers.values():
        for kv in worker["kv"]:
            assert kv["total"] == kv["free"] + kv["live"] + kv["cached"] + kv["leased"] + kv["in_flight"] > 0
        assert worker["pid"] in [s["pid"] for s in status["services"]]
    shown = cluster("status")
    assert shown.returncode == 0
    assert "decode-0" in shown.stdout
    assert "ucx/" in shown.stdout


def test_chat_answers(cluster: Cli) -> None:
    first = cluster("chat", "Why is the sky blue?", "--max-tokens", "12", "--temperature", "0")
    again = cluster("chat", "Why is the sky blue?", "--max-tokens", "12", "--temperature", "0")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert first.stdout == again.stdout


def test_bench_measures(cluster: Cli) -> None:
    done = cluster(
        "bench", "--num-prompts", "4", "--concurrency", "2", "--input-len", "48", "--output-len", "5", "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["completed"], result["failed"]) == (4, 0)
    assert (result["prompt_tokens"], result["completion_tokens"]) == (4 * 48, 4 * 5)
    assert 0 < result["ttft_ms"]["p50"] < result["latency_ms"]["max"]


def test_metric_names(cluster: Cli) -> None:
    """After the requests of the tests above: series with labels appear with their first sample."""
    status = cluster.status()
    pages = {worker["role"]: worker["http_address"] for worker in status["workers"]}
    pages["router"] = status["url"].removeprefix("http://")
    config = yaml.safe_load((cluster.folder.config_path / "controller.yaml").read_text())
    pages["controller"] = f"127.0.0.1:{config['controller']['http_port']}"
    found = {}
    for service, address in pages.items():
        text = httpx.get(f"http://{address}/metrics", timeout=10).text
        found[service] = sorted(re.findall(r"^# TYPE nanodeploy:(\S+) ", text, re.MULTILINE))
        assert "process_resident_memory_bytes" in text
    assert found == {service: sorted(names) for service, names in surfaces.METRICS.items()}


def test_doctor_proves_the_path(cluster: Cli, model: Path) -> None:
    done = cluster("doctor", "--json", "--model", str(model))
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    for check in ("python", "native libraries", "kv transfer", "storage", "model", "services", "workers", "path"):
        assert found[check]["level"] in ("ok", "note"), found[check]
    assert "KV moved prefill-0 -> decode-0" in found["path"]["detail"]
    assert "GB/s" in found["kv transfer"]["detail"]
    assert all(finding["fix"] for finding in found.values() if finding["level"] in ("fail", "note"))


def test_second_cluster_of_the_name_is_refused(cluster: Cli, model: Path) -> None:
    done = cluster("up", "--model", str(model), "--port", "0")
    assert done.returncode == 1
    assert "cluster 'default' is up already at http://127.0.0.1:" in done.stderr


def test_taken_port_is_refused(cluster: Cli, model: Path) -> None:
    port = cluster.status()["url"].rsplit(":", 1)[1]
    done = cluster("up", "--name", "other", "--model", str(model), "--port", port)
    assert done.returncode == 2
    assert f"error: port {port} on 127.0.0.1 is in use" in done.stderr


def test_killed_worker_comes_back(cluster: Cli) -> None:
    before = next(s for s in cluster.status()["services"] if s["name"] == "decode-0")
    os.kill(before["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        status = cluster.status()
        service = next(s for s in status["services"] if s["name"] == "decode-0")
        decode = [w for w in status["workers"] if w["role"] == "decode"]
        if service["restarts"] == 1 and decode and decode[0]["state"] == "ready" and decode[0]["pid"] == service["pid"]:
            break
        time.sleep(0.3)
    assert service["restarts"] == 1
    assert service["pid"] != before["pid"]
    assert cluster("chat", "again", "--max-tokens", "3").returncode == 0
    assert "decode-0 was killed by SIGKILL" in (cluster.folder.path / "launcher.log").read_text()


def test_down_leaves_nothing(cluster: Cli) -> None:
    """The last test of the shared cluster: file order is run order."""
    state = cluster.folder.running()
    assert state is not None
    engines = [
        int(pid)
        for service in state.services
        for pid in Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    ]
    assert len(engines) >= 2
    done = cluster("down")
    assert (done.returncode, done.stdout.strip()) == (0, "Cluster default is stopped.")
    assert not any(service.process.alive for service in state.services)
    assert not any(Path(f"/proc/{pid}").exists() for pid in engines)
    assert cluster("status").returncode == 3
    again = cluster("down")
    assert (again.returncode, again.stderr.strip()) == (1, "error: no cluster 'default' is up")


def test_foreground_on_a_terminal_stops_on_ctrl_c(tmp_path: Path, model: Path) -> None:
    cli = Cli(tmp_path)
    parent, child = pty.openpty()
    argv = cli.argv("serve", str(model), "--port", "0", *ENGINE)
    process = subprocess.Popen(
        argv, env=cli.env, cwd=ROOT, stdin=child, stdout=child, stderr=child, start_new_session=True
    )
    os.close(child)
    shown = b""
    written = select.poll()
    written.register(parent, select.POLLIN)

    def read_until(text: bytes, limit_s: float) -> None:
        nonlocal shown
        deadline = time.monotonic() + limit_s
        while text not in shown and time.monotonic() < deadline:
            if written.poll(200):
                try:
                    shown += os.read(parent, 65536)
                except OSError:  # the other end is closed
                    return

    try:
        read_until(b"Ctrl-C drains and stops", 120)
        assert b"prefilled by the decode worker" in shown
        assert b"curl http://127.0.0.1:" in shown
        state = cli.folder.running()
        assert state is not None
        assert [s.role for s in state.services] == ["storage", "controller", "decode", "router"]
        os.kill(process.pid, signal.SIGINT)
        read_until(b"storage: stopped", 60)
        assert process.wait(30) == 0
        assert not any(service.process.alive for service in state.services)
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def test_bad_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no_such_family"}')
    done = Cli(tmp_path / "state")("serve", str(broken), "--port", "0", timeout=120)
    assert done.returncode == 2
    assert "no_such_family" in done.stderr
    assert "Starting" not in done.stdout


@pytest.mark.parametrize("where", [(), ("--detach",)])
def test_an_engine_that_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, model: Path, where: tuple[str, ...]
) -> None:
    cli = Cli(tmp_path)
    done = cli("up", *where, "--model", str(model), "--port", "0", "--max-model-len", "1000000", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: max_model_len is 1000000; the checkpoint allows \d+\n", done.stderr)
