"""KV from GPU to GPU by number of blocks: moved, moved and verified, and what a step beside it loses.

Two processes, the owner on the first GPU and the reader on the last (with one GPU both on it). Blocks are those of
Qwen3-8B in bf16: [36 layers, 2 parts, 8 units, 64 tokens, 256 bytes] = 9.4 MB, 8 digests each; 64 of them are the KV of
a prompt of 4096 tokens. The clock runs from `read`, with pieces and checks as Python objects, to the result in hand;
figures are medians. `step` is a memory-bound product on the reader's main stream, alone and while reads follow each
other without a pause.

    python benchmarks/kv_transfer_gpu.py     # less than a minute; writes benchmarks/results/kv_transfer_gpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import select
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from common.config.schema import UcxConfig  # noqa: E402
from common.kvcache.layout import FULL_GROUP, GroupSpec, KVLayout, RegionSpec, Retention, Sharding  # noqa: E402
from common.kvcache.pool import GUARD_NBYTES, KVPool  # noqa: E402
from common.kvtransfer.device import DeviceTransport, over_ucx  # noqa: E402
from common.kvtransfer.device_digests import DeviceDigests  # noqa: E402
from common.kvtransfer.orders import OrderExtent  # noqa: E402
from common.kvtransfer.plan import block_checks, plan_extent  # noqa: E402
from common.kvtransfer.transport import ReadResult, ReadStatus  # noqa: E402
from common.kvtransfer.ucx import UcxTransport  # noqa: E402

TOKENS = 64
BLOCKS = (1, 4, 16, 64)
READ_S, OWNER_S = 20, 60
LIMIT_GBPS = 396  # a copy over NVLink 4, 256 MiB
RESULT = ROOT / "benchmarks" / "results" / "kv_transfer_gpu.json"


class Row(msgspec.Struct):
    blocks: int
    placed: str  # of the reader's blocks: in a row, or anywhere
    moved_gbps: float  # without digests, the time that the transport counts
    read_gbps: float  # without digests, from `read` to the result in hand
    verified_gbps: float
    verified_ms: float
    publish_ms: float  # the owner's digests, from their checks to the numbers
    plan_ms: float  # of the reader's Python


class End:
    """A pool and its transport."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.layout, self.device = layout, device
        self.pool = KVPool(layout, None, device)
        self.base = self.pool.bases()[FULL_GROUP]
        self.inner = UcxTransport(UcxConfig(), device.index)
        self.transport: DeviceTransport = over_ucx(self.inner, device)
        guard = self.pool.guards()[FULL_GROUP]
        self.transport.register(FULL_GROUP, self.base, self.pool.nbytes(FULL_GROUP), guard, GUARD_NBYTES)


def make_layout(num_blocks: int) -> KVLayout:
    full = GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=TOKENS, num_blocks=num_blocks)
    kv = RegionSpec(
        name="kv",
        group=FULL_GROUP,
        dtype="bfloat16",
        num_layers=36,
        num_parts=2,
        num_units=8,
        width=128,
        sharding=Sharding.SPLIT,
    )
    return KVLayout(model_hash=b"m" * 16, groups=(full,), regions=(kv,))


def own(pipe: Connection, layout: KVLayout, device: int) -> None:
    """The owner: random blocks, and their digests as often as they are asked for."""
    end = End(layout, torch.device("cuda", device))
    end.pool.region("kv").normal_()
    torch.cuda.synchronize()
    digests = DeviceDigests(end.device)
    pipe.send(end.transport.endpoint())
    while (count := pipe.recv()) is not None:
        checks = [c for b in range(count) for c in block_checks(layout, FULL_GROUP, end.base, b, b * TOKENS, TOKENS)]
        began = time.perf_counter()
        values = digests.launch(checks).values()
        pipe.send((tuple(values), time.perf_counter() - began))
    end.transport.close()


def heard(pipe: Connection) -> Any:
    if not pipe.poll(OWNER_S):
        raise SystemExit(f"the owner has said nothing for {OWNER_S} s")
    return pipe.recv()


def wait(transport: DeviceTransport) -> list[ReadResult]:
    wakeup = select.poll()
    wakeup.register(transport.wakeup_fd, select.POLLIN)
    while not (events := transport.poll()):
        if not wakeup.poll(1000 * READ_S):
            raise SystemExit(f"a read has not ended within {READ_S} s")
    results = [e for e in events if isinstance(e, ReadResult) and e.status is ReadStatus.OK]
    if len(results) != len(events):
        raise SystemExit(f"a read failed: {events}")
    return results


def extent_of(digests: tuple[int, ...], count: int) -> OrderExtent:
    return OrderExtent(
        order_id=1,
        lease_id=1,
        group=FULL_GROUP,
        start_position=0,
        num_tokens=count * TOKENS,
        block_ids=tuple(range(count)),
        prefix_hash=b"",
        digests=digests,
    )


def measure(end: End, pipe: Connection, peer: int, count: int, placed: str, repetitions: int) -> Row:
    places = list(range(count)) if placed == "in a row" else torch.randperm(max(BLOCKS))[:count].tolist()
    nbytes = count * end.layout.block_nbytes(FULL_GROUP)
    moved, read, verified, published, planned = [], [], [], [], []
    for _ in range(repetitions):
        pipe.send(count)
        digests, seconds = heard(pipe)
        published.append(seconds)
        began = time.perf_counter()
        plan = plan_extent(end.layout, end.layout, extent_of(digests, count), places, end.base, count * TOKENS)
        planned.append(time.perf_counter() - began)
        for checks, into in (((), read), (plan.checks, verified)):
            began = time.perf_counter()
            end.transport.read(peer, 1, plan.pieces, checks)
            (result,) = wait(end.transport)
            into.append(time.perf_counter() - began)
            moved.append(result.read_seconds)
    move, plain, whole, publish, plan_s = (statistics.median(x) for x in (moved, read, verified, published, planned))
    gbps = [nbytes / seconds / 1e9 for seconds in (move, plain, whole)]
    return Row(count, placed, *gbps, whole * 1e3, publish * 1e3, plan_s * 1e3)


def step_beside(end: End, pipe: Connection, peer: int) -> dict[str, float]:
    """Milliseconds of a step of 4 GiB of weights, alone and with a prompt's KV arriving all the time."""
    weights = torch.randn(1 << 31, device=end.device, dtype=torch.bfloat16).view(-1, 8192)
    x = torch.randn(8192, device=end.device, dtype=torch.bfloat16)
    pipe.send(max(BLOCKS))
    digests, _ = heard(pipe)
    count = max(BLOCKS)
    plan = plan_extent(end.layout, end.layout, extent_of(digests, count), list(range(count)), end.base, count * TOKENS)

    def steps(*, reading: bool) -> list[float]:
        times: list[float] = []
        reads, ids = 0, itertools.count(1)
        for _ in range(60):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in "be")
            began.record()
            torch.mv(weights, x)
            ended.record()
            while not ended.query():
                if reading:
                    for result in end.transport.poll():
                        assert isinstance(result, ReadResult)
                        assert result.status is ReadStatus.OK, result
                        reads -= 1
                    while reads < 2:
                        end.transport.read(peer, next(ids), plan.pieces, plan.checks)
                        reads += 1
            times.append(began.elapsed_time(ended))
        while reads:
            reads -= len(wait(end.transport))
        return sorted(times[5:])

    alone, beside = steps(reading=False), steps(reading=True)
    return {
        "alone_ms": statistics.median(alone),
        "beside_ms": statistics.median(beside),
        "beside_worst_ms": beside[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    about = report.environment("torch", gpus=torch.cuda.device_count(), gpu=torch.cuda.get_device_name(0))
    layout = make_layout(max(BLOCKS))
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs, layout, 0), daemon=True)
    owner.start()
    theirs.close()
    end = End(layout, torch.device("cuda", torch.cuda.device_count() - 1))
    peer = end.transport.connect(heard(pipe))
    measure(end, pipe, peer, 4, "anywhere", 3)  # compiles, maps
    rows = [measure(end, pipe, peer, n, p, arguments.repetitions) for n in BLOCKS for p in ("in a row", "anywhere")]
    step = step_beside(end, pipe, peer)
    over = end.transport.describe(peer)
    print(f"{over}, {about['gpus']} x {about['gpu']}; a copy over NVLink: {LIMIT_GBPS} GB/s")
    print("blocks  placed     moved GB/s  read GB/s  verified GB/s       ms  digest ms (owner)  plan ms")
    for r in rows:
        print(
            f"{r.blocks:6d}  {r.placed:9s}  {r.moved_gbps:9.1f}  {r.read_gbps:9.1f}  {r.verified_gbps:13.1f}"
            f"  {r.verified_ms:7.3f}  {r.publish_ms:17.3f}  {r.plan_ms:7.3f}"
        )
    print("a step: " + ", ".join(f"{name} {value:.3f}" for name, value in step.items()))
    content = {"environment": about, "over": over, "rows": [msgspec.structs.asdict(r) for r in rows], "step": step}
    RESULT.write_text(json.dumps(content, indent=2) + "\n")
    pipe.send(None)
    owner.join(10)
    end.transport.close()


if __name__ == "__main__":
    main()
