"""Turns computed blocks into extents, on the side that computed them.

    computed -> whole blocks digested once, remembered with the sealed block -> OrderExtent -> (leased, announced)

Full groups publish whole blocks as they complete, window groups only those that the end of the prompt still
sees, and both their partial last block at the end of the prompt. Snapshot groups (the tail among them)
publish one block there. The caller pins an extent's blocks with `Leases.extend` before it announces it.

Where digests are computed by a device that works by itself they are launched with the step that computes the blocks
(`launch`) and taken when it is published.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from common.errors import InternalError
from common.kvcache.layout import TAIL_GROUP, GroupSpec, KVLayout, Retention
from common.kvtransfer.cache import CacheView
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import block_checks, window_start
from common.kvtransfer.transport import DigestCheck
from common.types.prefix import hash_at

MAX_EXTENT_TOKENS = 4096  # bounds one read, so that its time limit means something


class Digester(Protocol):
    """Digest of local memory as `common.kvcache.digest` defines it; `expected` is not looked at."""

    def __call__(self, check: DigestCheck, /) -> int: ...


class DigestsUnderWay(Protocol):
    def values(self) -> list[int]:
        """The digests, in the order of their checks. Waits for them."""


class DigestLauncher(Protocol):
    def launch(self, checks: Sequence[DigestCheck], /) -> DigestsUnderWay:
        """Begin to digest local memory, behind all steps that were launched on its device before."""


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


class BlockPart(NamedTuple):
    """Valid tokens of one block: `num_tokens` from index `first_token` on, the first at absolute `position`."""

    group: str
    block: int
    position: int
    first_token: int
    num_tokens: int


class RankDigests(Protocol):
    def launch(self, parts: Sequence[BlockPart], /) -> DigestsUnderWay:
        """Begin to digest these on all other ranks. For each part the digests of one rank after the other."""


class HostDigests:
    """Launches what a CPU does at once."""

    def __init__(self, digest: Digester) -> None:
        self._digest = digest

    def launch(self, checks: Sequence[DigestCheck]) -> Digested:
        return Digested([self._digest(check) for check in checks])


class Digested(NamedTuple):
    found: list[int]

    def values(self) -> list[int]:
        return self.found


class _Launched(NamedTuple):
    """Digests of a part, on the way: on this rank, and on the others."""

    own: DigestsUnderWay
    where: slice
    others: DigestsUnderWay | None
    others_where: slice

    def values(self) -> list[int]:
        own = self.own.values()[self.where]
        return own if self.others is None else own + self.others.values()[self.others_where]


class Publisher:
    """Makes extents from the blocks of one rank. `bases`: group -> address of its block 0.

    `launcher` digests what is still being computed, and then all; without it `digest` what is there. `others`: the
    digests of other ranks, which go into the same extents; with a `launcher` only.
    """

    def __init__(
        self,
        layout: KVLayout,
        bases: Mapping[str, int],
        cache: CacheView,
        digest: Digester,
        launcher: DigestLauncher | None = None,
        others: RankDigests | None = None,
    ) -> None:
        assert others is None or launcher is not None
        self._layout = layout
        self._bases = dict(bases)
        self._cache = cache
        self._digest = digest
        self._launcher = launcher
        self._others = others
        self._launched: dict[int, dict[BlockPart, _Launched]] = {}  # by sequence
        held = [g for g in layout.groups if layout.num_digests(g.name)]
        self._groups = sorted(held, key=lambda g: g.name != TAIL_GROUP)

    def launch(self, order: PublishOrder, start: int, end: int) -> None:
        """A step that computes positions [start, end) was launched: launch the digests that publishing them takes."""
        if self._launcher is not None:
            self._launch(self._launcher, order, start, end, known=())

    def _launch(
        self, launcher: DigestLauncher, order: PublishOrder, start: int, end: int, known: Container[BlockPart]
    ) -> None:
        launched = self._launched.setdefault(order.seq_id, {})
        parts = [
            part
            for group, blocks, begin, until in self._runs(order, start, end)
            for part in self._parts(group, blocks, begin, until)
            if part not in known and self._stored(part) is None
        ]
        checks = [self._checks(part) for part in parts]
        if checks:
            others = None if self._others is None else self._others.launch(parts)
            own, first, more = launcher.launch([check for of_part in checks for check in of_part]), 0, 0
            for part, of_part in zip(parts, checks, strict=True):
                end, end_more = first + len(of_part), more + len(of_part) * (self._layout.tp_size - 1)
                launched[part] = _Launched(own, slice(first, end), others, slice(more, end_more))
                first, more = end, end_more

    def forget(self, seq_id: int) -> None:
        """The sequence is published, or will not be."""
        self._launched.pop(seq_id, None)

    def publish(self, order: PublishOrder, start: int, end: int) -> list[OrderExtent]:
        """Extents that computed positions [start, end) complete; those below `start` were passed before.

        `end` at the prompt's length publishes all that is left, partial and snapshot blocks included.
        Positions before the order's start are left out, and an empty run publishes nothing.
        Raises InternalError if the sequence does not hold a block that it must publish.
        """
        if self._launcher is not None:  # what no step of this order computed
            self._launch(self._launcher, order, start, end, known=self._launched.get(order.seq_id, ()))
        extents = []
        for group, blocks, begin, until in self._runs(order, start, end):
            parts = self._parts(group, blocks, begin, until)
            extents.append(
                OrderExtent(
                    order_id=order.order_id,
                    lease_id=order.lease_id,
                    group=group.name,
                    start_position=begin,
                    num_tokens=until - begin,
                    block_ids=tuple(blocks),
                    prefix_hash=hash_at(order.chain, order.token_ids, until, order.media),
                    digests=tuple(d for part in parts for d in self._digests(order.seq_id, part)),
                )
            )
        return extents

    def _runs(self, order: PublishOrder, start: int, end: int) -> Iterator[tuple[GroupSpec, Sequence[int], int, int]]:
        """(group, its blocks, first position, end) of each extent of `publish`.

        The tail leads: it is small, and its reader draws from it while the rest is on its way.
        """
        start = max(start, order.start_position)
        if end > len(order.token_ids):
            raise ValueError(f"positions up to {end} of a prompt of {len(order.token_ids)} tokens")
        if end <= start:
            return
        for group in self._groups:
            table = self._cache.block_table(order.seq_id, group.name)
            if group.retention is not Retention.SNAPSHOT:
                yield from self._blocks(order, group, table, start, end)
            elif end == len(order.token_ids):
                block = next((b for b in reversed(table) if b >= 0), -1)
                if block < 0:
                    raise InternalError(f"sequence {order.seq_id} holds no {group.name} block to publish")
                yield group, [block], end - 1, end

    def _blocks(
        self, order: PublishOrder, group: GroupSpec, table: Sequence[int], start: int, end: int
    ) -> Iterator[tuple[GroupSpec, Sequence[int], int, int]]:
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
            yield group, blocks, begin, until
            begin = until

    @staticmethod
    def _parts(group: GroupSpec, blocks: Sequence[int], begin: int, end: int) -> list[BlockPart]:
        parts, position = [], begin
        for block in blocks:
            first_token = 0 if group.retention is Retention.SNAPSHOT else position % group.block_size
            count = min(end - position, group.block_size - first_token)
            parts.append(BlockPart(group.name, block, position, first_token, count))
            position += count
        return parts

    def _digests(self, seq_id: int, part: BlockPart) -> tuple[int, ...]:
        stored = self._stored(part)
        if stored is not None:
            return stored
        launched = self._launched.get(seq_id, {}).pop(part, None)
        digests = tuple(launched.values() if launched else [self._digest(c) for c in self._checks(part)])
        if self._is_whole(part):
            self._cache.set_block_digests(part.group, part.block, digests)
        return digests

    def _is_whole(self, part: BlockPart) -> bool:
        group = self._layout.group(part.group)
        return group.retention is not Retention.SNAPSHOT and part.num_tokens == group.block_size

    def _stored(self, part: BlockPart) -> tuple[int, ...] | None:
        return self._cache.block_digests(part.group, part.block) if self._is_whole(part) else None

    def _checks(self, part: BlockPart) -> list[DigestCheck]:
        return part_checks(self._layout, self._bases, part)


def part_checks(layout: KVLayout, bases: Mapping[str, int], part: BlockPart) -> list[DigestCheck]:
    """What is digested of a part on the rank of `layout`."""
    base = bases[part.group]
    return block_checks(layout, part.group, base, part.block, part.position, part.num_tokens, part.first_token)
