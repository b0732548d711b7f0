"""Ranks beside the first: how they start, and the process of one.

    rank 0: start_ranks -> each rank: RankSetup -> mesh -> its part of the model and cache -> meet -> orders ... -> end

A rank's process, `python -m common.engine.rank STEPS_FD READS_FD PARENT_PID`, ends with the engine process that started
it. It has no scheduler and no requests; what it is told to run is all that it knows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch._C._distributed_c10d import Store

from common.config import EngineConfig, LogConfig, WorkerConfig
from common.engine.compute import digest_launcher, make_compute
from common.engine.rank_drafts import DraftFollower
from common.engine.rank_runner import RankLoop
from common.errors import ConfigError
from common.kernels.late import late_kernels
from common.kvtransfer.publish import part_checks
from common.kvtransfer.rank_reads import ReadsLoop
from common.kvtransfer.reads import RankReads
from common.kvtransfer.transport import Endpoint, Transport
from common.parallel.lifeline import die_with_parent
from common.parallel.link import Link, LinkClosedError
from common.parallel.mesh import Mesh, join
from common.parallel.ranks import FAILED, Rank, RankBody, Ranks
from common.parallel.store import Rendezvous, file_store
from common.telemetry import configure_logging, get_logger
from common.types import Clock, MonotonicClock, Role

log = get_logger(__name__)

SETUP = 1
LINK_S = 60.0  # for rank 0 to take what a rank says
KILL_S = 10.0  # from SIGKILL to a rank's end: a driver takes its time to free a GPU


class RankSetup(msgspec.Struct, frozen=True):
    """First frame to a new rank. `worker_json`: the config, resolved. `store`: path of the file where ranks meet."""

    rank: int
    role: str
    worker_json: bytes
    log_json: bytes
    store: str


class RankStarter(Protocol):
    """What ranks run in."""

    def store(self, size: int) -> Store: ...

    def start(self, setup: RankSetup, steps: socket.socket, reads: socket.socket) -> RankBody:
        """The sockets are the rank's ends, for steps and for reads of KV; whoever starts it closes them."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Fleet:
    """The ranks of one engine, seen from rank 0."""

    mesh: Mesh
    ranks: Ranks
    starter: RankStarter

    def meet(self, endpoint: Endpoint) -> tuple[Endpoint, ...]:
        """All ranks have made their part: how to reach the memory of each. Raises if one could not."""
        return _meet(self.mesh, endpoint)

    @property
    def reads(self) -> list[Link]:
        return [rank.reads for rank in self.ranks.ranks]

    def abort(self) -> None:
        """From another thread: end what waits for a rank that is lost, where that can be ended."""
        if self.mesh.collectives is not None:
            self.mesh.collectives.abort()

    def close(self) -> None:
        self.ranks.close()
        self.abort()  # nobody is left to compute with
        self.mesh.close()
        self.starter.close()


def rank_device(engine: EngineConfig, rank: int) -> torch.device:
    """Where a rank computes; `engine` is resolved. ConfigError where torch cannot."""
    if engine.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is cuda; torch {torch.__version__} finds no GPU here: install a torch for CUDA, or say cpu",
            param="device",
        )
    index = engine.devices[rank] if engine.devices else rank
    if index >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"rank {rank} computes on GPU {index}; torch finds {found}", param="devices")
    return torch.device("cuda", index)


def _meet(mesh: Mesh, endpoint: Endpoint) -> tuple[Endpoint, ...]:
    assert mesh.meeting is not None
    return tuple(msgspec.convert(found, Endpoint) for found in mesh.meeting.share(endpoint))


def start_ranks(config: WorkerConfig, role: Role, starter: RankStarter) -> Fleet:
    """Start all ranks but the first, and meet them."""
    engine = config.engine
    size, ranks, store = engine.tensor_parallel_size, [], starter.store(engine.tensor_parallel_size)
    for number in range(1, size):
        setup = RankSetup(
            rank=number,
            role=role.value,
            worker_json=config.model_dump_json().encode(),
            log_json=LogConfig(level="warning").model_dump_json().encode(),
            store=starter.path if isinstance(starter, ProcessRanks) else "",
        )
        steps, their_steps = socket.socketpair()
        reads, their_reads = socket.socketpair()
        with their_steps, their_reads:
            body = starter.start(setup, their_steps, their_reads)
        link = Link(steps, engine.hang_timeout_s)
        link.send(SETUP, msgspec.msgpack.encode(setup))
        ranks.append(Rank(number, link, Link(reads, engine.hang_timeout_s), body))
    started = Ranks(ranks, engine.hang_timeout_s)
    try:
        meeting = Rendezvous(store, 0, size, started.check)
        meeting.share(os.getpid())
        mesh = join(meeting, 0, size, rank_device(engine, 0), engine.hang_timeout_s)
    except BaseException:
        started.close()
        starter.close()
        raise
    fleet = Fleet(mesh, started, starter)
    started.on_lost = fleet.abort
    return fleet


def serve_rank(
    setup: RankSetup, link: Link, reads: Link, store: Store, clock: Clock, transport: Transport | None = None
) -> None:
    """The life of a rank, in a process or a thread. Says on the link why it ended, if not because it was told to."""
    config = WorkerConfig.model_validate_json(setup.worker_json)
    with contextlib.ExitStack() as stack:
        stack.callback(reads.close)
        try:
            _serve(setup, config, link, reads, store, clock, transport, stack)
        except LinkClosedError:
            pass  # rank 0 has ended, or is about to
        except Exception as error:  # the edge of the rank: rank 0 is told, and ends the engine
            log.exception("rank failed", rank=setup.rank)
            with contextlib.suppress(LinkClosedError):
                link.send(FAILED, f"{type(error).__name__}: {error}".encode())


def _serve(
    setup: RankSetup,
    config: WorkerConfig,
    link: Link,
    reads: Link,
    store: Store,
    clock: Clock,
    transport: Transport | None,
    stack: contextlib.ExitStack,
) -> None:
    engine, role = config.engine, Role(setup.role)
    if engine.num_threads:
        torch.set_num_threads(engine.num_threads)
    size, device = engine.tensor_parallel_size, rank_device(engine, setup.rank)
    meeting = Rendezvous(store, setup.rank, size)
    meeting.share(os.getpid())
    mesh = join(meeting, setup.rank, size, device, engine.hang_timeout_s)
    stack.callback(mesh.close)
    compute = make_compute(config, role, mesh, clock, transport=transport)
    stack.callback(compute.forget_steps)
    stack.callback(compute.transport.close)
    layout, bases = compute.layout, compute.bases
    drafts = DraftFollower(compute.draft_runner) if compute.draft_runner is not None else None
    loop = RankLoop(
        compute.runner, link, lambda part: part_checks(layout, bases, part), digest_launcher(device), drafts
    )
    reading = ReadsLoop(RankReads(layout, bases, compute.transport), reads, loop.await_orders, lambda: _use(device))
    _meet(mesh, compute.transport.endpoint())
    reading.start()
    stack.callback(reading.close)
    late_kernels.watch()
    loop.serve()


def _use(device: torch.device) -> None:
    """In a thread of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class ProcessRanks:
    """Each rank in a child process. All are started by one thread that is there until `close`: a child ends with the
    thread that started it (`die_with_parent`), and the caller's own may end long before its process.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "rank-starter")
        self._folder = Path(tempfile.mkdtemp(prefix="nanodeploy-ranks-"))
        self.path = str(self._folder / "store")

    def store(self, size: int) -> Store:
        return file_store(self.path, size)

    def start(self, setup: RankSetup, steps: socket.socket, reads: socket.socket) -> RankBody:
        fds = [steps.fileno(), reads.fileno()]
        command = [sys.executable, "-m", "common.engine.rank", *map(str, fds), str(os.getpid())]
        starting = self._thread.submit(subprocess.Popen, command, pass_fds=fds, stdin=subprocess.DEVNULL)
        return _Child(starting.result())

    def close(self) -> None:
        self._thread.shutdown(wait=False)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def end(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            try:
                self._process.wait(KILL_S)
            except subprocess.TimeoutExpired:
                log.error("a rank's process cannot be ended", pid=self._process.pid)


def main() -> int:
    """Serve the engine process that started this one."""
    steps, reads, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    link, reads_link = (Link(socket.socket(fileno=fd), LINK_S) for fd in (steps, reads))
    kind, payload = link.receive()
    assert kind == SETUP
    setup = msgspec.msgpack.decode(payload, type=RankSetup)
    configure_logging(LogConfig.model_validate_json(setup.log_json), f"{setup.role}-rank{setup.rank}")
    config = WorkerConfig.model_validate_json(setup.worker_json)
    store = file_store(setup.store, config.engine.tensor_parallel_size)
    serve_rank(setup, link, reads_link, store, MonotonicClock())
    link.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
