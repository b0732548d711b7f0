"""Stored objects: what routers keep for clients, in Redis, each with a time limit and all within a size limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from common.config import ControllerConfig
from common.errors import InternalError, InvalidRequestError, NotFoundError, OverloadedError
from common.rpc.codec.objects import MAX_PARTS, ObjectKey, StoredObject
from services.controller import object_scripts as scripts
from services.controller.store import Store

MAX_PART_BYTES: Final = 8 * 2**20
MAX_LISTED: Final = 100
MAX_CLAIM_S: Final = 300.0
PARTS_AT_ONCE: Final = 16
ANSWER_BYTES: Final = 8 * 2**20  # a GetParts answer is cut above it


class Objects:
    def __init__(self, config: ControllerConfig, store: Store) -> None:
        self._config = config
        self._prefix = store.prefix("objects")
        self._put = store.script(scripts.PUT)
        self._put_parts = store.script(scripts.PUT_PARTS)
        self._get = store.script(scripts.GET)
        self._delete = store.script(scripts.DELETE)
        self._claim = store.script(scripts.CLAIM)
        self._list = store.script(scripts.LIST)
        self._get_parts = store.script(scripts.GET_PARTS)
        self._list_parts = store.script(scripts.LIST_PARTS)

    async def put(self, key: ObjectKey, data: bytes, ttl_s: int, expected: int | None) -> tuple[bool, int]:
        """Whether it was stored, and the version that is there now."""
        longest = self._config.max_object_ttl_s
        if ttl_s > longest:
            raise InvalidRequestError(f"ttl_s must be at most {longest}, got {ttl_s}", param="ttl_s")
        wanted = -1 if expected is None else expected
        code, version = await self._run(self._put, key, data, ttl_s * 1000, wanted, *self._limits)
        self._check(code, key)
        return code == 1, version

    async def get(self, key: ObjectKey) -> StoredObject:
        found = await self._run(self._get, key)
        if found is None:
            raise _missing(key)
        return _stored([key.id.encode(), *found])

    async def delete(self, key: ObjectKey) -> bool:
        return bool(await self._run(self._delete, key))

    async def page(self, key: ObjectKey, limit: int) -> tuple[list[StoredObject], bool]:
        """Newest first, after `key.id`; and whether there are more."""
        limit = min(max(limit, 1), MAX_LISTED)
        group = f"{key.kind}:{key.owner}"
        before = f"{self._prefix}o:{group}:"
        found = await self._list(self._keys(key), [group, key.id, limit, before])
        if found == -1:
            raise _missing(key)
        more, *rows = found
        return [_stored(row) for row in rows], bool(more)

    async def put_parts(self, key: ObjectKey, numbers: Sequence[int], parts: Sequence[bytes], holder: str) -> int:
        """How many were new: one that is there stays as it is."""
        if len(numbers) != len(parts) or any(number >= MAX_PARTS for number in numbers):
            raise InvalidRequestError(f"numbers must be one for each part, below {MAX_PARTS}", param="numbers")
        if any(len(part) > MAX_PART_BYTES for part in parts):
            raise InvalidRequestError(f"a part must be at most {MAX_PART_BYTES} bytes", param="parts")
        rows = [value for pair in zip(numbers, parts, strict=True) for value in pair]
        code = int(await self._run(self._put_parts, key, holder, *self._limits, *rows))
        self._check(code, key)
        return code

    async def get_parts(self, key: ObjectKey, numbers: Sequence[int]) -> tuple[dict[int, bytes], int]:
        """Those that are there, and how many of `numbers` were looked at before the answer got large."""
        found: dict[int, bytes] = {}
        looked_at = size = 0
        while looked_at < len(numbers) and size < ANSWER_BYTES:
            some = numbers[looked_at : looked_at + PARTS_AT_ONCE]
            parts = await self._run(self._get_parts, key, *some)
            found.update((number, part) for number, part in zip(some, parts, strict=True) if part is not None)
            size = sum(map(len, found.values()))
            looked_at += len(some)
        return found, looked_at

    async def list_parts(self, key: ObjectKey) -> list[int]:
        return sorted(map(int, await self._run(self._list_parts, key)))

    async def claim(self, key: ObjectKey, holder: str, ttl_s: float) -> bool:
        code = await self._run(self._claim, key, holder, round(min(ttl_s, MAX_CLAIM_S) * 1000))
        self._check(code, key)
        return bool(code == 1)

    # -- parts --

    @property
    def _limits(self) -> tuple[int, int]:
        return self._config.max_object_bytes, self._config.max_stored_bytes

    def _keys(self, key: ObjectKey) -> list[str]:
        name = f"{key.kind}:{key.owner}:{key.id}"
        own = [f"o:{name}", f"p:{name}", f"list:{key.kind}:{key.owner}"]
        return [self._prefix + part for part in (*own, "ends", "sizes", "totals")]

    async def _run(self, script: Any, key: ObjectKey, *args: object) -> Any:
        return await script(self._keys(key), [f"{key.kind}:{key.owner}:{key.id}", key.id, *args])

    def _check(self, code: int, key: ObjectKey) -> None:
        if code >= 0:
            return
        if code == -1:
            raise _missing(key)
        if code == -2:
            raise InvalidRequestError(
                f"a stored object must be at most {self._config.max_object_bytes} bytes", param="data"
            )
        if code == -3:
            raise OverloadedError("the storage for responses, files and batches is full")
        if code == -4:
            raise OverloadedError("somebody else holds this object now")
        raise InternalError(f"storage script answered {code}")


def _missing(key: ObjectKey) -> NotFoundError:
    return NotFoundError(f"no {key.kind} with id {key.id}", param="id")


def _stored(row: Sequence[Any]) -> StoredObject:
    id_, data, version, nbytes, num_parts, left_ms, holder = row
    return StoredObject(id_.decode(), data, version, nbytes, num_parts, left_ms / 1000, holder.decode())
