"""What an operator asks a running cluster: who is there, and what each worker says of itself.

`fetch_*`: one call over a connection of its own, one answer. Who asks again and again keeps the connections with
`WorkerChannels`; following a cluster over time is `common.rpc.membership`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import grpc
import msgspec

from common.errors import UnavailableError
from common.rpc.client import call, open_channel, read_stream
from common.rpc.codec.watch import Snapshot, watch_event_from_proto
from common.rpc.codec.worker import ref_from_proto, worker_from_proto
from common.types import WorkerInfo, WorkerRef
from nanodeploy.v1 import controller_pb2, controller_pb2_grpc, worker_pb2, worker_pb2_grpc

# The generated stubs are untyped.
_controller_stub: Any = controller_pb2_grpc.ControllerServiceStub
_worker_stub: Any = worker_pb2_grpc.WorkerServiceStub


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill worker as one decode worker sees it. `transport` is the one in use, e.g. ucx/cma."""

    ref: WorkerRef
    state: str  # connecting, ready, refused, lost
    transport: str
    detail: str
    bytes_read: int
    reads: int
    digest_mismatches: int


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerInfo
    engine_restarts: int
    peers: tuple[PeerStatus, ...]


async def fetch_snapshot(controller: str, timeout_s: float) -> Snapshot:
    """The members of the cluster now, from the controller at host:port. Raises an error of the tree."""
    async with open_channel(controller) as channel:
        stub = _controller_stub(channel)
        stream = stub.Watch(controller_pb2.WatchRequest(watcher_id="cli"), timeout=timeout_s)
        async for response in read_stream(stream, silence_s=timeout_s):
            event = watch_event_from_proto(response)
            if isinstance(event, Snapshot):
                return event
    raise UnavailableError(f"the controller at {controller} gave no snapshot")


async def fetch_status(worker: str, timeout_s: float) -> WorkerStatus:
    """What the worker at host:port says of itself. Raises an error of the tree."""
    async with open_channel(worker) as channel:
        return await _status(channel, timeout_s)


class WorkerChannels:
    """Connections to workers, kept between calls. Use as an async context manager."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> WorkerChannels:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.keep(())

    async def keep(self, addresses: Collection[str]) -> None:
        """Close the connections to all others."""
        for address in self._channels.keys() - set(addresses):
            await self._channels.pop(address).close(None)

    async def fetch_status(self, worker: str, timeout_s: float) -> WorkerStatus:
        """What the worker at host:port says of itself. Raises an error of the tree."""
        if worker not in self._channels:
            self._channels[worker] = open_channel(worker)
        return await _status(self._channels[worker], timeout_s)


async def _status(channel: grpc.aio.Channel, timeout_s: float) -> WorkerStatus:
    response: worker_pb2.GetStatusResponse = await call(
        _worker_stub(channel).GetStatus, worker_pb2.GetStatusRequest(), timeout_s=timeout_s
    )
    return WorkerStatus(
        worker=worker_from_proto(response.worker),
        engine_restarts=response.engine_restarts,
        peers=tuple(_peer_from_proto(peer) for peer in response.peers),
    )


def _peer_from_proto(peer: worker_pb2.PeerStatus) -> PeerStatus:
    return PeerStatus(
        ref=ref_from_proto(peer.peer, "peer"),
        state=peer.state,
        transport=peer.transport,
        detail=peer.detail,
        bytes_read=peer.bytes_read,
        reads=peer.reads,
        digest_mismatches=peer.digest_mismatches,
    )
