"""API keys and their limits as routers and operators see them: the controllers' LimitsService, whichever answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from common.errors import DeadlineExceededError, NanoDeployError, UnavailableError
from common.rpc.client import call, open_channel
from common.rpc.codec import limits as codec
from common.types.keys import ApiKey, KeyTable, Lease, LeaseAsk
from nanodeploy.v1 import limits_pb2 as pb
from nanodeploy.v1 import limits_pb2_grpc

CALL_TIMEOUT_S: Final = 2.0


class LimitsClient:
    """Every method raises errors of the tree; `UnavailableError` when no controller answers."""

    def __init__(self, controllers: Sequence[str], admin_token: str) -> None:
        self._addresses = tuple(controllers)
        self._metadata = (("authorization", f"Bearer {admin_token}"),)
        self._channels: dict[str, Any] = {}
        self._index = 0

    async def put_keys(self, keys: Sequence[ApiKey]) -> int:
        """How many were new."""
        request = pb.PutKeysRequest(keys=map(codec.api_key_to_proto, keys))
        response = await self._call(lambda stub: stub.PutKeys, request)
        return int(response.added)

    async def list_keys(self, incarnation: str = "", revision: int = 0) -> KeyTable:
        request = pb.ListKeysRequest(incarnation=incarnation, revision=revision)
        response = await self._call(lambda stub: stub.ListKeys, request)
        keys = None if response.current else tuple(map(codec.api_key_from_proto, response.keys))
        return KeyTable(response.incarnation, response.revision, keys)

    async def revoke_key(self, key_id: str) -> ApiKey:
        response = await self._call(lambda stub: stub.RevokeKey, pb.RevokeKeyRequest(key_id=key_id))
        return codec.api_key_from_proto(response.key)

    async def lease(self, router_id: str, asks: Sequence[LeaseAsk], *, number: int = 0, oldest: int = 0) -> list[Lease]:
        """Heard again under its `number`, it counts once. `oldest`: number that no answer has come to."""
        wanted = map(codec.ask_to_proto, asks)
        request = pb.LeaseLimitsRequest(router_id=router_id, asks=wanted, number=number, oldest=oldest)
        response = await self._call(lambda stub: stub.LeaseLimits, request)
        return [codec.lease_from_proto(lease, response.num_routers) for lease in response.leases]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    async def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        last: NanoDeployError = UnavailableError("no controller is configured")
        for _ in self._addresses:
            address = self._addresses[self._index]
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = open_channel(address)
            stub = limits_pb2_grpc.LimitsServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                return await call(method(stub), request, timeout_s=CALL_TIMEOUT_S, metadata=self._metadata)
            except UnavailableError as error:
                last = error
                self._index = (self._index + 1) % len(self._addresses)
            except DeadlineExceededError as error:
                self._index = (self._index + 1) % len(self._addresses)
                raise UnavailableError(f"the controller at {address} is silent") from error
        raise last
