"""LimitsService: from protobuf to keys and limits and back, for callers who show the admin token."""

from __future__ import annotations

from typing import Any

import grpc

from common.errors import UnauthenticatedError
from common.rpc.codec import checks
from common.rpc.codec import limits as codec
from nanodeploy.v1 import limits_pb2 as pb
from nanodeploy.v1 import limits_pb2_grpc
from services.controller.admin import require_admin
from services.controller.limits import Limits

SERVICE = pb.DESCRIPTOR.services_by_name["LimitsService"].full_name


class LimitsServicer(limits_pb2_grpc.LimitsServiceServicer):
    def __init__(self, admin_token: str, limits: Limits) -> None:
        self._admin_token = admin_token
        self._limits = limits

    def add_to(self, server: grpc.aio.Server) -> None:
        limits_pb2_grpc.add_LimitsServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    def _admit(self, context: Any) -> None:
        if not self._admin_token:
            raise UnauthenticatedError("API keys are not managed here: the controller has no admin_token")
        require_admin(self._admin_token, context)

    async def PutKeys(self, request: pb.PutKeysRequest, context: Any) -> pb.PutKeysResponse:
        self._admit(context)
        return pb.PutKeysResponse(added=await self._limits.put([codec.api_key_from_proto(key) for key in request.keys]))

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        self._admit(context)
        table = await self._limits.table(request.incarnation, request.revision)
        keys = map(codec.api_key_to_proto, table.keys or ())
        return pb.ListKeysResponse(
            incarnation=table.incarnation, revision=table.revision, current=table.keys is None, keys=keys
        )

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        self._admit(context)
        return pb.RevokeKeyResponse(key=codec.api_key_to_proto(await self._limits.revoke(request.key_id)))

    async def LeaseLimits(self, request: pb.LeaseLimitsRequest, context: Any) -> pb.LeaseLimitsResponse:
        self._admit(context)
        router_id = checks.identifier(request.router_id, "router_id")
        asks = [codec.ask_from_proto(ask) for ask in request.asks]
        leases, num_routers = await self._limits.lease(router_id, asks, request.number, request.oldest)
        return pb.LeaseLimitsResponse(leases=map(codec.lease_to_proto, leases), num_routers=num_routers)
