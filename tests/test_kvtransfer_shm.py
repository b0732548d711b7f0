"""Shared memory that a killed process leaves is given back by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from ucx_support import make_transport

from common.kvtransfer.shm import SHM, STALE_S, segments_folder

NBYTES = 1 << 30
ALLOCATES = f"""
from common.config.schema import UcxConfig
from common.kvtransfer.ucx import UcxTransport
transport = UcxTransport(UcxConfig(tls="posix,cma,self"))
for group in "abc":
    transport.allocate(group, {NBYTES})
"""


def _mib(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512 >> 20
    except FileNotFoundError:
        return 0


def _settles(folder: Path, known: set[Path]) -> bool:
    """Has it, at some moment, only these? Other tests make segments at the same time."""
    deadline = time.monotonic() + 5
    while set(folder.iterdir()) - known:
        if time.monotonic() > deadline:
            return False
    return True


def test_old_segments_go_and_young_ones_stay(tmp_path: Path) -> None:
    folder = Path(segments_folder(tmp_path))
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    old, young = folder / "ucx_shm_posix_1", folder / "ucx_shm_posix_2"
    old.touch()
    young.touch()
    os.utime(old, (0, time.time() - STALE_S - 1))
    assert segments_folder(tmp_path) == str(folder)
    assert list(folder.iterdir()) == [young]


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    Path(segments_folder(tmp_path)).chmod(0o777)
    assert segments_folder(tmp_path) == ""


def test_a_link_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"nanodeploy-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert segments_folder(tmp_path) == ""


def test_without_shared_memory_ucx_has_its_own_way(tmp_path: Path) -> None:
    assert segments_folder(tmp_path / "nowhere") == ""


def test_what_the_operator_says_of_names_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_POSIX_USE_PROC_LINK", "n")
    folder, before = Path(segments_folder()), {path.name for path in SHM.glob("ucx_shm_posix_*")}
    ours = set(folder.iterdir())
    with closing(make_transport("posix")) as transport:
        transport.allocate("full", 1 << 20)
        assert {path.name for path in SHM.glob("ucx_shm_posix_*")} - before
        assert _settles(folder, ours)


def test_a_worker_killed_while_it_takes_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UCX_POSIX_DIR", "UCX_POSIX_USE_PROC_LINK"):
        monkeypatch.delenv(name, raising=False)
    found = os.statvfs(SHM)
    if found.f_bavail * found.f_frsize < 4 * NBYTES:
        pytest.skip(f"{SHM} has no room for {4 * NBYTES >> 30} GiB")
    folder = Path(segments_folder())
    before = set(folder.iterdir())
    process = subprocess.Popen([sys.executable, "-c", ALLOCATES], cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 30
        while not (left := [path for path in set(folder.iterdir()) - before if _mib(path) >= 64]):
            assert time.monotonic() < deadline
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (segment,) = left
    assert segment.exists(), "killed while the kernel filled it"
    os.utime(segment, (0, time.time() - STALE_S - 1))
    with closing(make_transport("posix")) as transport:
        assert not segment.exists()
        transport.allocate("full", 1 << 20)
        assert _settles(folder, before), "its own has no name any more"
