"""API keys and what they may spend, in Redis. Controllers on one storage hand out slices of the same buckets."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from common.errors import InvalidRequestError, NotFoundError, OverloadedError
from common.types.keys import ApiKey, Grant, KeyTable, Lease, LeaseAsk
from services.controller import limit_scripts as scripts
from services.controller.store import Store

MAX_KEYS: Final = 100_000
_KEY_ID = re.compile(r"[0-9a-f]{4,64}")


class Limits:
    def __init__(self, store: Store) -> None:
        self._prefix = store.prefix("limits")
        self._keys = [self._prefix + name for name in scripts.KEY_NAMES]
        self._put = store.script(scripts.PUT)
        self._list = store.script(scripts.LIST)
        self._revoke = store.script(scripts.REVOKE)
        self._lease = store.script(scripts.LEASE)

    async def put(self, keys: Sequence[ApiKey]) -> int:
        """Adds those that are not there and returns how many; of the others keeps a revocation and a higher use."""
        rows: list[object] = []
        for key in keys:
            record = msgspec.json.encode(_plain(key))
            rows += [key.key_hash, record, key.used_tokens, int(key.revoked)]
        added = int(await self._run(self._put, MAX_KEYS, *rows))
        if added < 0:
            raise OverloadedError(f"there are {MAX_KEYS} API keys, which is the limit")
        return added

    async def table(self, incarnation: str, revision: int) -> KeyTable:
        found, at, current, *rows = await self._run(self._list, incarnation, revision)
        return KeyTable(found.decode(), int(at), None if current else tuple(_key(*row) for row in rows))

    async def revoke(self, key_id: str) -> ApiKey:
        if _KEY_ID.fullmatch(key_id) is None:
            raise InvalidRequestError("key_id must be 4 to 64 hexadecimal digits", param="key_id")
        count, *row = await self._run(self._revoke, key_id)
        if count != 1:
            many = f"{count} API keys begin" if count else "no API key begins"
            raise NotFoundError(f"{many} with {key_id}", param="key_id")
        return _key(*row)

    async def lease(
        self, router_id: str, asks: Sequence[LeaseAsk], number: int, oldest: int
    ) -> tuple[list[Lease], int]:
        """One for each ask of a key that is there and good; and how many routers have asked lately."""
        rows: list[object] = []
        for ask in asks:
            wants = (
                n for want in (ask.requests, ask.tokens, ask.quota) for n in (want.need, want.want, want.give_back)
            )
            rows += [ask.key_hash, *wants, ask.spent_tokens]
        keys = [*self._keys, f"{self._prefix}answers:{router_id}"]
        num_routers, *found = await self._lease(keys, [secrets.token_hex(8), router_id, number, oldest, *rows])
        return [_lease(row, num_routers) for row in found], num_routers

    async def _run(self, script: Any, *args: object) -> Any:
        return await script(self._keys, [secrets.token_hex(8), *args])


def _plain(key: ApiKey) -> ApiKey:
    """What never changes of it."""
    return msgspec.structs.replace(key, used_tokens=0, revoked=False)


def _key(record: bytes, used: bytes, revoked: int) -> ApiKey:
    key = msgspec.json.decode(record, type=ApiKey)
    return msgspec.structs.replace(key, used_tokens=int(used), revoked=bool(revoked))


def _lease(row: Sequence[Any], num_routers: int) -> Lease:
    hashed, *numbers = row
    requests, tokens, quota = (Grant(*numbers[i : i + 3]) for i in (0, 3, 6))
    return Lease(hashed.decode(), requests, tokens, quota, num_routers)
