"""Embeddings in the memory of this process, for offline use: handles that only their maker resolves."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from common.engine.media import Fetched
from common.errors import NotFoundError
from common.types import EmbeddingHandle
from common.types.prefix import HASH_NBYTES

OWNER = "local"


class LocalMedia:
    """Owns rows from `put` to `drop`. A `MediaSource`."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._rows: dict[int, Tensor] = {}
        self._ended: list[Fetched] = []

    def put(self, position: int, rows_NW: Tensor, grid: Sequence[int], media_hash: bytes = b"") -> EmbeddingHandle:
        """A handle for rows that take the place of the tokens from `position` on.

        `rows_NW`: floating point, [embedding | deepstack features] by row. `grid`: rows by time, height and width.
        `media_hash`: 16 bytes that name the image; made from the rows where it is not given. Raises ValueError for
        what is none of these: whether they fit a prompt and a model is for `common.engine.media` to say.
        """
        if not isinstance(rows_NW, Tensor) or rows_NW.dim() != 2 or rows_NW.layout != torch.strided:
            raise ValueError("the rows of an image are a dense tensor [num_tokens, width]")
        try:
            first, (time, height, width) = operator.index(position), map(operator.index, grid)
        except (TypeError, ValueError):
            raise ValueError(
                "an image's position is a whole number, and its grid three: rows by time, height and width; "
                f"got {position!r} and {grid!r}"
            ) from None
        lease_id, sizes = next(self._ids), (time, height, width)
        rows_NW = rows_NW.detach().cpu().contiguous()
        self._rows[lease_id] = rows_NW
        return EmbeddingHandle(
            owner_id=OWNER,
            owner_epoch=0,
            owner_address="",
            lease_id=lease_id,
            media_hash=media_hash or _hash(rows_NW, sizes),
            position=first,
            num_tokens=rows_NW.shape[0],
            grid=sizes,
            hidden_size=rows_NW.shape[1],
            dtype=str(rows_NW.dtype).removeprefix("torch."),
            descriptor=b"",
            digest=0,
            transport="memory",
            remaining_ms=0,
        )

    def drop(self, handle: EmbeddingHandle) -> None:
        """Forget the rows; a fetch after that fails."""
        self._rows.pop(handle.lease_id, None)

    def fetch(self, ticket: int, handle: EmbeddingHandle) -> None:
        rows_NW = self._rows.get(handle.lease_id) if handle.owner_id == OWNER else None
        error = None if rows_NW is not None else NotFoundError("an image's embeddings are not here", param="embeddings")
        self._ended.append(Fetched(ticket, rows_NW, error))

    def cancel(self, ticket: int) -> None:
        self._ended = [f for f in self._ended if f.ticket != ticket]

    def poll(self) -> Sequence[Fetched]:
        ended, self._ended = self._ended, []
        return ended

    def next_deadline(self) -> float:
        return -math.inf if self._ended else math.inf


def _hash(rows_NW: Tensor, grid: tuple[int, int, int]) -> bytes:
    h = hashlib.blake2b(repr((grid, rows_NW.shape[1], rows_NW.dtype)).encode(), digest_size=HASH_NBYTES)
    h.update(rows_NW.view(torch.uint8).numpy().tobytes())
    return h.digest()
