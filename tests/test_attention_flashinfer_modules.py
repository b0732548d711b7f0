"""Libraries of attention kernels as other processes see them while they are made: whole, or not at all.

FlashInfer needs a GPU's toolkit; what stands for it here are its two folders and its description of a module, which
the real ninja builds.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from common.attention import flashinfer_modules
from common.attention.flashinfer_modules import build, build_missing, find
from common.errors import ConfigError
from common.kvtransfer.ucx import LIBRARY_PATH

pytestmark = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")

WAIT_S = 20.0


@dataclass(frozen=True)
class Spec:
    """FlashInfer's JitSpec, as far as it is used: `command` makes the library `$out`."""

    folder: Path
    name: str
    command: str

    @property
    def ninja_path(self) -> Path:
        return self.folder / self.name / "build.ninja"

    @property
    def jit_library_path(self) -> Path:
        return self.folder / self.name / f"{self.name}.so"

    def write_ninja(self) -> None:
        self.ninja_path.parent.mkdir(parents=True, exist_ok=True)
        rule = f"rule link\n  command = {self.command}\nbuild {self.jit_library_path}: link\n"
        self.ninja_path.write_text(f"{rule}default {self.jit_library_path}\n", encoding="utf-8")


@dataclass(frozen=True)
class Kernel:
    folder: Path
    name: str
    command: str

    @property
    def path(self) -> Path | None:
        return find(self.name)

    def sources(self) -> Spec:
        return Spec(self.folder, self.name, self.command)


def stand_ins(folder: Path) -> dict[str, ModuleType]:
    """The modules that say where libraries lie."""
    env, jit = ModuleType("flashinfer.jit.env"), ModuleType("flashinfer.jit")
    vars(env).update(FLASHINFER_AOT_DIR=folder.parent / "aot", FLASHINFER_JIT_DIR=folder)
    vars(jit).update(env=env)
    return {"flashinfer": ModuleType("flashinfer"), "flashinfer.jit": jit, "flashinfer.jit.env": env}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are built."""
    for name, module in stand_ins(tmp_path / "built").items():
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path / "built"


def build_elsewhere(folder: Path) -> None:
    """In another process."""
    sys.modules |= stand_ins(folder)
    build([slow_kernel(folder)])


def slow_kernel(folder: Path) -> Kernel:
    """Its library is half there until a file `go` is; a file `runs` has a line for each time that it is made."""
    go, runs = folder.parent / "go", folder.parent / "runs"
    half = LIBRARY_PATH.stat().st_size // 2
    wait = f"until [ -e {go} ]; do sleep 0.05; done"
    command = f"echo >> {runs}; head -c {half} {LIBRARY_PATH} > $out; {wait}; cp {LIBRARY_PATH} $out"
    return Kernel(folder, "kernel", command)


def halves(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.so") if 0 < path.stat().st_size < LIBRARY_PATH.stat().st_size]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_library_is_found_when_it_is_complete(folder: Path) -> None:
    kernel = slow_kernel(folder)
    builders = [threading.Thread(target=call, args=([kernel],)) for call in (build, build_missing)]
    for builder in builders:
        builder.start()
    until(lambda: halves(folder))
    found = find(kernel.name)
    (folder.parent / "go").touch()
    for builder in builders:
        builder.join(WAIT_S)
    assert found is None
    path = find(kernel.name)
    assert path is not None
    assert path.read_bytes() == LIBRARY_PATH.read_bytes()
    assert (folder.parent / "runs").read_text() == "\n", "two that want the same library make it once"


@pytest.mark.parametrize("keep", [0, 10, 64, -1])
def test_a_library_that_somebody_left_half_written_is_made_again(folder: Path, keep: int) -> None:
    (folder.parent / "go").touch()
    kernel = slow_kernel(folder)
    left = folder / kernel.name / f"{kernel.name}.so"
    left.parent.mkdir(parents=True)
    left.write_bytes(LIBRARY_PATH.read_bytes()[:keep])
    assert find(kernel.name) is None
    assert build([kernel]) == [kernel]
    assert find(kernel.name) == left
    assert build([kernel]) == []


def test_a_compiler_whose_parent_was_killed_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes on: another process must not write to the same files, and does not wait for ever."""
    kernel = slow_kernel(folder)
    other = multiprocessing.get_context("spawn").Process(target=build_elsewhere, args=(folder,))
    other.start()
    until(lambda: halves(folder))
    other.kill()
    other.join(WAIT_S)
    monkeypatch.setattr(flashinfer_modules, "BUILD_LIMIT_S", 0.5)
    with pytest.raises(ConfigError, match="another process has held"):
        build_missing([kernel])
    monkeypatch.setattr(flashinfer_modules, "BUILD_LIMIT_S", WAIT_S)
    (folder.parent / "go").touch()
    build_missing([kernel])
    assert kernel.path is not None


def test_what_does_not_compile_says_why(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no such type: half"):
        build_missing([Kernel(folder, "kernel", "echo no such type: half; false")])
    assert find("kernel") is None
