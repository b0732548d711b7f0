"""A process that owns KV on a GPU for the tests of the hand-off, driven over a pipe."""

from __future__ import annotations

import multiprocessing as mp
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from kvtransfer_support import is_readable

from common.config.schema import UcxConfig
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, GroupSpec, KVLayout, RegionSpec, Retention, Sharding
from common.kvcache.pool import GUARD_NBYTES, KVPool
from common.kvtransfer.device import DeviceTransport, over_ucx
from common.kvtransfer.device_digests import DeviceDigests
from common.kvtransfer.plan import block_checks
from common.kvtransfer.transport import Endpoint, PeerDown, ReadResult
from common.kvtransfer.ucx import UcxTransport

BLOCK_SIZE = 64


def make_layout(num_blocks: int, num_layers: int = 8, num_units: int = 8) -> KVLayout:
    """Keys and values as Qwen3-8B has them at 36 layers, index keys beside them, and a tail."""
    full = GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=BLOCK_SIZE, num_blocks=num_blocks)
    tail = GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=8)

    def region(
        name: str, group: str, layers: int, parts: int, units: int, width: int, sharding: Sharding
    ) -> RegionSpec:
        return RegionSpec(
            name=name,
            group=group,
            dtype="bfloat16",
            num_layers=layers,
            num_parts=parts,
            num_units=units,
            width=width,
            sharding=sharding,
        )

    return KVLayout(
        model_hash=b"m" * 16,
        groups=(full, tail),
        regions=(
            region("kv", FULL_GROUP, num_layers, 2, num_units, 128, Sharding.SPLIT),
            region("index", FULL_GROUP, num_layers, 1, 1, 68, Sharding.REPLICATED),
            region("hidden", TAIL_GROUP, 1, 1, 1, 4096, Sharding.REPLICATED),
        ),
    )


class DeviceEnd:
    """A pool on a GPU and its transport."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.layout, self.device = layout, device
        self.pool = KVPool(layout, None, device)
        self.bases = self.pool.bases()
        self.inner = UcxTransport(UcxConfig(), device.index)
        self.transport: DeviceTransport = over_ucx(self.inner, device)
        for group, guard in self.pool.guards().items():
            self.transport.register(group, self.bases[group], self.pool.nbytes(group), guard, GUARD_NBYTES)

    def fill(self, seed: int) -> None:
        generator = torch.Generator(self.device).manual_seed(seed)
        for name in ("kv", "index", "hidden"):
            region = self.pool.region(name)
            region.copy_(torch.randn(region.shape, generator=generator, device=self.device, dtype=torch.float32))
        torch.cuda.synchronize()

    def digests(self, blocks: range) -> tuple[int, ...]:
        """Of whole blocks of the full group, one after the other: block b begins at position b * BLOCK_SIZE."""
        checks = [
            check
            for b in blocks
            for check in block_checks(self.layout, FULL_GROUP, self.bases[FULL_GROUP], b, b * BLOCK_SIZE, BLOCK_SIZE)
        ]
        return tuple(DeviceDigests(self.device).launch(checks).values())

    def wait_for(self, count: int, timeout_s: float = 20.0) -> list[ReadResult | PeerDown]:
        """The next `count` events; fewer if they do not come in time."""
        deadline = time.monotonic() + timeout_s
        events = self.transport.poll()
        while len(events) < count and (left := deadline - time.monotonic()) > 0:
            if is_readable(self.transport.wakeup_fd, left):
                events += self.transport.poll()
        return events

    def close(self) -> None:
        torch.cuda.synchronize()
        self.transport.close()


def _serve(pipe: Connection, layout: KVLayout, device: int, seed: int) -> None:
    end = DeviceEnd(layout, torch.device("cuda", device))
    end.fill(seed)
    pipe.send((end.transport.endpoint(), end.digests(range(layout.group(FULL_GROUP).num_blocks))))
    while True:
        match pipe.recv():
            case "flip", int(block):
                end.pool.region("kv")[block, -1, -1, -1, -1, -1] += 1
                torch.cuda.synchronize()
                pipe.send(None)
            case ("cpu",):
                pipe.send(time.process_time())
            case "stop":
                end.close()
                pipe.send(None)
                return


class DeviceOwner:
    """A child process with a `DeviceEnd` of random numbers."""

    def __init__(self, layout: KVLayout, device: int, seed: int) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, layout, device, seed), daemon=True)
        self.process.start()
        theirs.close()
        self.endpoint: Endpoint
        self.digests: tuple[int, ...]
        self.endpoint, self.digests = self._receive()

    def _receive(self) -> Any:
        assert self._pipe.poll(120), "the owner process did not answer"
        return self._pipe.recv()

    def call(self, *command: object) -> Any:
        self._pipe.send(command)
        return self._receive()

    def stop(self) -> None:
        if self.process.is_alive():
            self._pipe.send("stop")
            self._receive()
        self.process.join(10)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
