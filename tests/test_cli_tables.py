"""What stands on a terminal in the end: tables that fit, progress that leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import termios
from pathlib import Path

import msgspec
import pytest
from cli_support import console
from rich.console import Console
from rpc_support import make_worker

from common.errors import UnavailableError
from common.rpc.admin import PeerStatus, WorkerStatus
from common.types import BlockStates, Role, WorkerLoad, WorkerRef, WorkerState
from services.cli import status as status_module
from services.cli.cluster import WorkerView
from services.cli.report import Report
from services.cli.state import ClusterState, Phase, ProcessId, ServiceState, StateFolder
from services.cli.status import show_status
from services.cli.tables import worker_table
from services.cli.terminal import quiet_keys

RAW = "UNAVAILABLE: failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7300: refused " * 3


def view(name: str, role: Role, error: str = "", peers: int = 1) -> WorkerView:
    states = BlockStates(group="kv", total=12345, free=12000, live=123, cached=222, leased=0, in_flight=0)
    load = WorkerLoad(running=12, waiting=3, tokens_per_s=1234, kv_states=(states, states))
    info = msgspec.structs.replace(make_worker(name, role=role, load=load), pid=1234567)
    seen = tuple(
        PeerStatus(
            ref=WorkerRef(f"prefill-{i}", 1, "a:1"),
            state="ready",
            transport="ucx/cma",
            detail="",
            bytes_read=0,
            reads=0,
            digest_mismatches=0,
        )
        for i in range(peers)
    )
    status = None if error else WorkerStatus(worker=info, engine_restarts=0, peers=seen)
    return WorkerView(info, status, error)


def shown(views: list[WorkerView], width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(worker_table(views, width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_worker_is_one_line_that_fits(width: int) -> None:
    views = [view("decode-0", Role.DECODE), view("decode-1", Role.DECODE, peers=3), view("prefill-0", Role.PREFILL)]
    views.append(view("prefill-1", Role.PREFILL, error=RAW))
    lines = shown(views, width)
    assert all(len(line) <= width and "…" not in line for line in lines)
    rows = {name: [line for line in lines if line.startswith(name)] for name in ("decode-0", "decode-1", "prefill-1")}
    assert all(len(found) == 1 for found in rows.values())
    assert "no answer" in rows["prefill-1"][0]
    assert len(lines) <= 4 + len(views)
    if width >= 80:
        assert "123/222/0/0 of 12345" in rows["decode-0"][0]
    if width >= 120:
        assert rows["decode-0"][0].endswith("ucx/cma <- prefill-0")
        assert rows["decode-1"][0].endswith("ucx/cma <- 3 workers")
    assert ("127.0.0.1:7300" in rows["decode-0"][0]) is (width >= 120)


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after `text`: line feeds, cursor up, erase line."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


async def test_nothing_stays_of_what_was_running() -> None:
    out = io.StringIO()
    live = Console(file=out, width=80, force_terminal=True, color_system=None)
    with Report(live) as report:
        for name in ("controller", "decode-0", "router"):
            report.start(name)
        await asyncio.sleep(0.3)
        assert any("decode-0: starting" in line for line in screen(out.getvalue()))
        report.done("controller")
        during = screen(out.getvalue())
        assert [line for line in during if "controller" in line] == ["  ✓ controller: ready (0.3 s)"]
        assert sum("starting" in line for line in during) == 2
    assert [line for line in screen(out.getvalue()) if line] == ["  ✓ controller: ready (0.3 s)"]


def test_ctrl_c_is_not_written_into_a_table() -> None:
    parent, child = pty.openpty()
    try:
        with os.fdopen(child, "w") as file:
            before = termios.tcgetattr(child)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "tcgetpgrp", lambda _: os.getpgrp())
                with quiet_keys(Console(file=file)):
                    assert not termios.tcgetattr(child)[3] & termios.ECHOCTL
            assert termios.tcgetattr(child) == before
            with quiet_keys(Console(file=file)):  # in the background
                assert termios.tcgetattr(child) == before
    finally:
        os.close(parent)
    with quiet_keys(console()[0]):  # no terminal
        pass


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize(("phase", "said", "code"), [("stopping", "is stopping", 3), ("ready", "gone", 1)])
async def test_status_of_a_cluster_that_just_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool, phase: Phase, said: str, code: int
) -> None:
    async def unreachable(_: str) -> list[WorkerView]:
        if answers and phase == "stopping":  # the workers have left already
            return []
        raise UnavailableError("gone")

    monkeypatch.setattr(status_module, "view_cluster", unreachable)
    monkeypatch.setenv("NANODEPLOY_STATE_DIR", str(tmp_path))
    folder, me = StateFolder(tmp_path, "t"), ProcessId.of(os.getpid())
    with folder.hold():
        folder.write(
            ClusterState(name="t", phase=phase, launcher=me, url="u", controller="c:1", model="m", version="0")
        )
    shown, out = console()
    assert await show_status("t", "", False, shown) == code
    assert said in out.getvalue()


DEAD = ProcessId(1, 0)


@pytest.mark.parametrize(
    ("decode", "service", "code"),
    [(WorkerState.READY, None, 0), (WorkerState.READY, DEAD, 1), (WorkerState.UNREADY, None, 1), (None, None, 1)],
    ids=["well", "a dead service", "not ready", "no decode worker"],
)
async def test_status_is_well_only_if_all_runs_and_can_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: WorkerState | None, service: ProcessId | None, code: int
) -> None:
    found = [view("prefill-0", Role.PREFILL)]
    if decode is not None:
        worker = msgspec.structs.replace(make_worker(), state=decode)
        found.append(WorkerView(worker, WorkerStatus(worker=worker, engine_restarts=0, peers=())))

    async def answer(_: str) -> list[WorkerView]:
        return found

    monkeypatch.setattr(status_module, "view_cluster", answer)
    monkeypatch.setenv("NANODEPLOY_STATE_DIR", str(tmp_path))
    folder, me = StateFolder(tmp_path, "t"), ProcessId.of(os.getpid())
    services = (ServiceState(name="router", role="router", process=service or me, address="a:1", log="/l"),)
    with folder.hold():
        folder.write(
            ClusterState(
                name="t",
                phase="ready",
                launcher=me,
                url="u",
                controller="c:1",
                model="m",
                version="0",
                services=services,
            )
        )
    assert await show_status("t", "", False, console()[0]) == code
