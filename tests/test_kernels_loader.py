"""A native library that is missing, broken or from another version is named, with what to do about it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from common.errors import InternalError
from common.kernels import cpu, native
from common.kvtransfer import ucx

ctypes.CDLL("libm.so.6")
OTHER = next(Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line)
LOADERS = {"digest": (native, native.library), "kernels": (cpu, cpu.library), "ucx": (ucx, ucx._library)}


@pytest.mark.parametrize("which", LOADERS)
def test_a_library_of_another_version(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, library = LOADERS[which]
    monkeypatch.setattr(module, "LIBRARY_PATH", OTHER)
    with pytest.raises(InternalError, match=r"has no function nd_\w+: it was built from another .*run `make native`"):
        library.__wrapped__()


@pytest.mark.parametrize("which", LOADERS)
def test_a_file_that_is_no_library(which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, library = LOADERS[which]
    broken = tmp_path / "libnd.so"
    broken.write_bytes(Path(sys.executable).read_bytes()[:100])
    monkeypatch.setattr(module, "LIBRARY_PATH", broken)
    with pytest.raises(InternalError, match=r"libnd\.so cannot be loaded: .*run `make native`"):
        library.__wrapped__()


def test_kernels_that_were_not_built_are_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "LIBRARY_PATH", tmp_path / "libnd_cpu.so")
    assert cpu.library.__wrapped__() is None
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / "libnd_cpu.so")
    with pytest.raises(InternalError, match="run `make native`"):
        native.library.__wrapped__()
