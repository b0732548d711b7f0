"""Digest checks of many blocks as columns: a prompt has hundreds, and a reader waits for them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from common.kvtransfer.transport import DigestCheck

Shape = tuple[int, int, int, int, int, int, int]
"""layers, parts, strides of layers, parts and tokens, bytes of a token, most tokens of a segment: as `DigestCheck`."""


class CheckTable(NamedTuple):
    """Checks of one shape, from number 0 on. Of each segment: address, position, tokens, and whose it is."""

    shape: Shape
    segments_N4: NDArray[np.int64]
    expected_C: NDArray[np.uint64]


class Checks(Sequence[DigestCheck]):
    """Tables, one after the other, and what they hold."""

    def __init__(self, tables: Sequence[CheckTable]) -> None:
        self.tables = tables
        self._made: tuple[DigestCheck, ...] | None = None

    @classmethod
    def of(cls, checks: Sequence[DigestCheck]) -> tuple[Checks, NDArray[np.int64]]:
        """Checks of any shapes as tables; the place of each in `checks`."""
        if isinstance(checks, Checks):
            return checks, np.arange(len(checks))
        found: dict[Shape, list[int]] = {}
        for i, c in enumerate(checks):
            strides = (c.layer_stride, c.part_stride, c.token_stride)
            found.setdefault((c.num_layers, c.num_parts, *strides, c.token_nbytes, c.max_tokens), []).append(i)
        tables = []
        for shape, places in found.items():
            rows = [(*segment, number) for number, i in enumerate(places) for segment in checks[i].segments]
            expected = np.array([checks[i].expected for i in places], np.uint64)
            tables.append(CheckTable(shape, np.array(rows, np.int64), expected))
        return cls(tables), np.array([i for places in found.values() for i in places], np.int64)

    def __len__(self) -> int:
        return sum(len(table.expected_C) for table in self.tables)

    def __iter__(self) -> Iterator[DigestCheck]:
        return iter(self._all())

    @overload
    def __getitem__(self, index: int) -> DigestCheck: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[DigestCheck, ...]: ...

    def __getitem__(self, index: int | slice) -> DigestCheck | tuple[DigestCheck, ...]:
        return self._all()[index]

    def _all(self) -> tuple[DigestCheck, ...]:
        if self._made is None:
            self._made = tuple(check for table in self.tables for check in _checks_of(table))
        return self._made


def _checks_of(table: CheckTable) -> Iterator[DigestCheck]:
    shape, max_tokens = table.shape[:6], table.shape[6]
    order = np.argsort(table.segments_N4[:, 3], kind="stable")
    expected = table.expected_C.tolist()
    rows = table.segments_N4[order].tolist()
    for number, segments in itertools.groupby(rows, key=operator.itemgetter(3)):
        yield DigestCheck(tuple((a, p, n) for a, p, n, _ in segments), *shape, expected[number], max_tokens)
