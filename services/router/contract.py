"""A decode worker as the network offers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.rpc.codec import StepRows
from common.types import GenerationRequest, WorkerRef
from services.router.outbox import Cancels, Positions
from services.router.submits import Answer


class DecodeStream(Protocol):
    """One attempt at a stream. Every method raises an error of the tree when it is broken or was closed."""

    async def attach(self, epoch: int, positions: Positions) -> tuple[int, Sequence[int]]:
        """The worker's epoch and the slots it does not know."""
        ...

    async def read(self) -> StepRows: ...

    async def send(self, cancels: Cancels, acks: Positions) -> None: ...

    def close(self) -> None: ...


class DecodePeer(Protocol):
    def submit(self, request: GenerationRequest, prefill: WorkerRef | None, timeout_s: float, answer: Answer) -> None:
        """`answer` gets the slot or an error, later. Raises `InvalidRequestError` for what cannot be sent at all."""
        ...

    def open_stream(self) -> DecodeStream: ...

    async def close(self) -> None: ...
