"""Which bytes to read for a published extent, and how to check them. Pure functions of two layouts.

An extent names positions [start, end) of one group and, in order, the source's blocks that hold them; its
first and last block may be covered in part. Digests cover, per source block, exactly the positions of the
extent that lie in it. Both sides may differ in block size and tensor-parallel rank:

    positions   |---- source block 0 ----|---- source block 1 ----|
    reader      |-- block a --|-- block b --|-- block c --|-- block d
    runs        [     a       ][   b    ][b ][     c      ][ d   ]

Each run becomes strided copies per region (layers x parts x units x tokens, merged where both sides are
contiguous); blocks of equal layouts are copied whole. A check sums over the runs of its source block.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from common.errors import KVTransferError
from common.kvcache.layout import GroupSpec, KVLayout, RegionPlace, RegionSpec, Retention, Sharding, compare
from common.kvtransfer.checks import Checks, CheckTable, Shape
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.transport import DigestCheck, ReadPiece
from common.types.prefix import UNIT


class ExtentPlan(msgspec.Struct, frozen=True):
    """What to read for one extent.

    Positions [first_position, end of the extent) are read; the ones before are not needed by the reader.
    `block_ids` are the reader's blocks that are written, each once.
    """

    pieces: tuple[ReadPiece, ...]
    checks: Sequence[DigestCheck]
    block_ids: tuple[int, ...]
    first_position: int


class _Shared(msgspec.Struct, frozen=True):
    """A region that both sides have, cut down to the units that both sides hold."""

    source: RegionPlace
    reader: RegionPlace
    first_unit: int
    num_units: int
    digest_index: int  # of `first_unit` among the source's digests of a block
    num_layers: int
    num_parts: int


class _GroupPair(msgspec.Struct, frozen=True):
    equal: bool
    source: GroupSpec
    reader: GroupSpec
    source_nbytes: int
    reader_nbytes: int
    num_digests: int
    shared: tuple[_Shared, ...]


class _Run(msgspec.Struct, frozen=True):
    """Consecutive positions that lie in one block on each side."""

    source_block: int
    reader_block: int
    position: int
    num_tokens: int
    source_token: int  # of the first position, inside its block
    reader_token: int


def window_start(group: GroupSpec, num_tokens: int) -> int:
    """First position that a window group must bring for a sequence of `num_tokens`.

    The next query, at `num_tokens`, sees itself and the `window - 1` positions before it. Rounded down to a
    hash unit and not to a block, so that sides with different block sizes mean the same positions.
    """
    return max(0, num_tokens - group.window + 1) // UNIT * UNIT


class Share(msgspec.Struct, frozen=True):
    """What a reader's rank takes from one rank of the source: (region, first unit, number of units) of each."""

    rank: int
    units: tuple[tuple[str, int, int], ...]


@functools.lru_cache(maxsize=256)
def shares(source: KVLayout, reader: KVLayout) -> tuple[Share, ...]:
    """From which ranks of the source this rank of the reader takes what it holds: every unit once.

    What all ranks of a source hold is taken from the one at the same place among them, so that ranks of equal numbers
    read whole blocks, each from its own counterpart. `source` may be the layout of any of its ranks.
    """
    taken: dict[int, list[tuple[str, int, int]]] = {}
    for region in reader.regions:
        have = next((r for r in source.regions if r.name == region.name), None)
        if have is None:
            continue
        want = reader.place(region.name)
        for rank, first, count in _holders(source, have, reader, want.first_unit, want.local_units):
            taken.setdefault(rank, []).append((region.name, first, count))
    return tuple(Share(rank, tuple(units)) for rank, units in sorted(taken.items()))


def _holders(
    source: KVLayout, region: RegionSpec, reader: KVLayout, first: int, count: int
) -> Iterator[tuple[int, int, int]]:
    """(rank of the source, first unit, number) that together are `count` units from `first` on."""
    size = source.tp_size
    if region.sharding is Sharding.REPLICATED or size == 1:
        yield reader.tp_rank * size // reader.tp_size, first, count
    elif region.sharding is Sharding.GROUPED:
        holders = size // region.num_units
        for unit in range(first, first + count):
            yield unit * holders + reader.tp_rank * size // reader.tp_size % holders, unit, 1
    else:
        each = region.num_units // size
        for rank in range(first // each, (first + count - 1) // each + 1):
            begin, end = max(first, rank * each), min(first + count, (rank + 1) * each)
            yield rank, begin, end - begin


def of_rank(source: KVLayout, extent: OrderExtent) -> OrderExtent:
    """The extent as one rank of a source publishes it. All ranks' digests of a block lie one after the other."""
    if source.tp_size == 1:
        return extent
    count = source.num_digests(extent.group)
    starts = range(source.tp_rank * count, len(extent.digests), source.tp_size * count)
    return msgspec.structs.replace(extent, digests=tuple(d for i in starts for d in extent.digests[i : i + count]))


def supplied_groups(source: KVLayout, reader: KVLayout) -> tuple[str, ...]:
    """The reader's groups of which the source has a region: what a complete hand-off must bring."""
    names = {r.name for r in source.regions}
    return tuple(g.name for g in reader.groups if any(r.name in names for r in reader.regions_of(g.name)))


def block_checks(
    layout: KVLayout, group: str, base: int, block_id: int, position: int, num_tokens: int, first_token: int = 0
) -> list[DigestCheck]:
    """What is digested of one local block, one check per region and local unit in layout order.

    `num_tokens` tokens from index `first_token` of the block on, the first at absolute `position`.
    """
    start = base + block_id * layout.block_nbytes(group)
    checks = []
    for place, num_layers, num_parts in _places(layout, group):
        address = start + place.offset + first_token * place.token_stride
        for unit in range(place.local_units):
            segments = ((address + unit * place.unit_stride, position, num_tokens),)
            shape = _shape(place, num_layers, num_parts)
            checks.append(DigestCheck(segments, *shape[:6], 0, shape[6]))
    return checks


@functools.lru_cache(maxsize=64)
def _places(layout: KVLayout, group: str) -> tuple[tuple[RegionPlace, int, int], ...]:
    return tuple((layout.place(r.name), r.num_layers, r.num_parts) for r in layout.regions_of(group))


def check_extent(source: KVLayout, extent: OrderExtent, num_ranks: int = 1) -> None:
    """KVTransferError, with `param` the field at fault, if an extent cannot be one of this source.

    `num_ranks`: of the source, whose digests it has.
    """
    try:
        group = source.group(extent.group)
    except KeyError:
        raise KVTransferError(f"extent of unknown group {extent.group!r}", param="group") from None
    start, count = extent.start_position, extent.num_tokens
    if start < 0 or count < 1 or (group.retention is Retention.SNAPSHOT and count != 1):
        raise KVTransferError(f"extent of {count} tokens at position {start} in group {group.name}", param="num_tokens")
    num_blocks = 1
    if group.retention is not Retention.SNAPSHOT:
        num_blocks = (start + count - 1) // group.block_size - start // group.block_size + 1
    if len(extent.block_ids) != num_blocks:
        why = f"{len(extent.block_ids)} blocks of {group.block_size} for {count} tokens at position {start}"
        raise KVTransferError(why, param="block_ids")
    if any(not 0 <= b < group.num_blocks for b in extent.block_ids):
        raise KVTransferError(f"block outside the source's pool of {group.num_blocks}", param="block_ids")
    expected = num_blocks * source.num_digests(group.name) * num_ranks
    if len(extent.digests) != expected:
        raise KVTransferError(f"{len(extent.digests)} digests, expected {expected}", param="digests")


def plan_extent(
    source: KVLayout,
    reader: KVLayout,
    extent: OrderExtent,
    table: Sequence[int],
    base: int,
    num_tokens: int,
    units: tuple[tuple[str, int, int], ...] | None = None,
) -> ExtentPlan:
    """Plan the read of `extent` from one source rank (`of_rank`) into the reader's blocks.

    `table` is the reader's block table of the group, `base` the address of its block 0, `num_tokens` the
    positions of the whole order (nothing valid lies behind them). The pair must pass `compare`; a reader
    rank is complete when the plans of all source ranks that share units with it have run. `units`: of a `Share`, if
    not all that both hold.
    Raises KVTransferError, with `param` the field at fault, for an extent that cannot be read whole.
    """
    check_extent(source, extent)
    pair = _pair(source, reader, extent.group, units)
    end = extent.start_position + extent.num_tokens
    if end > num_tokens:
        raise KVTransferError(f"extent ends at {end}, the order at {num_tokens}", param="num_tokens")
    pieces = _Pieces(extent.group)
    blocks: dict[int, None] = {}
    first_position = end
    read: list[tuple[int, list[_Run]]] = []
    for index, runs in _runs(pair, extent, table, num_tokens):
        read.append((index, runs))
        first_position = min(first_position, runs[0].position)
        for run in runs:
            blocks[run.reader_block] = None
            _add_run(pieces, pair, run, base, num_tokens)
    checks = Checks(_check_tables(pair, read, base, extent.digests)) if read else ()
    return ExtentPlan(tuple(pieces.done()), checks, tuple(blocks), first_position)


def _runs(
    pair: _GroupPair, extent: OrderExtent, table: Sequence[int], num_tokens: int
) -> Iterator[tuple[int, list[_Run]]]:
    """(index of the source block in the extent, its runs), for the source blocks that the reader needs."""
    start, end = extent.start_position, extent.start_position + extent.num_tokens
    if pair.source.retention is Retention.SNAPSHOT:
        held = next((b for b in reversed(table) if b >= 0), -1)
        yield 0, [_Run(extent.block_ids[0], _held(held, start), start, 1, 0, 0)]
        return
    floor = window_start(pair.reader, num_tokens) if pair.reader.retention is Retention.WINDOW else 0
    source_size, reader_size = pair.source.block_size, pair.reader.block_size
    for index, source_block in enumerate(extent.block_ids):
        block_start = (start // source_size + index) * source_size
        position, stop = max(start, block_start), min(end, block_start + source_size)
        if stop <= floor:
            continue
        runs = []
        while position < stop:
            logical, token = divmod(position, reader_size)
            count = min(stop - position, reader_size - token)
            block = _held(table[logical] if logical < len(table) else -1, position)
            runs.append(_Run(source_block, block, position, count, position - block_start, token))
            position += count
        yield index, runs


def _held(block: int, position: int) -> int:
    if block < 0:
        raise KVTransferError(f"the reader holds no block for position {position}", param="block_table")
    return block


def _add_run(pieces: _Pieces, pair: _GroupPair, run: _Run, base: int, num_tokens: int) -> None:
    source_start = run.source_block * pair.source_nbytes
    reader_start = base + run.reader_block * pair.reader_nbytes
    whole = run.num_tokens == pair.reader.block_size or run.position + run.num_tokens == num_tokens
    if pair.equal and whole and not run.reader_token:
        pieces.add(source_start, reader_start, pair.reader_nbytes)
        return
    for region in pair.shared:
        src, dst = region.source, region.reader
        source_at = source_start + src.offset + run.source_token * src.token_stride
        source_at += (region.first_unit - src.first_unit) * src.unit_stride
        reader_at = reader_start + dst.offset + run.reader_token * dst.token_stride
        reader_at += (region.first_unit - dst.first_unit) * dst.unit_stride
        nbytes, steps = _steps(region, run.num_tokens * dst.token_stride)
        pieces.add_all(source_at, reader_at, nbytes, steps)


@functools.lru_cache(maxsize=1024)
def _steps(region: _Shared, nbytes: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """How to copy `nbytes` of each layer, part and unit: length of a copy, (source, reader) offsets of all.

    Dimensions that are contiguous on both sides become part of the copy.
    """
    src, dst = region.source, region.reader
    loops: list[list[tuple[int, int]]] = []
    for count, source_stride, reader_stride in (
        (region.num_units, src.unit_stride, dst.unit_stride),
        (region.num_parts, src.part_stride, dst.part_stride),
        (region.num_layers, src.layer_stride, dst.layer_stride),
    ):
        if not loops and source_stride == reader_stride == nbytes:
            nbytes *= count
        elif count > 1:
            loops.insert(0, [(i * source_stride, i * reader_stride) for i in range(count)])
    return nbytes, tuple((sum(s for s, _ in at), sum(d for _, d in at)) for at in itertools.product(*loops))


def _check_tables(
    pair: _GroupPair, read: Sequence[tuple[int, Sequence[_Run]]], base: int, digests: Sequence[int]
) -> list[CheckTable]:
    """`read`: of each source block its index in the extent, and its runs. A check for each unit of each of them."""
    runs_R5 = np.array(
        [
            (number, run.reader_block, run.reader_token, run.position, run.num_tokens)
            for number, (_, runs) in enumerate(read)
            for run in runs
        ],
        np.int64,
    )
    try:
        digests_D = np.array(digests, np.uint64)
    except OverflowError:
        raise KVTransferError("a digest has more than 64 bits", param="digests") from None
    expected_BD = digests_D.reshape(-1, pair.num_digests)[[index for index, _ in read]]
    tables = []
    for region in pair.shared:
        place, units_U = region.reader, np.arange(region.num_units)
        start_U = base + place.offset + (region.first_unit - place.first_unit + units_U) * place.unit_stride
        segments_RU4 = np.empty((len(runs_R5), region.num_units, 4), np.int64)
        at_R = runs_R5[:, 1] * pair.reader_nbytes + runs_R5[:, 2] * place.token_stride
        segments_RU4[:, :, 0] = at_R[:, None] + start_U
        segments_RU4[:, :, 1:3] = runs_R5[:, None, 3:]
        segments_RU4[:, :, 3] = runs_R5[:, :1] * region.num_units + units_U
        expected_BU = expected_BD[:, region.digest_index : region.digest_index + region.num_units]
        shape = _shape(place, region.num_layers, region.num_parts)
        tables.append(CheckTable(shape, segments_RU4.reshape(-1, 4), expected_BU.reshape(-1)))
    return tables


def _shape(place: RegionPlace, layers: int, parts: int) -> Shape:
    most_tokens, row = place.unit_stride // place.token_stride, place.token_stride
    return layers, parts, place.layer_stride, place.part_stride, row, row, most_tokens


class _Pieces:
    """Collects copies; those that go on where the last one ended, on both sides, become one."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._done: list[ReadPiece] = []
        self._last: tuple[int, int, int] | None = None

    def add(self, remote_offset: int, local_address: int, nbytes: int) -> None:
        if self._last is not None:
            remote, local, size = self._last
            if remote + size == remote_offset and local + size == local_address:
                self._last = (remote, local, size + nbytes)
                return
            self._done.append(ReadPiece(self._group, remote, local, size))
        self._last = (remote_offset, local_address, nbytes)

    def add_all(self, remote_offset: int, local_address: int, nbytes: int, steps: Sequence[tuple[int, int]]) -> None:
        """One copy of `nbytes` at each step from the two addresses."""
        if len(steps) == 1:
            self.add(remote_offset, local_address, nbytes)
            return
        group, done = self._group, self.done()
        done += [ReadPiece(group, remote_offset + s, local_address + d, nbytes) for s, d in steps]

    def done(self) -> list[ReadPiece]:
        if self._last is not None:
            self._done.append(ReadPiece(self._group, *self._last))
            self._last = None
        return self._done


@functools.lru_cache(maxsize=256)
def _pair(source: KVLayout, reader: KVLayout, group: str, units: tuple[tuple[str, int, int], ...] | None) -> _GroupPair:
    verdict = compare(source, reader)
    if not verdict.ok:
        raise KVTransferError(verdict.reason, param="layout")
    try:
        reader_group = reader.group(group)
    except KeyError:
        raise KVTransferError(f"the reader has no group {group!r}", param="group") from None
    wanted = {r.name for r in reader.regions_of(group)}
    given = None if units is None else {name: (first, count) for name, first, count in units}
    shared = []
    is_whole = True
    digest_index = 0
    for region in source.regions_of(group):
        src = source.place(region.name)
        if region.name in wanted:
            dst = reader.place(region.name)
            first = max(src.first_unit, dst.first_unit)
            count = min(src.first_unit + src.local_units, dst.first_unit + dst.local_units) - first
            if given is not None:
                first, count = given.get(region.name, (first, 0))
            is_whole &= count == dst.local_units
            if count > 0:
                at = digest_index + first - src.first_unit
                shared.append(_Shared(src, dst, first, count, at, region.num_layers, region.num_parts))
        digest_index += src.local_units
    return _GroupPair(
        equal=verdict.equal and is_whole,
        source=source.group(group),
        reader=reader_group,
        source_nbytes=source.block_nbytes(group),
        reader_nbytes=reader.block_nbytes(group),
        num_digests=digest_index,
        shared=tuple(shared),
    )
