"""What the hand-off needs of the block manager: verbs on block states, and tables.

Reader: live --begin_read--> in flight --end_read--> live (or free, if detached or closed meanwhile).
Owner: live or cached --lease_pin--> leased --lease_unpin--> as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CacheView(Protocol):
    """The part of the KV cache manager that leases, publisher and reader use."""

    def block_table(self, seq_id: int, group: str) -> list[int]:
        """Logical block index -> block id, -1 where not held.

        The last held entry of a snapshot group is the snapshot of the sequence's end. KeyError for a
        sequence that is closed.
        """

    def begin_read(self, read_id: int, group: str, block_ids: Sequence[int]) -> None:
        """These live blocks become in flight: nobody reads, writes or frees them."""

    def end_read(self, read_id: int) -> None:
        """Nothing can land in the read's blocks any more."""

    def lease_pin(self, lease_id: int, group: str, block_ids: Sequence[int]) -> None:
        """Keep these blocks as they are until `lease_unpin`, whatever becomes of their sequence."""

    def lease_unpin(self, lease_id: int) -> None:
        """Undo every pin of a lease. Idempotent."""

    def block_digests(self, group: str, block_id: int) -> tuple[int, ...] | None:
        """Digests stored with a sealed full block, None if there are none."""

    def set_block_digests(self, group: str, block_id: int, digests: tuple[int, ...]) -> None:
        """Store digests with a sealed full block; they go when its content goes."""
