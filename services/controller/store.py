"""Membership in Redis: the only module that speaks to it; other areas hand in their scripts.

A worker's life: register -> heartbeat ... -> deregister, or sweep finds its lease ended; each end is one
REMOVED change with its reason, made inside one script, so that any number of controllers may sweep.

Every operation is safe to repeat and is over within `op_timeout_s`: an unreachable or refusing server is an
`UnavailableError`. Connections come back by themselves with the next operation.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from common.errors import ConfigError, InternalError, NotFoundError, UnavailableError
from common.rpc.codec import Change, ChangeKind, LoadEntry, Snapshot
from common.telemetry import get_logger
from common.types import WorkerInfo, WorkerLoad, WorkerState
from services.controller import scripts

_log = get_logger(__name__)

MAX_CONNECTIONS = 16
TAIL_BATCH = 512
# It answers reads alone (its disk is full or broken, its replicas are away), or nothing while a script hangs.
_FOR_NOW = ("MISCONF", "NOREPLICAS", "BUSY ")


class Cursor(NamedTuple):
    """Last stream ids seen."""

    changes: str
    loads: str


class StoredSnapshot(NamedTuple):
    """All workers at a revision, and the cursor from which `tail` goes on without a gap."""

    snapshot: Snapshot
    cursor: Cursor


class Head(NamedTuple):
    incarnation: str
    revision: int


class Swept(NamedTuple):
    """`next_s`: seconds until the next lease ends, None if there is none."""

    expired: tuple[str, ...]
    next_s: float | None


class TailEntry(NamedTuple):
    """One entry of either stream; `event` is None for a change that cannot be read (another version wrote it)."""

    incarnation: str
    event: Change | LoadEntry | None


class Store:
    """Operations on one namespace. Close it when done."""

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        op_timeout_s: float = 2.0,
        new_incarnation: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self._op_timeout_s = op_timeout_s
        self._new_incarnation = new_incarnation
        self._namespace = namespace
        self._keys = {name: self.prefix("controller") + name for name in scripts.KEY_NAMES}
        self._redis = _connect(url, op_timeout_s, op_timeout_s)
        self._tail_redis: Redis | None = None
        self._url = url
        script = self._redis.register_script
        self._register = script(scripts.REGISTER)
        self._heartbeat = script(scripts.HEARTBEAT)
        self._drain = script(scripts.DRAIN)
        self._deregister = script(scripts.DEREGISTER)
        self._sweep = script(scripts.SWEEP)
        self._snapshot = script(scripts.SNAPSHOT)
        self._head = script(scripts.HEAD)

    def prefix(self, area: str) -> str:
        """What the keys of an area begin with; all share one hash tag."""
        return "{" + self._namespace + "}:" + area + ":"

    def script(self, source: str) -> Callable[[Sequence[str], Sequence[Any]], Awaitable[Any]]:
        """A script of another area, to be called with its keys and arguments; raises as all operations do."""
        registered = self._redis.register_script(source)

        async def run(keys: Sequence[str], args: Sequence[Any]) -> Any:
            return await self._guard(registered(keys=keys, args=args), self._op_timeout_s)

        return run

    async def register(self, worker: WorkerInfo, ttl_s: float) -> bool:
        """Add or update a worker; True when it took the place of another epoch of the same id."""
        ref = worker.ref
        info = msgspec.structs.replace(worker, state=WorkerState.STARTING, load=WorkerLoad())
        replaced = await self._run(
            self._register,
            ref.worker_id,
            ref.epoch,
            msgspec.json.encode(info),
            worker.state.value,
            msgspec.json.encode(worker.load),
            _ms(ttl_s),
        )
        return bool(replaced)

    async def heartbeat(self, worker_id: str, epoch: int, state: WorkerState, load: WorkerLoad, ttl_s: float) -> bool:
        """Renew a lease; True when the worker was asked to drain. NotFoundError: absent or another epoch."""
        known, draining = await self._run(
            self._heartbeat, worker_id, epoch, state.value, msgspec.json.encode(load), _ms(ttl_s)
        )
        if not known:
            raise NotFoundError(f"worker {worker_id} with this epoch is not registered", param="worker_id")
        return bool(draining)

    async def drain(self, worker_id: str, epoch: int) -> None:
        """Mark a worker as draining until it leaves; epoch 0 is any."""
        if not await self._run(self._drain, worker_id, epoch):
            raise NotFoundError(f"worker {worker_id} is not registered", param="worker_id")

    async def deregister(self, worker_id: str, epoch: int) -> bool:
        """Remove a worker; False when it was not there. Epoch 0 is any."""
        return bool(await self._run(self._deregister, worker_id, epoch))

    async def sweep(self, ttl_s: float, *, forgive: bool) -> Swept:
        """Remove workers whose lease has ended; `forgive` extends all leases to `ttl_s` first."""
        wait_ms, *expired = await self._run(self._sweep, _ms(ttl_s), int(forgive))
        return Swept(tuple(e.decode() for e in expired), None if wait_ms < 0 else wait_ms / 1000)

    async def snapshot(self) -> StoredSnapshot:
        incarnation, revision, changes_id, loads_id, *rows = await self._run(self._snapshot)
        workers = tuple(w for w in (_worker(*row) for row in rows) if w is not None)
        snapshot = Snapshot(incarnation.decode(), int(revision), workers)
        return StoredSnapshot(snapshot, Cursor(changes_id.decode(), loads_id.decode()))

    async def head(self) -> Head:
        incarnation, revision = await self._run(self._head)
        return Head(incarnation.decode(), int(revision))

    async def tail(self, cursor: Cursor, block_s: float) -> tuple[list[TailEntry], Cursor]:
        """Entries after `cursor`, changes before loads; waits up to `block_s` for the first one."""
        if self._tail_redis is None:
            self._tail_redis = _connect(self._url, self._op_timeout_s, block_s + self._op_timeout_s)
        changes, loads = self._keys["changes"], self._keys["loadlog"]
        streams: dict[Any, Any] = {changes: cursor.changes, loads: cursor.loads}
        read = self._tail_redis.xread(streams, count=TAIL_BATCH, block=_ms(block_s))
        answer: Any = await self._guard(read, block_s + self._op_timeout_s)
        found = {name.decode(): rows for name, rows in answer or ()}
        entries = [_change(fields) for _, fields in found.get(changes, ())]
        entries += [entry for _, fields in found.get(loads, ()) if (entry := _load(fields)) is not None]
        return entries, Cursor(
            found[changes][-1][0].decode() if changes in found else cursor.changes,
            found[loads][-1][0].decode() if loads in found else cursor.loads,
        )

    async def close(self) -> None:
        await self._redis.aclose()
        if self._tail_redis is not None:
            await self._tail_redis.aclose()

    async def _run(self, script: Any, *args: object) -> Any:
        call = script(keys=list(self._keys.values()), args=[self._new_incarnation(), *args])
        return await self._guard(call, self._op_timeout_s)

    async def _guard(self, call: Any, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except (ReadOnlyError, OutOfMemoryError, MasterDownError, ClusterDownError, AuthenticationError) as error:
            raise UnavailableError(f"storage refuses: {error}") from error
        except ResponseError as error:
            if str(error).startswith(_FOR_NOW):
                raise UnavailableError(f"storage refuses: {error}") from error
            raise InternalError(f"storage rejects a command: {error}") from error
        except (RedisError, OSError, TimeoutError) as error:
            raise UnavailableError(f"storage is not reachable: {error or type(error).__name__}") from error


def _connect(url: str, connect_timeout_s: float, timeout_s: float) -> Redis:
    """One immediate retry: after a server restart the pool's connections are dead and the next one is not."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=connect_timeout_s,
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=timeout_s,
            socket_keepalive=True,
            protocol=2,
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError as error:
        raise ConfigError(f"redis_url is not valid: {error}", param="controller.redis_url") from error
    return Redis.from_pool(pool)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _worker(info: bytes, state: bytes, load: bytes) -> WorkerInfo | None:
    """None for an entry that some other version wrote and this one cannot read: it must not stop the rest."""
    try:
        worker = msgspec.json.decode(info, type=WorkerInfo)
        return msgspec.structs.replace(
            worker, state=WorkerState(state.decode()), load=msgspec.json.decode(load, type=WorkerLoad)
        )
    except (msgspec.DecodeError, ValueError) as error:
        _log.error("stored worker cannot be read", error=str(error), info=info[:256].decode(errors="replace"))
        return None


def _change(fields: Mapping[bytes, bytes]) -> TailEntry:
    incarnation = fields.get(b"incarnation", b"").decode(errors="replace")
    try:
        worker = _worker(fields[b"info"], fields[b"state"], fields[b"load"])
        if worker is None:
            return TailEntry(incarnation, None)
        kind, reason = ChangeKind(fields[b"kind"].decode()), fields[b"reason"].decode()
        return TailEntry(incarnation, Change(int(fields[b"revision"]), kind, worker, reason))
    except (KeyError, ValueError):
        return TailEntry(incarnation, None)


def _load(fields: Mapping[bytes, bytes]) -> TailEntry | None:
    """None for a load that cannot be read: the next one replaces it."""
    try:
        load = msgspec.json.decode(fields[b"load"], type=WorkerLoad)
        entry = LoadEntry(fields[b"id"].decode(), int(fields[b"epoch"]), load)
        return TailEntry(fields[b"incarnation"].decode(), entry)
    except (KeyError, ValueError, msgspec.DecodeError):
        return None
