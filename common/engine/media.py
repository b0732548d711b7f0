"""Images in an engine: their rows, from where a handle says they are to the steps that put them in. No torch here.

    open -> fetched from the source, all at once -> ready: the sequence may be computed here
        `-> one failure of its request or order

A request's rows stay until it ends: a preempted sequence computes its prompt again, and the lease on the encoder
may be over by then. What its tokens turn by follows from the handles alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidRequestError, NanoDeployError, UnsupportedError
from common.layers.media_positions import rope_positions
from common.layers.media_spec import MediaSpec
from common.types import Clock, EmbeddingHandle
from common.types.prefix import HASH_NBYTES

if TYPE_CHECKING:
    from torch import Tensor

OnFailure = Callable[[NanoDeployError], None]


@dataclass(frozen=True)
class Fetched:
    """The end of one fetch: rows [num_tokens, hidden_size] of its handle, on the host, or why there are none."""

    ticket: int
    rows_NW: Tensor | None
    error: NanoDeployError | None = None


class MediaSource(Protocol):
    """Where the rows of handles come from. Nothing here waits."""

    def fetch(self, ticket: int, handle: EmbeddingHandle) -> None:
        """Begin. One `Fetched` with this ticket comes from a later `poll`, unless it is cancelled before."""

    def cancel(self, ticket: int) -> None:
        """Nobody wants it any more; unknown tickets are ignored."""

    def poll(self) -> Sequence[Fetched]:
        """What ended since the last call."""

    def next_deadline(self) -> float:
        """Instant at which `poll` must run even if nothing is reported, inf for never."""


@dataclass(frozen=True)
class MediaRows:
    """Rows for tokens `first`, `first` + 1 ... of those that a sequence computes in a step."""

    first: int
    rows_NW: Tensor


@dataclass(eq=False)
class MediaEmbeds:
    """The images of one request, shared by its choices. `rows[i]` of `handles[i]`, None until it has come."""

    handles: tuple[EmbeddingHandle, ...]
    takes_grid: bool
    opened_at: float
    on_failure: OnFailure
    rows: list[Tensor | None]
    tickets: dict[int, int] = field(default_factory=dict)  # of fetches under way -> index of the handle

    @property
    def ready(self) -> bool:
        return not self.tickets

    def handles_at(self, now: float) -> tuple[EmbeddingHandle, ...]:
        """The handles as they are to be passed on: time has run off their leases."""
        aged_ms = int((now - self.opened_at) * 1e3)
        return tuple(
            msgspec.structs.replace(h, remaining_ms=max(h.remaining_ms - aged_ms, 1)) if h.remaining_ms else h
            for h in self.handles
        )

    def rows_between(self, start: int, end: int) -> list[MediaRows]:
        """What tokens [start, end) of the sequence take."""
        out = []
        for handle, rows_NW in zip(self.handles, self.rows, strict=True):
            first, last = max(handle.position, start), min(handle.position + handle.num_tokens, end)
            if first < last:
                assert rows_NW is not None, "computed before its rows came"
                out.append(MediaRows(first - start, rows_NW[first - handle.position : last - handle.position]))
        return out

    def rope_positions(self, start: int, end: int) -> NDArray[np.int64] | None:
        """int64 [3, end - start] for tokens [start, end); None for a model that turns by their index."""
        return rope_positions(self.handles, start, end) if self.takes_grid else None


def media_hashes(handles: Sequence[EmbeddingHandle]) -> tuple[tuple[int, bytes], ...]:
    """What prefix hashing must know of images."""
    return tuple((h.position, h.media_hash) for h in handles)


def outside(token_ids: Sequence[int], handles: Sequence[EmbeddingHandle]) -> list[int]:
    """The tokens that no image stands for."""
    out: list[int] = []
    end = 0
    for handle in handles:
        out += token_ids[end : handle.position]
        end = handle.position + handle.num_tokens
    return [*out, *token_ids[end:]]


class Media:
    """Owns the fetches of one engine. `spec` None: the model takes no images. `source` None: nobody can fetch them."""

    def __init__(self, spec: MediaSpec | None, hidden_size: int, source: MediaSource | None, clock: Clock) -> None:
        self._spec = spec
        self._row_width = spec.row_width(hidden_size) if spec is not None else 0
        self._source = source
        self._clock = clock
        self._tickets = itertools.count(1)
        self._open: dict[int, MediaEmbeds] = {}  # by ticket of a fetch under way

    def check(self, handles: Sequence[EmbeddingHandle], token_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError for handles that do not fit the prompt or the model."""
        if not handles:
            return
        if self._spec is None:
            raise UnsupportedError("this model takes no images", param="embeddings")
        if self._source is None:
            raise UnsupportedError("this worker has no source of image embeddings", param="embeddings")
        end = 0
        for i, handle in enumerate(handles):
            wrong = self._wrong(handle, token_ids, end)
            if wrong:
                raise InvalidRequestError(f"embeddings[{i}] {wrong}", param="embeddings")
            end = handle.position + handle.num_tokens

    def _wrong(self, handle: EmbeddingHandle, token_ids: Sequence[int], end: int) -> str:
        assert self._spec is not None
        first, last = handle.position, handle.position + handle.num_tokens
        if not end <= first < last <= len(token_ids):
            return f"is at tokens [{first}, {last}) of {len(token_ids)}, or begins before token {end}"
        if handle.hidden_size != self._row_width:
            return f"has rows of {handle.hidden_size} elements; this model takes {self._row_width}"
        if len(handle.media_hash) != HASH_NBYTES:
            return f"has a media hash of {len(handle.media_hash)} bytes, not {HASH_NBYTES}"
        if min(handle.grid) < 1 or math.prod(handle.grid) != handle.num_tokens:
            return f"has a grid of {handle.grid} and {handle.num_tokens} rows"
        if not set(token_ids[first:last]) <= set(self._spec.placeholder_ids):
            return f"is at tokens [{first}, {last}), which are not all placeholders for images"
        return ""

    def open(self, handles: tuple[EmbeddingHandle, ...], on_failure: OnFailure) -> MediaEmbeds | None:
        """Begin to fetch; None for no images. `on_failure` may be called by a later `poll`, once."""
        if not handles:
            return None
        assert self._spec is not None
        assert self._source is not None
        embeds = MediaEmbeds(handles, self._spec.takes_grid, self._clock.now(), on_failure, [None] * len(handles))
        for index, handle in enumerate(handles):
            ticket = next(self._tickets)
            embeds.tickets[ticket] = index
            self._open[ticket] = embeds
            self._source.fetch(ticket, handle)
        return embeds

    def close(self, embeds: MediaEmbeds | None) -> None:
        """The request ended: stop what is under way, forget the rows. Idempotent."""
        if embeds is None or self._source is None:
            return
        for ticket in embeds.tickets:
            self._open.pop(ticket)
            self._source.cancel(ticket)
        embeds.tickets.clear()
        embeds.rows = [None] * len(embeds.rows)

    def poll(self) -> None:
        """Take what has come, and fail the requests whose rows will not."""
        if not self._open or self._source is None:
            return
        for fetched in self._source.poll():
            embeds = self._open.pop(fetched.ticket, None)
            if embeds is None:
                continue
            index = embeds.tickets.pop(fetched.ticket)
            error = fetched.error or self._misshapen(embeds.handles[index], fetched.rows_NW)
            if error is None:
                embeds.rows[index] = fetched.rows_NW
            else:
                self.close(embeds)
                embeds.on_failure(error)

    def _misshapen(self, handle: EmbeddingHandle, rows_NW: Tensor | None) -> NanoDeployError | None:
        shape = (handle.num_tokens, handle.hidden_size)
        if rows_NW is not None and tuple(rows_NW.shape) == shape and _is_plain_float(rows_NW):
            if bool(rows_NW.isfinite().all()):
                return None
            # what was computed from them would be found again under the image's hash
            return InvalidRequestError("an image's embeddings are not finite", param="embeddings")
        found = "nothing" if rows_NW is None else f"{rows_NW.dtype} {list(rows_NW.shape)}"
        expected = f"{list(shape)} of floating point, 16 bits or more"
        return InvalidRequestError(f"an image's embeddings are {found}, not {expected}", param="embeddings")

    @property
    def num_fetching(self) -> int:
        return len(self._open)

    @property
    def next_deadline(self) -> float:
        return self._source.next_deadline() if self._open and self._source is not None else math.inf


def _is_plain_float(rows_NW: Tensor) -> bool:
    """Shorter types have no arithmetic of their own, and their rows came without a scale."""
    return rows_NW.is_floating_point() and rows_NW.itemsize >= 2
