from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from common.errors import ConfigError, UnavailableError
from services.cli.options import check_model_folder, engine_fields, running_cluster
from services.cli.state import ClusterState, ProcessId, ServiceState, StateFolder, cache_root, state_root


def state(phase: str = "ready", pid: int | None = None) -> ClusterState:
    launcher = ProcessId.of(pid or os.getpid())
    service = ServiceState(name="router", role="router", process=launcher, address="a:1", log="/l")
    return ClusterState(
        name="t",
        phase=phase,  # type: ignore[arg-type]
        launcher=launcher,
        url="http://127.0.0.1:1",
        controller="127.0.0.1:2",
        model="m",
        version="0",
        services=(service,),
    )


def test_process_is_named_by_pid_and_start() -> None:
    me = ProcessId.of(os.getpid())
    assert me.alive
    assert not ProcessId(me.pid, me.started - 1).alive
    with subprocess.Popen(["sleep", "60"]) as process:
        child = ProcessId.of(process.pid)
        assert child.alive
        process.kill()
    assert not child.alive
    assert not ProcessId.of(process.pid).alive


def test_zombie_is_not_alive() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        child = ProcessId.of(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not child.alive


def test_state_round_trip_and_running(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "t")
    assert folder.read() is None
    with folder.hold():
        folder.write(state())
    assert folder.read() == state()
    assert folder.running() == state()
    dead = subprocess.Popen(["true"])
    folder.write(state(pid=dead.pid))
    dead.wait()
    assert folder.running() is None
    (tmp_path / "t" / "state.json").write_text('{"name": 1}')
    assert folder.read() is None


def test_one_launcher_at_a_time(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "t")
    with folder.hold():
        folder.write(state())
        with pytest.raises(UnavailableError, match=r"'t' is up already at http://127\.0\.0\.1:1 \(launcher pid \d+\)"):
            with StateFolder(tmp_path, "t").hold():
                pass
    with folder.hold():
        pass


def test_logs_of_the_run_before_are_kept(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "t")
    folder.prepare()
    (folder.logs_path / "router.log").write_text("old")
    folder.prepare()
    assert (folder.logs_path / "router.log.1").read_text() == "old"
    assert not (folder.logs_path / "router.log").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cluster name"):
        StateFolder(tmp_path, name)


def test_folders_follow_xdg() -> None:
    assert state_root({"XDG_STATE_HOME": "/s"}) == Path("/s/nanodeploy")
    assert state_root({"NANODEPLOY_STATE_DIR": "/x", "XDG_STATE_HOME": "/s"}) == Path("/x")
    assert cache_root({"XDG_CACHE_HOME": "/c"}) == Path("/c/nanodeploy")
    assert cache_root({"NANODEPLOY_CACHE_DIR": "/y"}) == Path("/y")


def test_running_cluster_says_what_to_do(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "t")
    with pytest.raises(UnavailableError, match="start one with `nanodeploy up`"):
        running_cluster(folder)
    with folder.hold():
        folder.write(state("starting"))
    with pytest.raises(UnavailableError, match="'t' is starting"):
        running_cluster(folder)
    folder.write(state())
    assert running_cluster(folder).url == "http://127.0.0.1:1"


def test_engine_flags_become_fields() -> None:
    assert engine_fields(dtype="half", max_model_len=None, block_size=32) == {"dtype": "float16", "block_size": 32}
    assert engine_fields(dtype="float") == {"dtype": "float32"}


def test_model_folder_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        check_model_folder(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert check_model_folder(str(tmp_path)) == str(tmp_path)
