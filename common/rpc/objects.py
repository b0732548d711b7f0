"""Stored objects as a router sees them: the controllers' ObjectService, whichever of them answers.

All controllers share one storage, so a call goes to the one that answered last, and to the next when it is away or
says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from common.errors import (
    DeadlineExceededError,
    NanoDeployError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from common.rpc.client import call, open_channel
from common.rpc.codec.objects import ObjectKey, StoredObject, key_to_proto, object_from_proto
from common.telemetry import get_logger
from nanodeploy.v1 import objects_pb2 as pb
from nanodeploy.v1 import objects_pb2_grpc

_log = get_logger(__name__)

CALL_TIMEOUT_S: Final = 5.0
PARTS_PER_CALL: Final = 256
_BYTES_PER_CALL: Final = 8 * 2**20


class Written(NamedTuple):
    stored: bool  # False: another version is there
    version: int


class Page(NamedTuple):
    objects: tuple[StoredObject, ...]
    has_more: bool


class ObjectClient:
    """Every method raises errors of the tree; `UnavailableError` when no controller answers."""

    def __init__(self, controllers: Sequence[str], admin_token: str = "") -> None:
        self._channels: dict[str, Any] = {}
        self._addresses = tuple(controllers)
        self._metadata = (("authorization", f"Bearer {admin_token}"),) if admin_token else ()
        self._index = 0
        self._lost = False  # none answered the last call

    async def put(
        self, key: ObjectKey, data: bytes, *, ttl_s: float = 0.0, expected_version: int | None = None
    ) -> Written:
        """`ttl_s` 0 keeps the end of an object that exists: `NotFoundError` if none does."""
        request = pb.PutObjectRequest(
            key=key_to_proto(key), data=data, ttl_s=round(ttl_s), expected_version=expected_version
        )
        response = await self._call(lambda stub: stub.PutObject, request)
        return Written(response.stored, response.version)

    async def get(self, key: ObjectKey) -> StoredObject:
        response = await self._call(lambda stub: stub.GetObject, pb.GetObjectRequest(key=key_to_proto(key)))
        return object_from_proto(response.object)

    async def find(self, key: ObjectKey) -> StoredObject | None:
        try:
            return await self.get(key)
        except NotFoundError:
            return None

    async def delete(self, key: ObjectKey) -> bool:
        response = await self._call(lambda stub: stub.DeleteObject, pb.DeleteObjectRequest(key=key_to_proto(key)))
        return bool(response.existed)

    async def page(self, kind: str, owner: str, *, after: str = "", limit: int = 20) -> Page:
        request = pb.ListObjectsRequest(key=pb.ObjectKey(kind=kind, owner=owner, id=after), limit=limit)
        response = await self._call(lambda stub: stub.ListObjects, request)
        return Page(tuple(map(object_from_proto, response.objects)), response.has_more)

    async def put_parts(self, key: ObjectKey, parts: Mapping[int, bytes], *, holder: str = "") -> int:
        """How many were new. `OverloadedError` when `holder` is not the object's any more."""
        added, batch, size = 0, pb.PutPartsRequest(key=key_to_proto(key), holder=holder), 0
        for number, data in parts.items():
            if batch.numbers and (size + len(data) > _BYTES_PER_CALL or len(batch.numbers) == PARTS_PER_CALL):
                added += (await self._call(lambda stub: stub.PutParts, batch)).added
                batch, size = pb.PutPartsRequest(key=key_to_proto(key), holder=holder), 0
            batch.numbers.append(number)
            batch.parts.append(data)
            size += len(data)
        if batch.numbers:
            added += (await self._call(lambda stub: stub.PutParts, batch)).added
        return added

    async def get_parts(self, key: ObjectKey, numbers: Sequence[int]) -> dict[int, bytes]:
        """Those that are there, in the order asked for."""
        found: dict[int, bytes] = {}
        while numbers:
            request = pb.GetPartsRequest(key=key_to_proto(key), numbers=numbers[:PARTS_PER_CALL])
            response = await self._call(lambda stub: stub.GetParts, request)
            found.update(zip(response.numbers, response.parts, strict=True))
            numbers = numbers[max(response.looked_at, 1) :]
        return found

    async def list_parts(self, key: ObjectKey) -> list[int]:
        response = await self._call(lambda stub: stub.ListParts, pb.ListPartsRequest(key=key_to_proto(key)))
        return list(response.numbers)

    async def claim(self, key: ObjectKey, holder: str, ttl_s: float) -> bool:
        """Whether `holder` has it for `ttl_s` now. 0 gives it back."""
        request = pb.ClaimObjectRequest(key=key_to_proto(key), holder=holder, ttl_ms=round(ttl_s * 1000))
        response = await self._call(lambda stub: stub.ClaimObject, request)
        return bool(response.held)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    async def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        last: NanoDeployError | None = None
        for _ in self._addresses:
            address = self._addresses[self._index]
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = open_channel(address)
            stub = objects_pb2_grpc.ObjectServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                answer = await call(method(stub), request, timeout_s=CALL_TIMEOUT_S, metadata=self._metadata)
                self._lost = False
                return answer
            except (UnavailableError, UnauthenticatedError, DeadlineExceededError) as error:  # the last: it hangs
                last = error
                self._index = (self._index + 1) % len(self._addresses)
        if not self._lost:
            _log.warning("no controller answers", error=last.message if last else "none is configured")
        self._lost = True
        raise UnavailableError("no controller answers, which has the stored objects") from last
