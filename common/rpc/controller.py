"""A controller as its clients see it: a Protocol, and the real thing over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import NamedTuple, Protocol

from common.rpc import codec
from common.rpc.client import call, open_channel, read_stream
from common.types import WorkerInfo, WorkerLoad, WorkerState
from nanodeploy.v1 import controller_pb2 as pb
from nanodeploy.v1 import controller_pb2_grpc


class Registered(NamedTuple):
    """Terms of a membership, in seconds."""

    lease_ttl_s: float
    heartbeat_s: float


class ControllerPeer(Protocol):
    """Every method raises errors of the tree. A peer is cheap to make and connects on first use."""

    async def register(self, worker: WorkerInfo, *, timeout_s: float) -> Registered: ...

    async def heartbeat(
        self, worker_id: str, epoch: int, state: WorkerState, load: WorkerLoad, *, timeout_s: float
    ) -> bool:
        """Renew; True when somebody asked the worker to drain. NotFoundError: register again."""

    async def drain(self, worker_id: str, epoch: int, *, timeout_s: float) -> None: ...

    async def deregister(self, worker_id: str, epoch: int, *, timeout_s: float) -> None: ...

    def watch(self, watcher_id: str, *, silence_s: float) -> AsyncGenerator[codec.WatchEvent, None]:
        """A snapshot, then what follows. DeadlineExceededError after `silence_s` without a word."""

    async def close(self) -> None: ...


Connect = Callable[[str], ControllerPeer]


class GrpcController:
    """One controller at host:port."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = controller_pb2_grpc.ControllerServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def register(self, worker: WorkerInfo, *, timeout_s: float) -> Registered:
        request = pb.RegisterRequest(worker=codec.worker_to_proto(worker))
        response: pb.RegisterResponse = await call(self._stub.Register, request, timeout_s=timeout_s)
        return Registered(response.lease_ttl_ms / 1000, response.heartbeat_ms / 1000)

    async def heartbeat(
        self, worker_id: str, epoch: int, state: WorkerState, load: WorkerLoad, *, timeout_s: float
    ) -> bool:
        request = pb.HeartbeatRequest(
            worker_id=worker_id, epoch=epoch, state=codec.state_to_proto(state), load=codec.load_to_proto(load)
        )
        response: pb.HeartbeatResponse = await call(self._stub.Heartbeat, request, timeout_s=timeout_s)
        return response.draining

    async def drain(self, worker_id: str, epoch: int, *, timeout_s: float) -> None:
        request = pb.DrainRequest(worker_id=worker_id, epoch=epoch)
        await call(self._stub.Drain, request, timeout_s=timeout_s, idempotent=True)

    async def deregister(self, worker_id: str, epoch: int, *, timeout_s: float) -> None:
        request = pb.DeregisterRequest(worker_id=worker_id, epoch=epoch)
        await call(self._stub.Deregister, request, timeout_s=timeout_s, idempotent=True)

    async def watch(self, watcher_id: str, *, silence_s: float) -> AsyncGenerator[codec.WatchEvent, None]:
        stream = self._stub.Watch(pb.WatchRequest(watcher_id=watcher_id))
        async with aclosing(read_stream(stream, silence_s=silence_s)) as messages:
            async for message in messages:
                yield codec.watch_event_from_proto(message)

    async def close(self) -> None:
        await self._channel.close(None)
