"""The ranks that share one model, and the place of this one among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.parallel.collectives import Collectives, make_collectives
from common.parallel.store import Rendezvous


@dataclass(frozen=True)
class Mesh:
    """`meeting` and `collectives` are None for one rank alone."""

    rank: int
    size: int
    device: torch.device
    meeting: Rendezvous | None = None
    collectives: Collectives | None = None

    def least(self, values: Sequence[int]) -> list[int]:
        """The least of all ranks, place by place; every rank asks."""
        return list(values) if self.meeting is None else self.meeting.least(values)

    def close(self) -> None:
        if self.collectives is not None:
            self.collectives.close()


def alone(device: torch.device) -> Mesh:
    return Mesh(0, 1, device)


def join(meeting: Rendezvous, rank: int, size: int, device: torch.device, timeout_s: float) -> Mesh:
    """Meet the other ranks. `timeout_s`: longest wait for one of them in a step on the CPU."""
    collectives = make_collectives(device, meeting, rank, size, timeout_s)
    return Mesh(rank, size, device, meeting, collectives)
