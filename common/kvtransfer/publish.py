"""Turns computed blocks into extents, on the side that computed them.

    computed -> whole blocks digested once, remembered with the sealed block -> OrderExtent -> (leased, announced)

Full groups publish whole blocks as they complete, window groups only those that the end of the prompt still
sees, and both their partial last block at the end of the prompt. Snapshot groups (the tail among them)
publish one block there. The caller pins an extent's blocks with `Leases.extend` before it announces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import InternalError
from common.kvcache.layout import GroupSpec, KVLayout, Retention
from common.kvtransfer.cache import CacheView
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import block_checks, window_start
from common.kvtransfer.transport import DigestCheck

MAX_EXTENT_TOKENS = 4096  # bounds one read, so that its time limit means something


class Digester(Protocol):
    """Digest of local memory as `common.kvcache.digest` defines it; `expected` is not looked at."""

    def __call__(self, check: DigestCheck, /) -> int: ...


@dataclass(frozen=True)
class _Span:
    """One call's order: positions [first, num_tokens) are wanted in all, [start, end) are new."""

    order_id: int
    lease_id: int
    seq_id: int
    first: int
    start: int
    end: int
    num_tokens: int
    prefix_hash: Callable[[int], bytes]


class Publisher:
    """Makes extents from the blocks of one rank. `bases`: group -> address of its block 0."""

    def __init__(self, layout: KVLayout, bases: Mapping[str, int], cache: CacheView, digest: Digester) -> None:
        self._layout = layout
        self._bases = dict(bases)
        self._cache = cache
        self._digest = digest
        self._num_digests = {g.name: layout.num_digests(g.name) for g in layout.groups}

    def publish(
        self,
        *,
        order_id: int,
        lease_id: int,
        seq_id: int,
        first: int,
        start: int,
        end: int,
        num_tokens: int,
        prefix_hash: Callable[[int], bytes],
    ) -> list[OrderExtent]:
        """Extents that computed positions [start, end) complete, for an order of positions [first, num_tokens).

        `start` is where the extents given before end (`first` at the start; with several block sizes, the
        farthest of them). `prefix_hash(n)` is the hash of the first n tokens. `end` equal to `num_tokens`
        publishes all that is left, partial and snapshot blocks included. An empty run publishes nothing.
        Raises InternalError if the sequence does not hold a block that it must publish.
        """
        if end <= start:
            return []
        if not 0 <= first <= start < end <= num_tokens:
            raise ValueError(f"positions [{start}, {end}) of an order for [{first}, {num_tokens})")
        span = _Span(order_id, lease_id, seq_id, first, start, end, num_tokens, prefix_hash)
        extents: list[OrderExtent] = []
        for group in self._layout.groups:
            if not self._num_digests[group.name]:
                continue
            table = self._cache.block_table(seq_id, group.name)
            if group.retention is not Retention.SNAPSHOT:
                extents.extend(self._blocks(span, group, table))
            elif end == num_tokens:
                extents.extend(self._snapshot(span, group, table))
        return extents

    def _snapshot(self, span: _Span, group: GroupSpec, table: Sequence[int]) -> Iterator[OrderExtent]:
        block = next((b for b in reversed(table) if b >= 0), -1)
        if block < 0:
            raise InternalError(f"sequence {span.seq_id} holds no {group.name} block to publish")
        yield self._extent(span, group, span.num_tokens - 1, span.num_tokens, [block])

    def _blocks(self, span: _Span, group: GroupSpec, table: Sequence[int]) -> Iterator[OrderExtent]:
        size = group.block_size
        begin = max(span.first, span.start // size * size)
        stop = span.end if span.end == span.num_tokens else span.end // size * size
        if group.retention is Retention.WINDOW:
            begin = max(begin, window_start(group, span.num_tokens))
        step = max(MAX_EXTENT_TOKENS // size, 1) * size
        while begin < stop:
            until = min(stop, begin // size * size + step)
            blocks = list(table[begin // size : (until - 1) // size + 1])
            if len(blocks) != (until - 1) // size + 1 - begin // size or min(blocks) < 0:
                raise InternalError(f"sequence {span.seq_id} lacks {group.name} positions [{begin}, {until})")
            yield self._extent(span, group, begin, until, blocks)
            begin = until

    def _extent(self, span: _Span, group: GroupSpec, begin: int, end: int, blocks: Sequence[int]) -> OrderExtent:
        digests: list[int] = []
        position = begin
        for block in blocks:
            first_token = 0 if group.retention is Retention.SNAPSHOT else position % group.block_size
            count = min(end - position, group.block_size - first_token)
            digests.extend(self._block_digests(group, block, position, first_token, count))
            position += count
        return OrderExtent(
            order_id=span.order_id,
            lease_id=span.lease_id,
            group=group.name,
            start_position=begin,
            num_tokens=end - begin,
            block_ids=tuple(blocks),
            prefix_hash=span.prefix_hash(end),
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
