"""What `up` refuses before it starts anything, and before it prepares a model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from cli_support import console
from mtp_support import MTP, make_qwen_mtp

from common.errors import ConfigError
from services.cli import up as up_module
from services.cli.doctor import parts
from services.cli.doctor.finding import Level
from services.cli.plan import ClusterRequest
from services.cli.state import ClusterState, ProcessId, StateFolder
from services.cli.up import UpOptions, run_up, stop


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_llama(tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        pytest.fail("too late to refuse")

    monkeypatch.setenv("NANODEPLOY_STATE_DIR", str(tmp_path))
    for step in ("_run", "_detach", "ensure_demo_model"):
        monkeypatch.setattr(up_module, step, never)


def refused(request: ClusterRequest, *, detach: bool = False, config: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        run_up(request, UpOptions(config=config), detach, console()[0])
    return caught.value.message


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(
    ("engine", "cause"),
    [
        ({"device": "cuda"}, "device is cuda; this machine has no NVIDIA driver"),
        ({"tensor_parallel_size": 3}, "3 ranks do not group over 2 units"),
        ({"max_model_len": 100000}, "max_model_len is 100000; the checkpoint allows"),
        ({"max_model_len": 2}, "max_model_len is 2; the least is 3"),
        ({"kv_cache_memory_bytes": 1000}, "a KV cache of 1000 bytes cannot hold one sequence"),
        ({"dtype": "int4"}, "--dtype"),
    ],
)
def test_what_no_engine_can_do_is_refused(model: str, engine: dict[str, Any], cause: str, detach: bool) -> None:
    assert cause in refused(ClusterRequest(model, port=0, engine=engine), detach=detach)


def test_a_draft_layer_that_the_config_does_not_name_is_seen_in_the_weight_files(tmp_path: Path) -> None:
    """As of Qwen3-Next, whose config says nothing of its layer: what is refused is the length alone."""
    folder = str(make_qwen_mtp(tmp_path / "model", seed=4, make=tiny_models.make_qwen3_next))
    engine = {"speculative_config": MTP, "max_model_len": 100000}
    assert "max_model_len is 100000" in refused(ClusterRequest(folder, port=0, engine=engine))


def test_flags_and_ports_are_checked_before_a_model_is_prepared(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused(ClusterRequest("", port=port))
        config = tmp_path / "c.yaml"
        config.write_text(f"router: {{port: {port}}}\n")
        assert "choose another router.port" in refused(ClusterRequest(""), config=str(config))
    assert "device is cuda" in refused(ClusterRequest("", port=0, engine={"device": "cuda"}))
    assert "--block-size" in refused(ClusterRequest("", port=0, engine={"block_size": 17}))


def test_down_waits_as_long_as_an_orderly_stop_may_take_and_no_longer(tmp_path: Path) -> None:
    """A long `drain_grace_s` is the user's word: answers under way are not cut after some other time."""
    folder = StateFolder(tmp_path, "t")
    folder.prepare()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        folder.write(
            ClusterState(
                name="t",
                phase="ready",
                launcher=ProcessId.of(launcher.pid),
                url="u",
                controller="c:1",
                model="m",
                version="0",
                stop_limit_s=1.0,
            )
        )
        began = time.monotonic()
        shown, out = console()
        assert stop("t", shown) == 0
        assert 1.0 <= time.monotonic() - began < 10.0
        assert "does not stop and is killed" in out.getvalue()
        assert launcher.wait(5) == -9


def test_doctor_sees_what_the_router_cannot_read(tmp_path: Path) -> None:
    folder = tiny_models.make_llama(tmp_path / "tiny-llama")
    assert parts.model(str(folder)).level is Level.OK
    (folder / "tokenizer.json").write_text("{}")
    found = parts.model(str(folder))
    assert found.level is Level.FAIL
    assert "tokenizer.json is not a tokenizer" in found.detail
