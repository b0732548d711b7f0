"""One step as plain arrays: what the runner needs and nothing of sequences or the cache. No torch.

Rows are sequences; tokens of all rows lie one after the other. Rows with no new token (their last hidden
row was handed over) take part in sampling only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.engine.media import MediaRows
from common.types import SamplingParams


class SampleRow(msgspec.Struct, frozen=True, gc=False):
    """What the draw of one token depends on, beside its logits."""

    seed: int
    choice: int
    output_index: int
    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    stop_ids: frozenset[int]


class BatchRow(msgspec.Struct, frozen=True, gc=False):
    """Compute `token_ids` from position `start`. `tables`: block ids by group, at least up to the last position.

    `samples`: draws from the last rows, one for each: from the last row alone, or also from those of drafts.
    `states`: by snapshot group of the model, the block with the sequence's state. `pending`: the last token is the
    one that this draw of the step before gives; what `token_ids` has there is not looked at. `pools`: the hidden row of
    the last token is wanted on the host, after the final norm.
    """

    token_ids: Sequence[int]
    start: int
    tables: Mapping[str, Sequence[int]]
    samples: Sequence[SampleRow] = ()
    tail_read: int = -1  # tail block that holds this row's last hidden row
    tail_write: int = -1  # tail block that takes it
    prompt_logprobs: int = -1  # alternatives per prompt token; -1 is none
    prompt_targets: Sequence[int] = ()  # token after each new token, as far as the prompt goes
    media: Sequence[MediaRows] = ()  # images among the new tokens
    rope_positions_3T: NDArray[np.int64] | None = None  # of the new tokens, where they are not their indices
    states: Mapping[str, int] = msgspec.field(default_factory=dict)
    pending: int = -1
    pools: bool = False


class RowMasks(NamedTuple):
    """What grammars allow in draws `rows_G` of a step.

    `words_GW`: int32 [G, ceil(vocab / 32)], token t at bit t % 32 of word t // 32.
    """

    rows_G: NDArray[np.int64]
    words_GW: NDArray[np.int32]


@dataclass(frozen=True)
class GroupArrays:
    tables_SB: NDArray[np.int32]
    slots_T: NDArray[np.int64]
    block_size: int
    window: int


@dataclass(frozen=True)
class BatchMedia:
    """`rows_N`: indices in T of tokens that images stand for; `parts`: what they take, one after the other.

    `rope_positions_3T`: of all tokens; None where every one turns by its index.
    """

    rows_N: NDArray[np.int64]
    parts: Sequence[MediaRows]
    rope_positions_3T: NDArray[np.int64] | None


@dataclass(frozen=True)
class Batch:
    """`last_rows[i]`: index in T of row i's last token, -1 for rows without new tokens.

    `input_ids_T` is 0 for the tokens that images stand for. `media`: None where no image is in the step or before.
    `states_S`: blocks by group. `pending_T`: draws of the step before that give tokens, -1 for those that are known;
    None where all are.
    """

    rows: Sequence[BatchRow]
    input_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    query_starts_S1: NDArray[np.int32]
    seq_lens_S: NDArray[np.int32]
    max_query_len: int
    max_seq_len: int
    groups: Mapping[str, GroupArrays]
    last_rows: Sequence[int] = field(default_factory=list)
    media: BatchMedia | None = None
    states_S: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    pending_T: NDArray[np.int64] | None = None


def build_batch(rows: Sequence[BatchRow], groups: Mapping[str, tuple[int, int]]) -> Batch:
    """Lay out a step. `groups` maps each positional group to (block size, window)."""
    active = [r for r in rows if r.token_ids]
    counts = np.fromiter((len(r.token_ids) for r in active), np.int32, len(active))
    starts = np.fromiter((r.start for r in active), np.int64, len(active))
    query_starts = np.zeros(len(active) + 1, np.int32)
    np.cumsum(counts, out=query_starts[1:])
    total = int(query_starts[-1])
    input_ids = np.fromiter((t for r in active for t in r.token_ids), np.int64, total)
    row_of_T = np.repeat(np.arange(len(active)), counts)
    positions = np.arange(total, dtype=np.int64) - query_starts[row_of_T] + starts[row_of_T]
    media = _media(active, query_starts, positions)
    if media is not None:
        input_ids[media.rows_N] = 0  # a placeholder may lie past the vocabulary
    seq_lens = (starts + counts).astype(np.int32)
    max_seq_len = int(seq_lens.max(initial=0))
    arrays = {}
    for name, (block_size, window) in groups.items():
        tables = _tables([r.tables[name] for r in active], -(-seq_lens // block_size))
        slots = tables[row_of_T, positions // block_size].astype(np.int64) * block_size + positions % block_size
        arrays[name] = GroupArrays(tables, slots, block_size, window)
    states = active[0].states if active else ()
    last_rows, index = [], 0
    for r in rows:
        index += len(r.token_ids)
        last_rows.append(index - 1 if r.token_ids else -1)
    return Batch(
        rows=rows,
        input_ids_T=input_ids,
        positions_T=positions,
        query_starts_S1=query_starts,
        seq_lens_S=seq_lens,
        max_query_len=int(counts.max(initial=0)),
        max_seq_len=max_seq_len,
        groups=arrays,
        last_rows=last_rows,
        media=media,
        states_S={name: np.fromiter((r.states[name] for r in active), np.int64, len(active)) for name in states},
        pending_T=_pending(active, query_starts),
    )


def _tables(blocks: Sequence[Sequence[int]], counts_S: NDArray[np.int32]) -> NDArray[np.int32]:
    """The first `counts_S` blocks of each sequence, 0 where none is held and behind the last: [S, largest count]."""
    held = [ids[:count] for ids, count in zip(blocks, counts_S.tolist(), strict=True)]
    lengths = np.fromiter(map(len, held), np.int64, len(held))
    tables = np.zeros((len(held), int(counts_S.max(initial=0))), np.int32)
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = np.fromiter(
        itertools.chain.from_iterable(held), np.int32, int(lengths.sum())
    )
    return np.maximum(tables, 0, out=tables)


def _pending(active: Sequence[BatchRow], query_starts_S1: NDArray[np.int32]) -> NDArray[np.int64] | None:
    draws = np.fromiter((r.pending for r in active), np.int64, len(active))
    if not len(draws) or draws.max() < 0:
        return None
    out = np.full(query_starts_S1[-1], -1, np.int64)
    out[query_starts_S1[1:] - 1] = draws
    return out


def _media(
    active: Sequence[BatchRow], query_starts_S1: NDArray[np.int32], positions_T: NDArray[np.int64]
) -> BatchMedia | None:
    """Put together what the rows say of images."""
    if not any(r.media or r.rope_positions_3T is not None for r in active):
        return None
    rows: list[int] = []
    parts: list[MediaRows] = []
    turned = None
    for first, row in zip(query_starts_S1.tolist(), active, strict=False):
        for part in row.media:
            rows += range(first + part.first, first + part.first + len(part.rows_NW))
            parts.append(part)
        if row.rope_positions_3T is not None:
            if turned is None:
                turned = np.tile(positions_T, (3, 1))
            turned[:, first : first + len(row.token_ids)] = row.rope_positions_3T
    return BatchMedia(np.array(rows, np.int64), parts, turned)
