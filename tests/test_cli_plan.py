from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.config.load import load, load_named
from common.config.schema import ClusterConfig, RouterConfig
from common.errors import ConfigError
from common.types.keys import hashed_key
from services.cli import plan as plan_module
from services.cli.plan import MAX_KV_BYTES, MIN_KV_BYTES, ClusterRequest, build_plan
from services.cli.ports import Ports


@pytest.fixture
def listener() -> Iterator[int]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    port: int = sock.getsockname()[1]
    yield port
    sock.close()


def build(tmp_path: Path, base: ClusterConfig | None = None, **fields: object) -> plan_module.ClusterPlan:
    request = ClusterRequest(model="/models/m", port=0, **fields)  # type: ignore[arg-type]
    environ = {"PATH": "/bin", "NANODEPLOY_DECODE__PORT": "9", "NANODEPLOY_STATE_DIR": "/s"}
    with Ports() as ports:
        return build_plan(base or ClusterConfig(), request, tmp_path, ports, environ)


def config_of(plan: plan_module.ClusterPlan, name: str) -> ClusterConfig:
    path, text = next((p, t) for p, t in plan.files.items() if p.stem == name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return load(str(path), {})


def test_services_and_their_files_agree(tmp_path: Path) -> None:
    plan = build(tmp_path, num_prefill=2, num_decode=2)
    names = [spec.name for spec in plan.services]
    assert names == ["storage", "controller", "prefill-0", "prefill-1", "decode-0", "decode-1", "router"]
    addresses = [spec.address for spec in plan.services]
    assert len(set(addresses)) == len(addresses)
    controller = config_of(plan, "controller").controller
    assert plan.controller == f"127.0.0.1:{controller.port}"
    assert controller.redis_url == f"redis://{plan.services[0].address}/0"
    storage = " ".join(plan.services[0].argv)
    assert " --hz 1 " in storage
    assert f" --appendonly yes --daemonize no --hz 1 --dir {tmp_path}/storage" in storage
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        spec = next(s for s in plan.services if s.name == name)
        worker = getattr(config_of(plan, name), spec.role)
        assert worker.worker_id == name
        assert worker.controllers == (plan.controller,)
        assert spec.address == f"127.0.0.1:{worker.port}"
        assert spec.ready_url == f"http://127.0.0.1:{worker.http_port}/ready"
        assert spec.argv[1:3] == ("-m", f"services.{spec.role}_worker")
        assert worker.engine.model == "/models/m"
    router = config_of(plan, "router").router
    assert plan.url == f"http://127.0.0.1:{router.port}"
    assert router.controllers == (plan.controller,)
    assert plan.model == "m"


def test_cores_and_memory_are_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "num_cores", lambda: 8)
    monkeypatch.setattr(plan_module, "has_driver", lambda: False)
    plan = build(tmp_path, num_prefill=1, num_decode=2)
    decode = next(s for s in plan.services if s.name == "decode-1")
    engine = config_of(plan, "decode-1").decode.engine
    assert engine.num_threads == 2
    assert decode.env["OMP_NUM_THREADS"] == "2"
    assert next(s for s in plan.services if s.name == "router").env["OMP_NUM_THREADS"] == "1"
    assert MIN_KV_BYTES <= engine.kv_cache_memory_bytes <= MAX_KV_BYTES
    crowded = build(tmp_path, num_prefill=20, num_decode=20)
    assert config_of(crowded, "decode-7").decode.engine.num_threads == 1


def test_what_the_user_gives_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "has_driver", lambda: True)
    plan = build(
        tmp_path, engine={"num_threads": 3, "dtype": "float32", "served_model_name": "x"}, redis_url="redis://r:1/0"
    )
    engine = config_of(plan, "decode-0").decode.engine
    assert (engine.num_threads, engine.dtype, plan.model) == (3, "float32", "x")
    assert engine.kv_cache_memory_bytes == 0  # a GPU's pool is sized from its own memory
    assert plan.services[0].name == "controller"
    assert config_of(plan, "controller").controller.redis_url == "redis://r:1/0"


def test_overrides_are_in_the_files_and_not_passed_on(tmp_path: Path) -> None:
    for spec in build(tmp_path).services:
        assert "NANODEPLOY_DECODE__PORT" not in spec.env
        assert spec.env["NANODEPLOY_STATE_DIR"] == "/s"


def test_files_are_plain_yaml(tmp_path: Path) -> None:
    for text in build(tmp_path).files.values():
        assert set(yaml.safe_load(text)) == set(ClusterConfig.model_fields)


def test_no_prefill_worker_is_the_plain_cluster(tmp_path: Path) -> None:
    plan = build(tmp_path, num_prefill=0)
    assert [s.role for s in plan.services] == ["storage", "controller", "decode", "router"]
    with pytest.raises(ConfigError, match="at least one decode worker"):
        build(tmp_path, num_decode=0)


def test_taken_port_is_an_error_that_names_it(tmp_path: Path, listener: int) -> None:
    request = ClusterRequest(model="/m", port=listener)
    with (
        Ports() as ports,
        pytest.raises(ConfigError, match=rf"port {listener} on 127\.0\.0\.1 is in use by .* \(pid \d+\)") as caught,
    ):
        build_plan(ClusterConfig(), request, tmp_path, ports, {})
    assert "--port" in caught.value.message


def api_port(tmp_path: Path, base: ClusterConfig, named: frozenset[str], port: int | None = None) -> tuple[int, str]:
    with Ports() as ports:
        plan = build_plan(base, ClusterRequest(model="/m", port=port), tmp_path, ports, {}, named)
    return int(plan.url.rsplit(":", 1)[1]), " ".join(plan.notes)


def test_an_api_port_that_nobody_named_moves_aside_and_says_so(tmp_path: Path, listener: int) -> None:
    base = ClusterConfig(router=RouterConfig(port=listener))
    found, said = api_port(tmp_path, base, frozenset())
    assert listener < found < listener + 100
    assert f"port {listener} on 127.0.0.1 is in use by" in said
    assert said.endswith(f"the API is on {found}")
    with pytest.raises(ConfigError, match=f"port {listener} .*: choose another router.port"):
        api_port(tmp_path, base, frozenset({"router.port"}))


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    with Ports() as ports:
        by_file, by_env, by_flag = (ports.take("127.0.0.1", 0) for _ in range(3))
    file = tmp_path / "c.yaml"
    file.write_text(f"router: {{port: {by_file}, host: localhost}}\n")
    base, named = load_named(str(file), {})
    assert named == {"router.port", "router.host"}
    assert api_port(tmp_path, base, named) == (by_file, "")
    base, named = load_named(str(file), {"NANODEPLOY_ROUTER__PORT": str(by_env)})
    assert api_port(tmp_path, base, named) == (by_env, "")
    assert api_port(tmp_path, base, named, by_flag) == (by_flag, "")


def test_internal_ports_move_aside(tmp_path: Path, listener: int) -> None:
    base = load(None, {"NANODEPLOY_CONTROLLER__PORT": str(listener)})
    plan = build(tmp_path, base)
    assert not plan.controller.endswith(f":{listener}")


def test_port_0_takes_free_ones(tmp_path: Path) -> None:
    env = {f"NANODEPLOY_{s}__{f}": "0" for s in ("CONTROLLER", "PREFILL", "DECODE") for f in ("PORT", "HTTP_PORT")}
    plan = build(tmp_path, load(None, env), num_decode=3)
    ports = [int(spec.address.rsplit(":", 1)[1]) for spec in plan.services]
    assert len(set(ports)) == 7
    assert min(ports) > 8000


def test_bad_values_name_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--block-size: .*multiple of 16.*got 17"):
        build(tmp_path, engine={"block_size": 17})
    with pytest.raises(ConfigError, match="--dtype"):
        build(tmp_path, engine={"dtype": "int4"})
    with pytest.raises(ConfigError, match="--log-level"):
        build(tmp_path, log_level="loud")


def test_strange_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host 'no\.such\.host\.invalid'"):
        build(tmp_path, host="no.such.host.invalid")


def test_secrets_are_hashed_and_where_they_are_needed(tmp_path: Path) -> None:
    base = ClusterConfig(router=RouterConfig(api_keys=("sk-of-the-file",)))
    plan = build(tmp_path, base, num_prefill=1, api_keys=("sk-of-the-flag",))
    configs = {name: config_of(plan, name) for name in ("controller", "router", "prefill-0", "decode-0")}
    token = configs["controller"].controller.admin_token
    assert len(token) > 24
    assert configs["router"].router.admin_token == token
    keys = configs["router"].router.api_keys
    assert keys == tuple(f"sha256:{hashed_key(key)}" for key in ("sk-of-the-file", "sk-of-the-flag"))
    for text in plan.files.values():
        assert "sk-of-the" not in text
    for name in ("prefill-0", "decode-0"):
        assert (configs[name].router.api_keys, configs[name].router.admin_token) == ((), "")
        assert configs[name].controller.admin_token == ""
