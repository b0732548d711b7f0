"""Tells whoever asks what the prefix cache holds, from the engine's changes.

    begin(epoch) -> take(changes) ... -> end            one engine's life
    follow: snapshot (or nothing, if the caller's digest is ours) -> batches, seq by seq -> ended with the engine

A follower that reads too slowly for `MAX_QUEUED` batches gets a new snapshot instead of what it missed: memory is
bounded by what the cache holds. Changes that change nothing, as after a log that overflowed, are left out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from common.engine.messages import KvChange, KvChanges
from common.errors import UnavailableError
from common.kvcache.layout import TAIL_GROUP, KVLayout, Retention
from common.rpc.codec.kv_events import KvBatch, KvStep
from common.types.prefix import hash_keys, keys_digest

MAX_QUEUED = 256
PART = 8192  # hashes in a part of a snapshot
SIGN_OF_LIFE_S = 5.0


class _Follower:
    def __init__(self) -> None:
        self.queue: deque[KvBatch] = deque()
        self.wants_snapshot = False
        self.woken = asyncio.Event()

    def put(self, batch: KvBatch) -> None:
        if len(self.queue) >= MAX_QUEUED:
            self.queue.clear()
            self.wants_snapshot = True
        if not self.wants_snapshot:
            self.queue.append(batch)
        self.woken.set()


class KvFeed:
    """`held` is what the cache holds of the groups that are told: group -> prefix hashes."""

    def __init__(self) -> None:
        self.epoch = 0
        self.seq = 0
        self.digest = 0
        self.held: dict[str, set[bytes]] = {}
        self._block_sizes: dict[str, int] = {}
        self._states: set[str] = set()
        self._followers: set[_Follower] = set()

    # -- engine --

    def begin(self, epoch: int, layout: KVLayout) -> None:
        """A new engine, which has cached nothing."""
        self.end()
        snapshots = [g for g in layout.groups if g.retention is Retention.SNAPSHOT and g.name != TAIL_GROUP]
        self._states = {g.name for g in snapshots}
        self._block_sizes = {g.name: g.block_size for g in (layout.groups[0], *snapshots)}
        self.held = {name: set() for name in self._block_sizes}
        self.epoch, self.seq, self.digest = epoch, 0, 0

    def take(self, message: KvChanges) -> KvBatch | None:
        """What the engine says has changed; returns what followers are told, if anything."""
        steps: list[KvStep] = []
        for change in message.changes:
            if change.kind == "cleared":
                steps += [self._apply(KvChange("removed", group, hashes=tuple(h))) for group, h in self.held.items()]
            elif change.group in self.held:
                steps.append(self._apply(change))
        steps = [step for step in steps if step.hashes]
        if not steps:
            return None
        self.seq += 1
        batch = KvBatch(self.seq, self.digest, steps)
        for follower in self._followers:
            follower.put(batch)
        return batch

    def _apply(self, change: KvChange) -> KvStep:
        held, stored = self.held[change.group], change.kind == "stored"
        hashes = [h for h in change.hashes if (h in held) is not stored]
        (held.update if stored else held.difference_update)(hashes)
        states = change.group in self._states
        self.digest ^= keys_digest(hash_keys(hashes), states=states)
        size = self._block_sizes[change.group]
        return KvStep(stored, states, hashes, change.group, size, change.parent if stored else b"")

    def end(self) -> None:
        """The engine is gone, and with it all that it held."""
        self.epoch = 0
        for follower in self._followers:
            follower.woken.set()
        self._followers.clear()

    # -- followers --

    async def follow(self, epoch: int, known: int | None) -> AsyncGenerator[KvBatch, None]:
        """Batches from now on; `known` is the digest of what the caller has. `UnavailableError` for another epoch."""
        if not self.epoch or epoch != self.epoch:
            raise UnavailableError("this is another epoch of the worker: ask the controller again")
        follower = _Follower()
        follower.wants_snapshot = known != self.digest
        self._followers.add(follower)
        try:
            if not follower.wants_snapshot:
                yield KvBatch(self.seq, self.digest)
            while follower in self._followers:
                if follower.wants_snapshot:
                    follower.wants_snapshot = False
                    for part in self.snapshot():
                        yield part
                elif follower.queue:
                    yield follower.queue.popleft()
                elif not await self._woken(follower) and not follower.queue:
                    yield KvBatch(self.seq, self.digest)
        finally:
            self._followers.discard(follower)

    @staticmethod
    async def _woken(follower: _Follower) -> bool:
        """False when nothing came for `SIGN_OF_LIFE_S`."""
        follower.woken.clear()
        try:
            async with asyncio.timeout(SIGN_OF_LIFE_S):
                await follower.woken.wait()
        except TimeoutError:
            return False
        return True

    def snapshot(self) -> list[KvBatch]:
        """All that is held now, in parts that share the present seq."""
        steps: list[KvStep] = []
        for group, held in self.held.items():
            hashes, size, states = list(held), self._block_sizes[group], group in self._states
            steps += [KvStep(True, states, hashes[i : i + PART], group, size) for i in range(0, len(hashes), PART)]
        parts = [[step] for step in steps] or [[]]
        return [
            KvBatch(self.seq, self.digest, part, reset=not i, parts_left=len(parts) - 1 - i)
            for i, part in enumerate(parts)
        ]
