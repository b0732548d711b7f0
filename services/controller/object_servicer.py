"""ObjectService: from protobuf to the stored objects and back, nothing else."""

from __future__ import annotations

from typing import Any

import grpc

from common.rpc.codec import checks
from common.rpc.codec.objects import key_from_proto, object_to_proto
from nanodeploy.v1 import objects_pb2 as pb
from nanodeploy.v1 import objects_pb2_grpc
from services.controller.admin import require_admin
from services.controller.objects import Objects

SERVICE = pb.DESCRIPTOR.services_by_name["ObjectService"].full_name


class ObjectServicer(objects_pb2_grpc.ObjectServiceServicer):
    """With an admin token, for callers who show it: what is stored are the clients' own words."""

    def __init__(self, admin_token: str, objects: Objects) -> None:
        self._admin_token = admin_token
        self._objects = objects

    def add_to(self, server: grpc.aio.Server) -> None:
        objects_pb2_grpc.add_ObjectServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    def _admit(self, context: Any) -> None:
        if self._admin_token:
            require_admin(self._admin_token, context)

    async def PutObject(self, request: pb.PutObjectRequest, context: Any) -> pb.PutObjectResponse:
        self._admit(context)
        expected = request.expected_version if request.HasField("expected_version") else None
        stored, version = await self._objects.put(key_from_proto(request.key), request.data, request.ttl_s, expected)
        return pb.PutObjectResponse(stored=stored, version=version)

    async def GetObject(self, request: pb.GetObjectRequest, context: Any) -> pb.GetObjectResponse:
        self._admit(context)
        found = await self._objects.get(key_from_proto(request.key))
        return pb.GetObjectResponse(object=object_to_proto(found))

    async def DeleteObject(self, request: pb.DeleteObjectRequest, context: Any) -> pb.DeleteObjectResponse:
        self._admit(context)
        return pb.DeleteObjectResponse(existed=await self._objects.delete(key_from_proto(request.key)))

    async def ListObjects(self, request: pb.ListObjectsRequest, context: Any) -> pb.ListObjectsResponse:
        self._admit(context)
        found, more = await self._objects.page(key_from_proto(request.key, may_lack_id=True), request.limit)
        return pb.ListObjectsResponse(objects=map(object_to_proto, found), has_more=more)

    async def PutParts(self, request: pb.PutPartsRequest, context: Any) -> pb.PutPartsResponse:
        self._admit(context)
        key = key_from_proto(request.key)
        return pb.PutPartsResponse(
            added=await self._objects.put_parts(key, request.numbers, request.parts, request.holder)
        )

    async def GetParts(self, request: pb.GetPartsRequest, context: Any) -> pb.GetPartsResponse:
        self._admit(context)
        found, looked_at = await self._objects.get_parts(key_from_proto(request.key), list(request.numbers))
        return pb.GetPartsResponse(numbers=found.keys(), parts=found.values(), looked_at=looked_at)

    async def ListParts(self, request: pb.ListPartsRequest, context: Any) -> pb.ListPartsResponse:
        self._admit(context)
        return pb.ListPartsResponse(numbers=await self._objects.list_parts(key_from_proto(request.key)))

    async def ClaimObject(self, request: pb.ClaimObjectRequest, context: Any) -> pb.ClaimObjectResponse:
        self._admit(context)
        holder = checks.identifier(request.holder, "holder")
        held = await self._objects.claim(key_from_proto(request.key), holder, request.ttl_ms / 1000)
        return pb.ClaimObjectResponse(held=held)
