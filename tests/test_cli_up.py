"""What `up` refuses before it starts anything, and before it prepares a model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from cli_support import console

from common.errors import ConfigError
from services.cli import up as up_module
from services.cli.plan import ClusterRequest
from services.cli.up import UpOptions, run_up


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


def test_flags_and_ports_are_checked_before_a_model_is_prepared(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused(ClusterRequest("", port=port))
        config = tmp_path / "c.yaml"
        config.write_text(f"router: {{port: {port}}}\n")
        assert "choose another router.port" in refused(ClusterRequest(""), config=str(config))
    assert "device is cuda" in refused(ClusterRequest("", port=0, engine={"device": "cuda"}))
    assert "--block-size" in refused(ClusterRequest("", port=0, engine={"block_size": 17}))
