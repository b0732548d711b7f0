"""Builds the two native libraries: `python setup.py build_ext --inplace`, or through pip; and the gRPC stubs.

They are plain C ABI (no Python, no torch headers) and are loaded with ctypes, so one build serves every
Python. Sources are found by folder. A file's name says which instructions it may use (`*_avx2.cpp`,
`*_avx512.cpp`, `*_amx.cpp`); such files are left out on other processors, and what they hold is called
only after a look at `csrc/cpu/features.h`. Objects are kept in the build folder and compiled again when a
source, a header or the flags change.

UCX's headers come from the `libucx-cu13` wheel, or from the system where it is not installed. Nothing links
to libucp: it is loaded at run time.

A wheel holds stubs generated from `proto/` for it, whether or not the source tree has any.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
IS_X86 = platform.machine() in ("x86_64", "AMD64")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# g++ 12 warns about its own AVX-512 headers; clang does not know one of these names
QUIET = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", *QUIET]
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
FLAGS_BY_SUFFIX = {"_avx2.cpp": AVX2, "_avx512.cpp": AVX512, "_amx.cpp": AMX}

CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Werror"]
LDFLAGS = ["-shared", "-pthread", "-ldl"]

LIBRARIES = {
    "common/kernels/libnd_cpu.so": ["csrc/cpu/*.cpp", "csrc/attention/*.cpp"],
    "common/kvtransfer/libnd_ucx.so": ["csrc/ucx/*.cpp", "csrc/cpu/digest*.cpp", "csrc/cpu/features.cpp"],
}


def compiler() -> list[str]:
    named = os.environ.get("CXX", "")
    if named:
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise SystemExit("no C++ compiler found: install g++ or clang++ (Debian, Ubuntu: apt install g++), or set CXX")


def ucx_include() -> str:
    spec = importlib.util.find_spec("libucx")
    folders = [Path(p) / "include" for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*folders, Path("/usr/include"), Path("/usr/local/include")]:
        if (folder / "ucp/api/ucp.h").exists():
            return str(folder)
    raise SystemExit("UCX headers not found: pip install libucx-cu13==1.21.0 (Debian, Ubuntu: apt install libucx-dev)")


def flags_of(source: Path) -> list[str] | None:
    """Extra flags of a source file; None if this processor family cannot run it."""
    for suffix, flags in FLAGS_BY_SUFFIX.items():
        if source.name.endswith(suffix):
            return flags if IS_X86 else None
    return []


def sources_of(patterns: list[str]) -> list[Path]:
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in found if flags_of(path) is not None)


def is_stale(target: Path, command: list[str]) -> bool:
    """Is the object missing, or older than anything it was made from, or made by another command?"""
    stamp = target.with_suffix(".cmd")
    if not target.exists() or not stamp.exists() or stamp.read_text() != shlex.join(command):
        return True
    depfile = target.with_suffix(".d").read_text().replace("\\\n", " ")
    made = target.stat().st_mtime
    for name in depfile.split(":", 1)[1].split():
        dependency = Path(name)
        if not dependency.exists() or dependency.stat().st_mtime > made:
            return True
    return False


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{(done.stdout + done.stderr)[:8000]}")


class BuildNative(build_ext):
    """Compiles each library's sources, in parallel, and links them where setuptools expects an extension."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        self._compiler = compiler()
        self._ucx = ucx_include()
        wanted = {ext.name: sources_of(LIBRARIES[self.get_ext_filename(ext.name)]) for ext in self.extensions}
        sources = sorted({source for files in wanted.values() for source in files})
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one checkout take turns
            objects = dict(zip(sources, pool.map(self._compile, sources), strict=True))
            for ext in self.extensions:
                self._link(Path(self.get_ext_fullpath(ext.name)), [objects[s] for s in wanted[ext.name]])

    def _compile(self, source: Path) -> Path:
        target = Path(self.build_temp).resolve() / source.relative_to(ROOT).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        include = ["-I", str(ROOT / "csrc"), "-isystem", self._ucx]
        command = [*self._compiler, *CXXFLAGS, *(flags_of(source) or []), *include, "-MMD"]
        command += ["-c", str(source), "-o", str(target)]
        if is_stale(target, command):
            run(command)
            target.with_suffix(".cmd").write_text(shlex.join(command))
        return target

    def _link(self, library: Path, objects: list[Path]) -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [*self._compiler, *map(str, objects), *LDFLAGS]
        key = Path(self.build_temp).resolve() / f"{library.name}.{hashlib.sha1(str(library).encode()).hexdigest()[:8]}"
        newest = max(obj.stat().st_mtime for obj in objects)
        made = library.stat().st_mtime if library.exists() else 0.0
        if made > newest and key.exists() and key.read_text() == shlex.join(command):
            return
        partial = library.with_suffix(".partial")
        run([*command, "-o", str(partial)])
        partial.replace(library)  # a process that has the old one loaded keeps it
        key.write_text(shlex.join(command))


class BuildWithStubs(build_py):
    """Adds nanodeploy.v1: to what is built, or to the source tree for an editable installation."""

    def run(self) -> None:
        super().run()
        target = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("proto/nanodeploy/v1/*.proto"))
        run(
            [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto"]
            + [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
            + protos
        )
        (target / "nanodeploy" / "v1" / "__init__.py").touch()


setup(
    ext_modules=[Extension(name.removesuffix(".so").replace("/", "."), sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithStubs},
)
