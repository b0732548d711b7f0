"""KV transfer by size and transport, from published to verified, beside np.copyto in the same run.

Two processes on one core each: an owner that publishes blocks (its digests are timed there) and a reader
that pulls them one-sided and verifies every digest. Blocks are those of SmolLM2-135M in bf16: [30 layers,
2 parts, 3 units, 16 tokens, 128 bytes] = 360 KiB, one piece and 3 digests each. All memory is touched
beforehand. The clock runs from the call of `read`, with its pieces and checks as Python objects, to the
result in hand; figures are medians (and the best, in the JSON), and the kinds of measurement take turns so
that noise meets all of them.

    python benchmarks/kv_transfer.py [--quick]

Writes benchmarks/results/kv_transfer.json and .png.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import os
import select
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from common.config.schema import UcxConfig  # noqa: E402
from common.kernels import native  # noqa: E402
from common.kernels.native import BlockDigester, DigestGeometry  # noqa: E402
from common.kvtransfer.transport import DigestCheck, ReadPiece, ReadResult, ReadStatus  # noqa: E402
from common.kvtransfer.ucx import UcxTransport  # noqa: E402

MIB = 2**20
LAYERS, PARTS, UNITS, TOKENS, ROW = 30, 2, 3, 16, 128
RUN = TOKENS * ROW
GEOMETRY = DigestGeometry(LAYERS, PARTS, PARTS * UNITS * RUN, UNITS * RUN, ROW, ROW)
BLOCK = LAYERS * PARTS * UNITS * RUN
SIZES = (1, 4, 16, 64, 256)
LANES = {"posix": "posix,cma,self,tcp", "cma": "cma,self,tcp", "tcp": "self,tcp"}
RESULTS = ROOT / "benchmarks" / "results"
READ_S, OWNER_S = 60, 120
Bytes = NDArray[np.uint8]


class Row(msgspec.Struct, array_like=True):
    lane: str  # as the transport describes it
    mib: int
    copyto_gbps: float
    read_gbps: float  # without digests
    verified_gbps: float  # published to verified
    publish_gbps: float  # the owner's digests
    latency_ms: float
    of_copyto: float
    best_copyto_gbps: float
    best_verified_gbps: float
    repetitions: int


def bytes_at(address: int, nbytes: int) -> Bytes:
    return np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(address)), np.uint8)


def make_transport(lane: str) -> UcxTransport:
    return UcxTransport(UcxConfig(tls=LANES[lane], net_devices="lo"))


def own(pipe: Connection, lane: str, core: int, nbytes: int) -> None:
    """The owner: random blocks, and their digests as often as they are asked for."""
    os.sched_setaffinity(0, {core})
    transport = make_transport(lane)
    address = transport.allocate("full", nbytes)
    bytes_at(address, nbytes)[:] = np.random.default_rng().integers(0, 256, nbytes, dtype=np.uint8)
    digester = BlockDigester([(unit * RUN, GEOMETRY) for unit in range(UNITS)])
    pipe.send(transport.endpoint())
    while (count := pipe.recv()) is not None:
        blocks = [(address + b * BLOCK, b * TOKENS, TOKENS) for b in range(count)]
        began = time.perf_counter()
        digests = digester.digest(blocks)
        pipe.send((digests, time.perf_counter() - began))
    transport.close()


def heard(pipe: Connection) -> Any:
    """What the owner says next."""
    if not pipe.poll(OWNER_S):
        raise SystemExit(f"the owner has said nothing for {OWNER_S} s")
    return pipe.recv()


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def read(transport: UcxTransport, peer: int, pieces: list[ReadPiece], checks: list[DigestCheck]) -> None:
    wakeup = select.poll()
    wakeup.register(transport.wakeup_fd, select.POLLIN)
    transport.read(peer, 1, pieces, checks)
    while not (events := transport.poll()):
        if not wakeup.poll(1000 * READ_S):
            raise SystemExit(f"a read has not ended within {READ_S} s")
    result = events[0]
    if not isinstance(result, ReadResult) or result.status is not ReadStatus.OK:
        raise SystemExit(f"the read failed: {result}")


def measure(lane: str, cores: tuple[int, int], sizes: tuple[int, ...], seconds: float) -> list[Row]:
    largest = (max(sizes) * MIB // BLOCK + 1) * BLOCK
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs, lane, cores[1], largest), daemon=True)
    owner.start()
    theirs.close()
    endpoint = heard(pipe)
    transport = make_transport(lane)
    address = transport.allocate("full", largest)
    target, source = bytes_at(address, largest), np.full(largest, 3, np.uint8)
    target[:] = 1
    peer = transport.connect(endpoint)
    rows = []
    for mib in track(sizes, f"{lane:>6}", transient=True):
        num_blocks = round(mib * MIB / BLOCK)
        nbytes = num_blocks * BLOCK
        pieces = [ReadPiece("full", b * BLOCK, address + b * BLOCK, BLOCK) for b in range(num_blocks)]
        copies: list[float] = []
        reads: list[float] = []
        verified: list[float] = []
        published: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until or len(copies) < 5:
            pipe.send(num_blocks)
            digests, spent = heard(pipe)
            published.append(spent)
            checks = [check(address, b, u, digests[b * UNITS + u]) for b in range(num_blocks) for u in range(UNITS)]
            copies.append(timed(lambda n=nbytes: np.copyto(target[:n], source[:n])))  # type: ignore[misc]
            reads.append(timed(lambda p=pieces: read(transport, peer, p, [])))  # type: ignore[misc]
            target[: nbytes : BLOCK // 4] ^= 0xFF  # so that only fresh bytes verify
            verified.append(timed(lambda p=pieces, c=checks: read(transport, peer, p, c)))  # type: ignore[misc]
        copy, plain, whole, publish = (statistics.median(x) for x in (copies, reads, verified, published))
        gbps = [nbytes / t / 1e9 for t in (copy, plain, whole, publish)]
        best = [nbytes / min(times) / 1e9 for times in (copies, verified)]
        figures = (*gbps, whole * 1e3, copy / whole, *best, len(copies))
        rows.append(msgspec.convert((transport.describe(peer), mib, *figures), Row))
    pipe.send(None)
    owner.join(10)
    transport.close()
    return rows


def check(base: int, block: int, unit: int, expected: int) -> DigestCheck:
    segments = ((base + block * BLOCK + unit * RUN, block * TOKENS, TOKENS),)
    g = GEOMETRY
    strides = (g.layer_stride, g.part_stride, g.token_stride)
    return DigestCheck(segments, g.num_layers, g.num_parts, *strides, g.token_nbytes, expected)


def environment() -> dict[str, object]:
    transport = make_transport("posix")
    ucx = transport.library_version
    transport.close()
    return report.environment("numpy", digest=native.cpu_features(), ucx=ucx)


def show(rows: list[Row]) -> None:
    table = Table(title="KV transfer, GB/s (medians); verified: from published to verified")
    for name in ("transport", "MiB", "np.copyto", "read", "verified", "ms", "of copyto", "digest"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        figures = (r.copyto_gbps, r.read_gbps, r.verified_gbps, r.latency_ms)
        table.add_row(r.lane, str(r.mib), *(f"{x:.2f}" for x in figures), f"{r.of_copyto:.0%}", f"{r.publish_gbps:.1f}")
    Console().print(table)


def draw(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for lane in dict.fromkeys(r.lane for r in rows):
        mine = [r for r in rows if r.lane == lane]
        axes.plot([r.mib for r in mine], [r.verified_gbps for r in mine], marker="o", label=f"{lane}, verified")
    sizes = sorted({r.mib for r in rows})
    copy = [statistics.median(r.copyto_gbps for r in rows if r.mib == size) for size in sizes]
    axes.plot(sizes, copy, color="black", linestyle="--", marker=".", label="np.copyto")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MiB")
    axes.set_ylabel("GB/s")
    axes.set_title("KV transfer between two processes, one core each")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--lanes", nargs="+", choices=list(LANES), default=list(LANES))
    parser.add_argument("--seconds", type=float, default=3.0, help="per transport and size")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    about = environment()
    os.sched_setaffinity(0, {cores[0]})
    sizes, seconds = ((1, 4, 16), 0.3) if arguments.quick else (SIZES, arguments.seconds)
    rows = [row for lane in arguments.lanes for row in measure(lane, (cores[0], cores[-1]), sizes, seconds)]
    show(rows)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        content = {"environment": about, "rows": [msgspec.structs.asdict(row) for row in rows]}
        (RESULTS / "kv_transfer.json").write_text(json.dumps(content, indent=2) + "\n")
        draw(rows, RESULTS / "kv_transfer.png")


if __name__ == "__main__":
    main()
