"""What the reader tells the engine about its orders, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from common.types import Failure


class Progress(msgspec.Struct, frozen=True):
    """Positions [0, num_verified) of the sequence can be used now."""

    seq_id: int
    num_verified: int


class TailRead(msgspec.Struct, frozen=True):
    """The sequence's last hidden row is verified, in its tail block. What else it needs may be on its way still."""

    seq_id: int


class Done(msgspec.Struct, frozen=True):
    """All positions and the tail row are verified and in live blocks.

    `read_seconds` moved the `nbytes`; `wait_seconds` passed between the owner's last event and now: the part
    of the transfer that computing did not hide.
    """

    seq_id: int
    nbytes: int
    read_seconds: float
    wait_seconds: float
    transport: str
    worker_id: str
    remote_cached_tokens: int
    queue_ms: float
    compute_ms: float


class Failed(msgspec.Struct, frozen=True):
    """The hand-off ended early; positions [0, num_verified) can be used, the rest must be computed here.

    Blocks past `num_verified` may still be in flight: advance the sequence to it first, then close the
    sequence or detach them.

    `reason` is one of few words, for metrics; `failure` is what the owner said if it ended the order.
    """

    seq_id: int
    reason: str
    num_verified: int
    detail: str = ""
    failure: Failure | None = None


HandoffUpdate = Progress | TailRead | Done | Failed


@dataclass
class HandoffCounters:
    """Totals since start. `late_events` came for orders that had ended, `unknown_events` for none of ours."""

    placed: int = 0
    done: int = 0
    cancelled: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    nbytes: int = 0
    read_seconds: float = 0.0  # moving those bytes, added up over reads, which may run beside each other
    mismatches: int = 0
    fences: int = 0
    late_events: int = 0
    unknown_events: int = 0
    unknown_reads: int = 0
    cold: Counter[str] = field(default_factory=Counter)  # hand-offs by optional region that the peer does not have
