"""Leases on published KV, on the side that computed it.

    open -> OPEN --extend (pins blocks, renews)--> OPEN --release--> ENDED
                                                      `--expire---> ENDED   (ttl_s after open or last renewal)

A lease pins blocks by itself, whatever becomes of the sequence that made them. Only a release or expiry on
this process's monotonic clock ends it, and blocks are unpinned exactly then. Ids are random 64-bit values,
so an id of an earlier process or a forged one is unknown here: counted, and otherwise without effect.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import LeaseLostError
from common.kvtransfer.cache import CacheView
from common.types import Clock

REMEMBERED = 65536


@dataclass(frozen=True)
class LeaseInfo:
    """One open lease, for the ledger."""

    lease_id: int
    label: str
    opened_at: float
    expires_at: float
    num_blocks: int


@dataclass
class LeaseCounters:
    """Totals since start. `lost` counts extends and releases of ids that were never given out here."""

    opened: int = 0
    released: int = 0
    expired: int = 0
    repeated: int = 0
    lost: int = 0


@dataclass
class _Lease:
    label: str
    opened_at: float
    expires_at: float
    num_blocks: int = 0


class Leases:
    """All leases of one owner. `random64` makes ids (an argument so that a simulation can repeat them)."""

    def __init__(
        self,
        cache: CacheView,
        clock: Clock,
        ttl_s: float,
        random64: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        if ttl_s <= 0:
            raise ValueError(f"ttl_s must be positive, got {ttl_s}")
        self._cache = cache
        self._clock = clock
        self._ttl_s = ttl_s
        self._random64 = random64
        self._open: OrderedDict[int, _Lease] = OrderedDict()  # by expiry, soonest first
        self._past: OrderedDict[int, None] = OrderedDict()
        self.counters = LeaseCounters()

    @property
    def num_active(self) -> int:
        return len(self._open)

    def open(self, label: str) -> int:
        """A new lease without blocks; `label` names it in the ledger. Returns its non-zero id."""
        lease_id = 0
        while not lease_id or lease_id in self._open or lease_id in self._past:
            lease_id = self._random64()
        now = self._clock.now()
        self._open[lease_id] = _Lease(label, now, now + self._ttl_s)
        self.counters.opened += 1
        return lease_id

    def extend(self, lease_id: int, group: str, block_ids: Sequence[int]) -> None:
        """Pin blocks before they are announced, and renew. LeaseLostError if the lease has ended."""
        lease = self._live(lease_id)
        self._cache.lease_pin(lease_id, group, block_ids)
        lease.num_blocks += len(block_ids)
        self._renew(lease_id, lease)

    def renew(self, lease_id: int) -> None:
        """Give a lease its whole time again. LeaseLostError if it has ended."""
        self._renew(lease_id, self._live(lease_id))

    def release(self, lease_id: int) -> bool:
        """End a lease for its reader. False, and a counter, if it has ended before or was never ours."""
        if self._open.pop(lease_id, None) is None:
            if lease_id in self._past:
                self.counters.repeated += 1
            else:
                self.counters.lost += 1
            return False
        self._end(lease_id)
        self.counters.released += 1
        return True

    def expire(self) -> list[int]:
        """End the leases whose time is over; returns their ids."""
        now = self._clock.now()
        ids = []
        for lease_id, lease in self._open.items():
            if lease.expires_at > now:
                break
            ids.append(lease_id)
        for lease_id in ids:
            del self._open[lease_id]
            self._end(lease_id)
        self.counters.expired += len(ids)
        return ids

    def next_deadline(self) -> float | None:
        """When the first open lease expires, on the clock given; None if there is none."""
        return next(iter(self._open.values())).expires_at if self._open else None

    def snapshot(self) -> list[LeaseInfo]:
        """The open leases, soonest expiry first."""
        return [LeaseInfo(i, x.label, x.opened_at, x.expires_at, x.num_blocks) for i, x in self._open.items()]

    def _live(self, lease_id: int) -> _Lease:
        lease = self._open.get(lease_id)
        if lease is None or lease.expires_at <= self._clock.now():
            if lease is None and lease_id not in self._past:
                self.counters.lost += 1
            raise LeaseLostError(f"lease {lease_id:#x} is not open")
        return lease

    def _renew(self, lease_id: int, lease: _Lease) -> None:
        lease.expires_at = self._clock.now() + self._ttl_s
        self._open.move_to_end(lease_id)

    def _end(self, lease_id: int) -> None:
        self._cache.lease_unpin(lease_id)
        self._past[lease_id] = None
        if len(self._past) > REMEMBERED:
            self._past.popitem(last=False)
