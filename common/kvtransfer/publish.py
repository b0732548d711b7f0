"""Turns computed blocks into extents, on the side that computed them.

    computed -> whole blocks digested once, remembered with the sealed block -> OrderExtent -> (leased, announced)

Full groups publish whole blocks as they complete, window groups only those that the end of the prompt still
sees, and both their partial last block at the end of the prompt. Snapshot groups (the tail among them)
publish one block there. The caller pins an extent's blocks with `Leases.extend` before it announces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from common.errors import InternalError
from common.kvcache.layout import GroupSpec, KVLayout, Retention
from common.kvtransfer.cache import CacheView
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import block_checks, window_start
from common.kvtransfer.transport import DigestCheck
from common.types.prefix import hash_at

MAX_EXTENT_TOKENS = 4096  # bounds one read, so that its time limit means something


class Digester(Protocol):
    """Digest of local memory as `common.kvcache.digest` defines it; `expected` is not looked at."""

    def __call__(self, check: DigestCheck, /) -> int: ...


class PublishOrder(msgspec.Struct, frozen=True):
    """What the publisher must know of an order. `token_ids` is the whole prompt.

    `chain` covers the whole units of what is computed; `start_position` is the first position that the
    reader lacks.
    """

    seq_id: int
    order_id: int
    lease_id: int
    token_ids: Sequence[int]
    chain: Sequence[bytes]
    start_position: int
    media: tuple[tuple[int, bytes], ...] = ()


class Publisher:
    """Makes extents from the blocks of one rank. `bases`: group -> address of its block 0."""

    def __init__(self, layout: KVLayout, bases: Mapping[str, int], cache: CacheView, digest: Digester) -> None:
        self._layout = layout
        self._bases = dict(bases)
        self._cache = cache
        self._digest = digest
        self._num_digests = {g.name: layout.num_digests(g.name) for g in layout.groups}

    def publish(self, order: PublishOrder, start: int, end: int) -> list[OrderExtent]:
        """Extents that computed positions [start, end) complete; those below `start` were passed before.

        `end` at the prompt's length publishes all that is left, partial and snapshot blocks included.
        Positions before the order's start are left out, and an empty run publishes nothing.
        Raises InternalError if the sequence does not hold a block that it must publish.
        """
        start = max(start, order.start_position)
        if end > len(order.token_ids):
            raise ValueError(f"positions up to {end} of a prompt of {len(order.token_ids)} tokens")
        if end <= start:
            return []
        extents: list[OrderExtent] = []
        for group in self._layout.groups:
            if not self._num_digests[group.name]:
                continue
            table = self._cache.block_table(order.seq_id, group.name)
            if group.retention is not Retention.SNAPSHOT:
                extents.extend(self._blocks(order, group, table, start, end))
            elif end == len(order.token_ids):
                extents.append(self._snapshot(order, group, table))
        return extents

    def _snapshot(self, order: PublishOrder, group: GroupSpec, table: Sequence[int]) -> OrderExtent:
        block = next((b for b in reversed(table) if b >= 0), -1)
        if block < 0:
            raise InternalError(f"sequence {order.seq_id} holds no {group.name} block to publish")
        return self._extent(order, group, len(order.token_ids) - 1, len(order.token_ids), [block])

    def _blocks(
        self, order: PublishOrder, group: GroupSpec, table: Sequence[int], start: int, end: int
    ) -> Iterator[OrderExtent]:
        size, total = group.block_size, len(order.token_ids)
        begin = max(order.start_position, start // size * size)
        stop = end if end == total else end // size * size
        if group.retention is Retention.WINDOW:
            begin = max(begin, window_start(group, total))
        step = max(MAX_EXTENT_TOKENS // size, 1) * size
        while begin < stop:
            until = min(stop, begin // size * size + step)
            count = (until - 1) // size + 1 - begin // size
            blocks = list(table[begin // size : begin // size + count])
            if len(blocks) != count or min(blocks) < 0:
                raise InternalError(f"sequence {order.seq_id} lacks {group.name} positions [{begin}, {until})")
            yield self._extent(order, group, begin, until, blocks)
            begin = until

    def _extent(
        self, order: PublishOrder, group: GroupSpec, begin: int, end: int, blocks: Sequence[int]
    ) -> OrderExtent:
        digests: list[int] = []
        position = begin
        for block in blocks:
            first_token = 0 if group.retention is Retention.SNAPSHOT else position % group.block_size
            count = min(end - position, group.block_size - first_token)
            digests.extend(self._block_digests(group, block, position, first_token, count))
            position += count
        return OrderExtent(
            order_id=order.order_id,
            lease_id=order.lease_id,
            group=group.name,
            start_position=begin,
            num_tokens=end - begin,
            block_ids=tuple(blocks),
            prefix_hash=hash_at(order.chain, order.token_ids, end, order.media),
            digests=tuple(digests),
        )

    def _block_digests(
        self, group: GroupSpec, block: int, position: int, first_token: int, count: int
    ) -> tuple[int, ...]:
        sealed = group.retention is not Retention.SNAPSHOT and count == group.block_size
        if sealed:
            stored = self._cache.block_digests(group.name, block)
            if stored is not None:
                return stored
        base = self._bases[group.name]
        checks = block_checks(self._layout, group.name, base, block, position, count, first_token)
        digests = tuple(self._digest(c) for c in checks)
        if sealed:
            self._cache.set_block_digests(group.name, block, digests)
        return digests
