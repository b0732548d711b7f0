"""A whole cluster with everything locked: mTLS between its services, HTTPS and keys at its API, started by `up`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_models
from cluster_support import RunningCluster, run_cluster
from tls_support import Authority

from common.errors import UnavailableError
from common.rpc.admin import fetch_snapshot

KEY, PROMPT = "sk-zebra-of-the-flag", "A zebra prompt that is long enough to be handed over by a prefill worker. " * 3

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by the openssl command")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secured")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder / "ca")


@pytest.fixture(scope="module")
def cluster(folder: Path, authority: Authority) -> Iterator[RunningCluster]:
    tls, (cert, key) = authority.config("service"), authority.issue("api")
    settings = {
        "TLS__CA": tls.ca,
        "TLS__CERT": tls.cert,
        "TLS__KEY": tls.key,
        "ROUTER__SSL_CERTFILE": str(cert),
        "ROUTER__SSL_KEYFILE": str(key),
        "LOG__LEVEL": "debug",
    }
    model = tiny_models.make_llama(folder / "model", seed=1)
    small = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512, "max_num_seqs": 32}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"NANODEPLOY_{name}", value)
        with run_cluster(folder, model, "--api-key", KEY, **small) as running:
            yield running


def ask(cluster: RunningCluster, authority: Authority, key: str = "") -> httpx.Response:
    headers = {"x-nanodeploy-timings": "1"} | ({"Authorization": f"Bearer {key}"} if key else {})
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    with httpx.Client(base_url=cluster.url, verify=trusting, timeout=60, headers=headers) as http:
        return http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True})


def command(folder: Path, *words: str) -> str:
    env = {**os.environ, "NANODEPLOY_STATE_DIR": str(folder / "state"), "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_request_goes_all_the_way_with_a_key_and_nowhere_without(
    cluster: RunningCluster, authority: Authority
) -> None:
    assert cluster.url.startswith("https://")
    assert ask(cluster, authority).status_code == 401
    assert ask(cluster, authority, "sk-zebra-wrong").status_code == 401
    answer = ask(cluster, authority, KEY)
    assert answer.status_code == 200, answer.text
    (stats,) = answer.json()["nanodeploy"]["requests"]
    assert stats["transferred_tokens"] > 0, "the hand-off is ordered over mTLS"
    with pytest.raises(UnavailableError):
        asyncio.run(fetch_snapshot(cluster.state.controller, 3.0))  # plain text


def test_keys_are_made_and_status_is_told_by_the_command(
    cluster: RunningCluster, authority: Authority, folder: Path
) -> None:
    made = json.loads(command(folder, "keys", "create", "zebra-name", "--rpm", "600", "--json"))
    deadline = time.monotonic() + 20  # routers hear of new keys after a while
    while (answer := ask(cluster, authority, made["key"])).status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer.headers["x-ratelimit-limit-requests"] == "600"
    assert [row["id"] for row in json.loads(command(folder, "keys", "list", "--json"))] == [made["id"]]
    workers = json.loads(command(folder, "status", "--json"))["workers"]
    assert {worker["state"] for worker in workers} == {"ready"}


def test_no_log_and_no_other_file_tells_of_it(cluster: RunningCluster, folder: Path) -> None:
    """Of the files only the controller's and the router's have the admin token, and nobody else may read them."""
    state = folder / "state" / "default"
    logs = [*state.rglob("*.log"), *state.rglob("*.log.1")]
    assert len(logs) >= 5
    assert [log.name for log in logs if "zebra" in log.read_text(errors="replace")] == []
    token = next(
        line.split(": ")[1]
        for line in (state / "config" / "controller.yaml").read_text().splitlines()
        if "admin_token" in line
    )
    assert len(token) > 20
    with_token = {
        path.name for path in state.rglob("*") if path.is_file() and token in path.read_text(errors="replace")
    }
    assert with_token == {"controller.yaml", "router.yaml"}
    for path in (state / "config").iterdir():
        assert path.stat().st_mode & 0o077 == 0
        assert KEY not in path.read_text()
