"""Extents read into the blocks of one rank, each from those ranks of its source that hold what this rank needs.

    connect(source) -> read(extent) -> one read of a transport for each rank of the source that is needed -> one result

A source with as many ranks as its reader is read rank by rank, whole blocks; with more or fewer, heads are taken from
where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from common.errors import NanoDeployError, PeerLostError
from common.kvcache.layout import KVLayout
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import ExtentPlan, Share, of_rank, plan_extent, shares
from common.kvtransfer.transport import Endpoint, PeerDown, ReadResult, ReadStatus, Transport

_SEVERITY = (ReadStatus.OK, ReadStatus.MISMATCH, ReadStatus.FENCED, ReadStatus.FAILED)
_PART = 1 << 62  # ids of reads that are a part of one begin here


class Wanted(msgspec.Struct, frozen=True):
    """An extent to read: `table` is the reader's block table of its group, `num_tokens` that of the whole order."""

    extent: OrderExtent
    table: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True)
class Planned:
    """How one rank reads an extent: a plan for each rank of the source, all of the same blocks."""

    wanted: Wanted
    parts: tuple[ExtentPlan, ...]

    @property
    def is_empty(self) -> bool:
        return not any(plan.pieces for plan in self.parts)

    @property
    def block_ids(self) -> tuple[int, ...]:
        """Those that are written, each once."""
        return self.parts[0].block_ids

    @property
    def first_position(self) -> int:
        return self.parts[0].first_position


class Reads(Protocol):
    """As `Transport`, but peers are sources with all their ranks, and what is read are extents."""

    @property
    def name(self) -> str: ...

    def connect(self, layout: KVLayout, endpoints: Sequence[Endpoint]) -> int:
        """`endpoints` of the source's ranks in order. Errors come as `PeerDown`, or as NanoDeployError."""

    def disconnect(self, peer_id: int) -> None: ...

    def describe(self, peer_id: int) -> str:
        """What it runs over; where that differs, all of it, with + between."""

    def plan(self, peer_id: int, wanted: Wanted) -> Planned:
        """KVTransferError for an extent that cannot be read whole."""

    def read(self, peer_id: int, read_id: int, planned: Planned) -> None: ...

    def poll(self) -> list[ReadResult | PeerDown]: ...


class Joined:
    """The results of the parts of one read, until all have ended: then nothing can land any more."""

    def __init__(self, read_id: int, num_parts: int) -> None:
        self._read_id = read_id
        self._left = num_parts
        self._results: list[ReadResult] = []

    def add(self, result: ReadResult) -> ReadResult | None:
        """The result of all, with the last."""
        self._results.append(result)
        self._left -= 1
        if self._left:
            return None
        worst = max(self._results, key=lambda r: _SEVERITY.index(r.status))
        return ReadResult(
            read_id=self._read_id,
            status=worst.status,
            nbytes=sum(r.nbytes for r in self._results),
            seconds=max(r.seconds for r in self._results),
            read_seconds=max(r.read_seconds for r in self._results),
            message=worst.message,
        )


def together(descriptions: Sequence[str]) -> str:
    return "+".join(sorted(set(descriptions)))


@dataclass(frozen=True)
class _Source:
    """A rank of a source: `peer_id` is the transport's."""

    layout: KVLayout
    share: Share
    peer_id: int


class RankReads:
    """The reads of one rank over its transport. `bases`: group -> address of its block 0."""

    def __init__(self, layout: KVLayout, bases: Mapping[str, int], transport: Transport) -> None:
        self._layout = layout
        self._bases = dict(bases)
        self._transport = transport
        self._peers: dict[int, list[_Source]] = {}
        self._by_transport: dict[int, int] = {}
        self._joined: dict[int, Joined] = {}
        self._peer_ids = itertools.count(1)
        self._part_ids = itertools.count(_PART)
        self._ended: list[ReadResult] = []

    @property
    def name(self) -> str:
        return self._transport.name

    @property
    def wakeup_fd(self) -> int:
        return self._transport.wakeup_fd

    def connect(self, layout: KVLayout, endpoints: Sequence[Endpoint]) -> int:
        number = next(self._peer_ids)
        sources = self._peers[number] = []
        try:
            for share in shares(layout, self._layout):
                peer_id = self._transport.connect(endpoints[share.rank])
                self._by_transport[peer_id] = number
                sources.append(_Source(msgspec.structs.replace(layout, tp_rank=share.rank), share, peer_id))
        except BaseException:
            self.disconnect(number)
            raise
        return number

    def disconnect(self, peer_id: int) -> None:
        for source in self._peers.pop(peer_id, ()):
            self._by_transport.pop(source.peer_id, None)
            self._transport.disconnect(source.peer_id)

    def describe(self, peer_id: int) -> str:
        return together([self._transport.describe(s.peer_id) for s in self._peers[peer_id]])

    def plan(self, peer_id: int, wanted: Wanted) -> Planned:
        base = self._bases[wanted.extent.group]
        plans = []
        for source in self._sources(peer_id):
            units = source.share.units if source.layout.tp_size > 1 else None
            extent = of_rank(source.layout, wanted.extent)
            plans.append(plan_extent(source.layout, self._layout, extent, wanted.table, base, wanted.num_tokens, units))
        return Planned(wanted, tuple(plans))

    def read(self, peer_id: int, read_id: int, planned: Planned) -> None:
        sources = self._sources(peer_id)
        parts = [(s, plan) for s, plan in zip(sources, planned.parts, strict=True) if plan.pieces]
        if len(parts) == 1:
            ((source, plan),) = parts
            self._transport.read(source.peer_id, read_id, plan.pieces, plan.checks)
            return
        if not parts:
            self._ended.append(ReadResult(read_id, ReadStatus.OK, 0, 0.0, 0.0))
            return
        joined = Joined(read_id, len(parts))
        for source, plan in parts:
            part_id = next(self._part_ids)
            self._joined[part_id] = joined
            try:
                self._transport.read(source.peer_id, part_id, plan.pieces, plan.checks)
            except NanoDeployError as error:
                self._take(ReadResult(part_id, ReadStatus.FAILED, 0, 0.0, 0.0, error.message))

    def poll(self) -> list[ReadResult | PeerDown]:
        events: list[ReadResult | PeerDown] = []
        for event in self._transport.poll():
            if isinstance(event, ReadResult):
                self._take(event)
                continue
            number = self._by_transport.pop(event.peer_id, None)
            if number is not None:
                events.append(PeerDown(number, event.message))
        ended, self._ended = self._ended, []
        return [*ended, *events]

    def _sources(self, peer_id: int) -> list[_Source]:
        sources = self._peers.get(peer_id)
        if sources is None:
            raise PeerLostError(f"peer {peer_id} is not connected")
        return sources

    def _take(self, result: ReadResult) -> None:
        joined = self._joined.pop(result.read_id, None)
        whole = result if joined is None else joined.add(result)
        if whole is not None:
            self._ended.append(whole)
