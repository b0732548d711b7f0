from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError, UnavailableError
from services.cli.hint import hint
from services.cli.options import check_model_folder, engine_fields, running_cluster
from services.cli.state import (
    ClusterState,
    ProcessId,
    ServiceState,
    StateFolder,
    cache_root,
    service_of,
    state_root,
)


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
        folder.write(state("stopping"))
        with pytest.raises(UnavailableError, match="'t' is still stopping"), StateFolder(tmp_path, "t").hold():
            pass
    dead = subprocess.Popen(["true"])
    folder.write(state(pid=dead.pid))
    dead.wait()
    with folder.hold():  # the state is that of a launcher which is gone: its pid is nobody's business
        with pytest.raises(UnavailableError, match="'t' is just being started by another command"):
            with StateFolder(tmp_path, "t").hold():
                pass


def test_the_lock_goes_on_to_a_process_that_inherits_it(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "t")
    with folder.hold() as lock:
        launcher = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(UnavailableError), folder.hold():
        pass
    launcher.communicate()
    with folder.hold():
        pass


def test_a_service_is_known_by_its_pid(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "t")
    with folder.hold():
        folder.write(state())
    assert service_of(tmp_path, os.getpid()) == "the router of cluster 't'"
    assert service_of(tmp_path, 1) == ""


def test_commands_in_messages_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "nanodeploy"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/nanodeploy"])
    assert hint("down", "two") == "bin/nanodeploy down --name two"
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert hint("down", "default") == "bin/nanodeploy down"
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    assert hint("down", "default") == "nanodeploy down"
    assert hint("down", "default", "x/nanodeploy") == "x/nanodeploy down"


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
    with pytest.raises(UnavailableError, match="start one with `nanodeploy up --name t`"):
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
