"""Does KV move from GPU to GPU between two processes of this machine, over what, and how fast?

`python -m common.kvtransfer.gpu_check UCX_CONFIG_JSON` reads blocks of a child's on the first GPU into the last one's
(they may be the same), verifies them, and prints one line of JSON. For `nanodeploy doctor`, which has no torch.
"""

from __future__ import annotations

import multiprocessing as mp
import select
import sys
import time
from multiprocessing.connection import Connection

import msgspec
import torch

from common.config.schema import UcxConfig
from common.errors import KVTransferError, NanoDeployError
from common.kvcache.layout import FULL_GROUP, GroupSpec, KVLayout, RegionSpec, Retention, Sharding
from common.kvcache.pool import GUARD_NBYTES, KVPool
from common.kvtransfer.device import DeviceTransport, over_ucx
from common.kvtransfer.device_digests import DeviceDigests
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import block_checks, plan_extent
from common.kvtransfer.transport import Endpoint, PeerDown, ReadStatus
from common.kvtransfer.ucx import UcxTransport

NUM_BLOCKS, BLOCK_SIZE = 32, 64
NUM_READS = 8
LIMIT_S = 30.0


class Checked(msgspec.Struct, frozen=True):
    """GB/s of the fastest read. `error` says why there is none."""

    over: str = ""
    gpus: int = 0
    nbytes: int = 0
    moved_gbps: float = 0.0
    verified_gbps: float = 0.0
    error: str = ""


def _layout() -> KVLayout:
    group = GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    region = RegionSpec(
        name="kv",
        group=FULL_GROUP,
        dtype="bfloat16",
        num_layers=32,
        num_parts=2,
        num_units=8,
        width=128,
        sharding=Sharding.REPLICATED,
    )
    return KVLayout(model_hash=bytes(16), groups=(group,), regions=(region,))


def _open(config: UcxConfig, device: torch.device) -> tuple[KVPool, DeviceTransport]:
    torch.cuda.set_device(device)
    pool = KVPool(_layout(), None, device)
    transport = over_ucx(UcxTransport(config, device.index), device)
    base, guard = pool.bases()[FULL_GROUP], pool.guards()[FULL_GROUP]
    transport.register(FULL_GROUP, base, pool.nbytes(FULL_GROUP), guard, GUARD_NBYTES)
    return pool, transport


def _own(pipe: Connection, config: UcxConfig) -> None:
    """The child: random blocks and their digests, kept until the pipe closes."""
    device = torch.device("cuda", 0)
    pool, transport = _open(config, device)
    pool.region("kv").normal_()
    base = pool.bases()[FULL_GROUP]
    checks = [
        check
        for b in range(NUM_BLOCKS)
        for check in block_checks(pool.layout, FULL_GROUP, base, b, b * BLOCK_SIZE, BLOCK_SIZE)
    ]
    pipe.send((transport.endpoint(), tuple(DeviceDigests(device).launch(checks).values())))
    pipe.poll(4 * LIMIT_S)
    transport.close()


def check(config: UcxConfig) -> Checked:
    """Raises `KVTransferError` if no verified read comes about."""
    gpus = torch.cuda.device_count()
    if not gpus:
        raise KVTransferError("torch finds no GPU")
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=_own, args=(theirs, config), daemon=True).start()
    theirs.close()
    pool, transport = _open(config, torch.device("cuda", gpus - 1))
    try:
        if not pipe.poll(2 * LIMIT_S):
            raise KVTransferError("the process to read from did not answer")
        endpoint, digests = pipe.recv()
        return _read(pool, transport, endpoint, digests, gpus)
    except EOFError:
        raise KVTransferError("the process to read from ended") from None
    finally:
        transport.close()


def _read(pool: KVPool, transport: DeviceTransport, endpoint: Endpoint, digests: tuple[int, ...], gpus: int) -> Checked:
    extent = OrderExtent(
        order_id=1,
        lease_id=1,
        group=FULL_GROUP,
        start_position=0,
        num_tokens=NUM_BLOCKS * BLOCK_SIZE,
        block_ids=tuple(range(NUM_BLOCKS)),
        prefix_hash=b"",
        digests=digests,
    )
    base, layout = pool.bases()[FULL_GROUP], pool.layout
    plan = plan_extent(layout, layout, extent, list(range(NUM_BLOCKS)), base, extent.num_tokens)
    peer = transport.connect(endpoint)
    wakeup = select.poll()
    wakeup.register(transport.wakeup_fd, select.POLLIN)
    moved, verified, nbytes = [], [], 0
    for read_id in range(NUM_READS):
        transport.read(peer, read_id, plan.pieces, plan.checks)
        deadline = time.monotonic() + LIMIT_S
        while not (events := transport.poll()):
            if not wakeup.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise KVTransferError("a read did not end in time")
        result = events[0]
        if isinstance(result, PeerDown) or result.status is not ReadStatus.OK:
            raise KVTransferError(f"{type(result).__name__}: {result.message}")
        nbytes = result.nbytes
        moved.append(nbytes / result.read_seconds / 1e9)
        verified.append(nbytes / result.seconds / 1e9)
    return Checked(transport.describe(peer), gpus, nbytes, max(moved), max(verified))


def main() -> None:
    try:
        found = check(UcxConfig.model_validate_json(sys.argv[1]))
    except NanoDeployError as error:
        found = Checked(error=error.message)
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
