"""What a cluster of one machine keeps from one run to the next, and that no run meets what another has left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
from cli_support import ENGINE, Cli

from services.cli import process as process_module
from services.cli.process import end_leftovers
from services.cli.state import ProcessId


class Cluster(Cli):
    """Started again and again: without a prefill worker, which has no part in it."""

    url = ""

    def up(self, model: Path) -> None:
        done = self("up", "--model", str(model), "--prefill", "0", "--port", "0", "--detach", *ENGINE, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        state = self.folder.running()
        assert state is not None
        self.url = state.url

    def ask(self, path: str, key: str = "", **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=self.url, headers=headers, timeout=30) as http:
            return http.post(path, json=body) if body else http.get(path)


def test_keys_and_stored_responses_outlive_a_run_and_members_do_not(tmp_path: Path) -> None:
    model, cluster = tiny_models.make_llama(tmp_path / "tiny-llama"), Cluster(tmp_path / "state")
    try:
        cluster.up(model)
        assert cluster.ask("/v1/models").status_code == 200, "open until there is a key"
        made = json.loads(cluster("keys", "create", "mine", "--json").stdout)
        deadline = time.monotonic() + 20  # routers hear of new keys after a while
        while cluster.ask("/v1/models").status_code != 401 and time.monotonic() < deadline:
            time.sleep(0.1)
        answer = cluster.ask("/v1/responses", made["key"], model="tiny-llama", input="Hi", max_output_tokens=2)
        assert answer.status_code == 200, answer.text
        assert cluster("down").returncode == 0
        kept = [path.read_bytes() for path in cluster.folder.storage_path.rglob("*") if path.is_file()]
        assert kept
        assert not any(made["key"].encode() in data for data in kept), "a key is stored as a hash"
        assert cluster.folder.storage_path.stat().st_mode & 0o077 == 0

        for _ in range(2):  # after `down`, and after a crash
            cluster.up(model)
            assert cluster.ask("/v1/models").status_code == 401, "closed from the start"
            again = cluster.ask(f"/v1/responses/{answer.json()['id']}", made["key"])
            assert (again.status_code, again.json()["id"]) == (200, answer.json()["id"])
            assert [row["id"] for row in json.loads(cluster("keys", "list", "--json").stdout)] == [made["id"]]
            status = cluster.status()
            (member,) = status["workers"]
            assert (member["worker_id"], member["state"]) == ("decode-0", "ready")
            assert member["pid"] in [service["pid"] for service in status["services"]]
            crash(cluster)
    finally:
        cluster("down")


def crash(cluster: Cluster) -> None:
    """The launcher is killed, and its storage, which was to end with it, hangs."""
    state = cluster.folder.running()
    assert state is not None
    storage = next(s for s in state.services if s.role == "storage").process
    os.kill(storage.pid, signal.SIGSTOP)
    os.kill(state.launcher.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(s.process.alive for s in state.services if s.role != "storage") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert storage.alive


def test_what_a_killed_launcher_left_is_ended() -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as left:
        process = ProcessId.of(left.pid)
        end_leftovers([process, ProcessId(process.pid, process.started + 1)])
        assert left.wait(10) == -signal.SIGKILL
    end_leftovers([process])


def test_one_that_cannot_be_killed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "KILL_LIMIT_S", 0.1)
    monkeypatch.setattr(process_module, "kill_service", lambda process: None)
    with pytest.raises(process_module.UnavailableError, match=f"cannot be killed: {os.getpid()}"):
        end_leftovers([ProcessId.of(os.getpid())])
