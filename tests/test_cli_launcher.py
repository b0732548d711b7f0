from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_support import console, logged_pids, plan_of, service

from common.errors import UnavailableError
from services.cli import launcher as launcher_module
from services.cli import probe
from services.cli.launcher import Launcher, LaunchOptions
from services.cli.plan import ClusterPlan
from services.cli.probe import Answer
from services.cli.process import ServiceSpec
from services.cli.report import Report
from services.cli.state import ClusterState, ProcessId, StateFolder


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - other processes change it
            await asyncio.sleep(0.05)


async def gone(pids: list[int]) -> None:
    """SIGKILL to what a service had started takes a moment."""
    await until(lambda: not any(ProcessId.of(pid).alive for pid in pids))


class Run:
    """One launcher under test, with what it printed and the answers it checked."""

    def __init__(self, root: Path, plan: ClusterPlan, *, proofs_needed: int = 1, **options: float) -> None:
        self.folder = StateFolder(root, "t")
        shown, self.out = console()
        self.ready = asyncio.Event()
        self.answers: list[Answer] = []

        def check_path(answer: Answer) -> str:
            self.answers.append(answer)
            if len(self.answers) < proofs_needed:
                raise UnavailableError("the decode worker recomputed")
            return "the whole way"

        self.phase_announced_in = ""

        async def announce() -> None:
            self.phase_announced_in = self.state.phase

        async def on_ready() -> None:
            self.ready.set()
            await asyncio.Event().wait()

        self.launcher = Launcher(
            self.folder, plan, LaunchOptions(version="0", **options), Report(shown), check_path, announce, on_ready
        )

    @property
    def state(self) -> ClusterState:
        state = self.folder.read()
        assert state is not None
        return state


def cluster(root: Path) -> Path:
    folder = root / "t"
    folder.mkdir()
    return folder


async def serving(root: Path) -> tuple[Path, ServiceSpec, ServiceSpec, Run, asyncio.Task[int]]:
    """A cluster of a worker and a router that is ready: its folder, the two, and its launcher under way."""
    folder = cluster(root)
    worker, router = service(folder, "decode-0", "decode"), service(folder, "router", "router")
    run = Run(root, plan_of(folder, worker, router))
    task = asyncio.create_task(run.launcher.run())
    await asyncio.wait_for(run.ready.wait(), 30)
    return folder, worker, router, run, task


async def test_starts_proves_and_stops_everything(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    specs = [
        service(folder, "controller", "controller"),
        service(folder, "decode-0", "decode", ready_after=0.3),
        service(folder, "router", "router"),
    ]
    run = Run(tmp_path, plan_of(folder, *specs), proofs_needed=2)
    task = asyncio.create_task(run.launcher.run())
    await asyncio.wait_for(run.ready.wait(), 30)
    assert (run.phase_announced_in, run.state.phase) == ("starting", "ready")  # who waits for ready misses nothing
    assert {s.name: s.process.alive for s in run.state.services} == {
        "controller": True,
        "decode-0": True,
        "router": True,
    }
    assert run.answers[0].prompt_tokens > 32  # more than HandoffConfig.min_remote_tokens
    assert (folder / "config" / "cluster.yaml").read_text() == "log: {}\n"
    pids = [pid for spec in specs for pid in logged_pids(spec)]
    assert len(pids) == 6
    run.launcher.stop()
    assert await asyncio.wait_for(task, 30) == 0
    assert run.state.phase == "stopped"
    assert run.state.services == ()
    await gone(pids)
    assert all("drained" in spec.log.read_text() for spec in specs)
    text = run.out.getvalue()
    assert "loading the model" in text
    assert "first token: the whole way" in text


async def test_death_before_ready_fails_with_the_logs_tail(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    bad = service(folder, "decode-0", "decode", ready_after=99, die_after=0.2)
    router = service(folder, "router", "router")
    run = Run(tmp_path, plan_of(folder, bad, router))
    assert await asyncio.wait_for(run.launcher.run(), 30) == 1
    assert "decode-0 ended with exit code 7" in run.state.detail
    assert "about to fail: no such model" in run.state.detail
    assert run.state.phase == "failed"
    assert not run.ready.is_set()
    assert run.out.getvalue().endswith("    about to fail: no such model\n")  # the cause is the last thing said
    await gone(logged_pids(bad) + logged_pids(router))


async def test_never_ready_ends_at_the_limit(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    slow = service(folder, "router", "router", ready_after=99)
    run = Run(tmp_path, plan_of(folder, slow), ready_timeout_s=1.0)
    assert await asyncio.wait_for(run.launcher.run(), 30) == 1
    assert "not ready after 1 s" in run.state.detail
    await gone(logged_pids(slow))


async def test_stopped_before_it_is_ready_is_no_success(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    slow = service(folder, "router", "router", ready_after=99)
    run = Run(tmp_path, plan_of(folder, slow))
    task = asyncio.create_task(run.launcher.run())
    await until(lambda: "loading the model" in run.out.getvalue())
    run.launcher.stop()
    assert await asyncio.wait_for(task, 30) == 130
    assert run.state.phase == "stopped"
    assert not run.phase_announced_in


async def test_path_never_taken_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "PROOFS", 2)
    folder = cluster(tmp_path)
    run = Run(tmp_path, plan_of(folder, service(folder, "router", "router")), proofs_needed=99)
    assert await asyncio.wait_for(run.launcher.run(), 30) == 1
    assert run.state.detail == "the decode worker recomputed"
    assert len(run.answers) == 2


async def test_dead_service_is_reported_and_restarted(tmp_path: Path) -> None:
    _, worker, _, run, task = await serving(tmp_path)
    first = logged_pids(worker)
    os.kill(first[0], signal.SIGKILL)
    await until(lambda: "decode-0 is back (restart 1)" in run.out.getvalue())
    assert "decode-0 was killed by SIGKILL; the end of" in run.out.getvalue()
    state = next(s for s in run.state.services if s.name == "decode-0")
    assert state.restarts == 1
    assert state.process.alive
    assert state.process.pid not in first
    run.launcher.stop()
    assert await asyncio.wait_for(task, 30) == 0
    await gone(logged_pids(worker))  # the helper of the killed one as well


async def test_restarts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "MAX_RESTARTS", 1)
    folder = cluster(tmp_path)
    extra = service(folder, "prefill-0", "prefill", die_after=1.0)
    router = service(folder, "router", "router")
    worker = service(folder, "decode-0", "decode")
    run = Run(tmp_path, plan_of(folder, extra, worker, router))
    task = asyncio.create_task(run.launcher.run())
    await until(lambda: "prefill-0 died more than 1 times" in run.out.getvalue())
    assert not task.done()  # a decode worker does without it
    assert [s.name for s in run.state.services] == ["decode-0", "router"]
    for lives in (1, 2):
        await until(lambda: len(logged_pids(router)) == 2 * lives)  # noqa: B023 - called before the next turn
        os.kill(logged_pids(router)[-2], signal.SIGKILL)
    assert await asyncio.wait_for(task, 30) == 1
    assert "cannot go on without it" in run.state.detail


async def test_a_restarted_service_that_says_it_is_sick_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SICK_S", 0.3)
    folder, worker, _, run, task = await serving(tmp_path)
    (folder / "sick").touch()
    os.kill(logged_pids(worker)[0], signal.SIGKILL)
    await until(lambda: "decode-0 cannot serve: loading the model" in run.out.getvalue())
    (folder / "sick").unlink()
    await until(lambda: "decode-0 is back" in run.out.getvalue())
    run.launcher.stop()
    assert await asyncio.wait_for(task, 30) == 0


async def test_a_state_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    folder, worker, router, run, task = await serving(tmp_path)
    (folder / "state.tmp").mkdir()
    os.kill(logged_pids(worker)[0], signal.SIGKILL)
    await until(lambda: "decode-0 is back (restart 1)" in run.out.getvalue())
    assert "cannot be written" in run.out.getvalue()
    run.launcher.stop()
    assert await asyncio.wait_for(task, 30) == 0
    assert all("drained" in spec.log.read_text() for spec in (worker, router))


async def test_a_folder_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    (folder / "config").touch()
    run = Run(tmp_path, plan_of(folder, service(folder, "router", "router")))
    assert await asyncio.wait_for(run.launcher.run(), 30) == 1
    assert run.state.detail == f"{folder / 'config'}: File exists"


async def test_second_stop_kills(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    slow = service(folder, "router", "router", stop_takes=60)
    run = Run(tmp_path, plan_of(folder, slow))
    task = asyncio.create_task(run.launcher.run())
    await asyncio.wait_for(run.ready.wait(), 30)
    pids = logged_pids(slow)
    run.launcher.stop()
    await asyncio.sleep(0.3)
    assert not task.done()
    run.launcher.stop()
    assert await asyncio.wait_for(task, 10) == 0
    await gone(pids)


async def test_slow_stop_ends_at_the_grace(tmp_path: Path) -> None:
    folder = cluster(tmp_path)
    slow = service(folder, "router", "router", stop_takes=60)
    run = Run(tmp_path, plan_of(folder, slow), grace_s=0.5)
    task = asyncio.create_task(run.launcher.run())
    await asyncio.wait_for(run.ready.wait(), 30)
    assert run.state.stop_limit_s > 4 * 0.5  # router, workers, controller, storage
    pids = logged_pids(slow)
    run.launcher.stop()
    assert await asyncio.wait_for(task, 10) == 0
    assert "and was killed" in run.out.getvalue()
    await gone(pids)


LONE_LAUNCHER = """
import asyncio, sys
from services.cli.report import Report, make_console
from pathlib import Path
from cli_support import plan_of, service
from test_cli_launcher import Run, cluster
async def main():
    root = Path(sys.argv[1])
    folder = cluster(root)
    roles = (("decode-0", "decode"), ("router", "router"))
    specs = [service(folder, name, role, stop_takes=0.5) for name, role in roles]
    run = Run(root, plan_of(folder, *specs))
    run.launcher._report = Report(make_console(lossy=True))
    task = asyncio.create_task(run.launcher.run())
    await run.ready.wait()
    (root / "ready").touch()
    await task
asyncio.run(main())
"""


def lone_launcher(root: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A launcher in a process of its own; returns when its cluster is ready."""
    tests = Path(__file__).parent
    environ = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", LONE_LAUNCHER, str(root)], env=environ, **options)
    deadline = time.monotonic() + 30
    while not (root / "ready").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (root / "ready").exists()
    return process


def has_drained(root: Path) -> list[bool]:
    return ["drained" in (root / "t" / "logs" / f"{name}.log").read_text() for name in ("decode-0", "router")]


def test_a_terminal_that_is_closed_stops_the_cluster_in_order(tmp_path: Path) -> None:
    """Nothing can be shown any more, and a shell and the kernel send one SIGHUP each."""
    ours, theirs = pty.openpty()
    terminal: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    heeded = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    process = lone_launcher(tmp_path, preexec_fn=heeded, **terminal)
    os.close(theirs)
    os.close(ours)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    process.wait(30)
    state = StateFolder(tmp_path, "t").read()
    assert state is not None
    assert state.phase == "stopped"
    assert has_drained(tmp_path) == [True, True]


def test_under_nohup_a_hangup_is_nothing(tmp_path: Path) -> None:
    process = lone_launcher(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    assert has_drained(tmp_path) == [False, False]
    process.terminate()
    process.wait(30)
    assert has_drained(tmp_path) == [True, True]


def test_services_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    process = lone_launcher(tmp_path)
    try:
        state = StateFolder(tmp_path, "t").read()
        assert state is not None
        assert state.launcher.alive
        services = [s.process for s in state.services]
        assert len(services) == 2
        assert all(s.alive for s in services)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(s.alive for s in services) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(s.alive for s in services)
    assert StateFolder(tmp_path, "t").running() is None
