from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load, to_yaml
from common.config.schema import ClusterConfig
from common.errors import ConfigError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return str(path)


def test_no_file_is_the_defaults() -> None:
    assert load(None, {}) == ClusterConfig()
    assert load(None, {"NANODEPLOY_CACHE": "/x", "PATH": "/bin"}) == ClusterConfig()


def test_partial_section_keeps_cluster_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, "decode:\n  host: 10.0.0.1\n  engine: {model: /m}\nprefill:\n"), {})
    assert (config.decode.host, config.decode.port, config.decode.http_port) == ("10.0.0.1", 7300, 7301)
    assert config.decode.engine.model == "/m"
    assert config.prefill == ClusterConfig().prefill


def test_environment_wins_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "router: {port: 1, host: a}\n")
    env = {
        "NANODEPLOY_ROUTER__PORT": "2",
        "NANODEPLOY_DECODE__ENGINE__ENABLE_PREFIX_CACHING": "false",
        "NANODEPLOY_DECODE__CONTROLLERS": "a:1, b:2",
        "NANODEPLOY_PREFILL__CONTROLLERS": '["c:3"]',
        "NANODEPLOY_DECODE__HANDOFF__READ_TIMEOUT_S": "0.5",
    }
    config = load(path, env)
    assert (config.router.port, config.router.host) == (2, "a")
    assert config.decode.engine.enable_prefix_caching is False
    assert config.decode.controllers == ("a:1", "b:2")
    assert config.prefill.controllers == ("c:3",)
    assert config.decode.handoff.read_timeout_s == 0.5


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load(None, {"NANODEPLOY_DECODE__ENGINE__MODEL": "/m", "NANODEPLOY_LOG__LEVEL": "debug"})
    assert load(write(tmp_path, to_yaml(config)), {}) == config


@pytest.mark.parametrize(
    ("text", "param", "needles"),
    [
        ("decode: {engine: {blocksize: 16}}", "decode.engine.blocksize", ["unknown key", "'block_size'"]),
        ("dekode: {}", "dekode", ["unknown key", "'decode'"]),
        ("decode: {engine: {block_size: 20}}", "decode.engine.block_size", ["multiple of 16", "20"]),
        ("decode: {engine: {device: tpu}}", "decode.engine.device", ["'cpu'", "tpu"]),
        ("router: {port: eight}", "router.port", ["integer", "eight"]),
        ("router: {port: 70000}", "router.port", ["65535", "70000"]),
        ("decode: {http_port: -1}", "decode.http_port", ["0", "-1"]),
        ("router: {worker_port: 65530, workers: 7}", "router", ["worker_port 65530", "7 workers"]),
        ("router: 7", "router", ["section"]),
        ("decode: {controllers: [1]}", "decode.controllers.0", ["string", "1"]),
        ("- a", "", ["sections"]),
        ("router: {port: 1, port: 2}", "", ["twice", "line 1"]),
        ("router: [", "", ["not valid YAML"]),
    ],
)
def test_mistakes_in_file_name_key_and_rule(tmp_path: Path, text: str, param: str, needles: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert caught.value.param == param
    for needle in [path, *needles]:
        assert needle in caught.value.message


@pytest.mark.parametrize(
    ("variable", "value", "param", "needle"),
    [
        ("NANODEPLOY_ROUTER__PROT", "1", "router.prot", "'port'"),
        ("NANODEPLOY_ROTER__PORT", "1", "roter", "'router'"),
        ("NANODEPLOY_ROUTER__PORT", "x", "router.port", "integer"),
        ("NANODEPLOY_ROUTER__PORT__X", "1", "router.port", "no keys"),
        ("NANODEPLOY_DECODE__ENGINE", "1", "decode.engine", "section"),
        ("NANODEPLOY_ROUTER__CONTROLLERS", "[1", "router.controllers", "JSON"),
    ],
)
def test_mistakes_in_environment_name_the_variable(variable: str, value: str, param: str, needle: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {variable: value})
    assert caught.value.param == param
    assert variable in caught.value.message
    assert needle in caught.value.message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load(str(tmp_path / "absent.yaml"), {})


def test_a_section_that_does_not_fit_together_names_its_sources_and_no_values(tmp_path: Path) -> None:
    path = write(tmp_path, "router: {worker_port: 65535, admin_token: hidden-one, api_keys: [hidden-two]}")
    with pytest.raises(ConfigError) as caught:
        load(path, {"NANODEPLOY_ROUTER__WORKERS": "2"})
    assert f"{path}, environment variable NANODEPLOY_ROUTER__WORKERS: router: " in caught.value.message
    assert "hidden" not in caught.value.message


def test_heartbeats_that_come_after_the_lease_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"heartbeat_s 1 must be less than lease_ttl_s 0\.5"):
        load(write(tmp_path, "controller: {lease_ttl_s: 0.5}\n"), {})


@pytest.mark.parametrize("text", [".inf", ".nan"])
def test_a_time_without_end_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"controller\.lease_ttl_s: .*finite"):
        load(write(tmp_path, f"controller: {{lease_ttl_s: {text}}}\n"), {})


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "router: {port: x}\ndecode: {engine: {max_num_seqs: -1}}"), {})
    assert "router.port" in caught.value.message
    assert "decode.engine.max_num_seqs" in caught.value.message
