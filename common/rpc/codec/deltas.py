"""What one engine step brought: rows of (slot, ChoiceDelta) <-> the columns of StepDeltas.

Columns are filled with one `extend` of a flat list each: building nested messages costs 20 times more.
Every row is one (request, choice) that got tokens or ended; `token_ids` is flat over all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from common.rpc.codec import checks
from common.rpc.codec.errors import failure_from_proto, failure_to_proto
from common.rpc.codec.request import stats_from_proto, stats_to_proto
from common.types import ChoiceDelta, Failure, FinishReason, RequestStats, TokenLogprobs
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import types_pb2

_FINISH_TO_WIRE: dict[FinishReason | None, types_pb2.FinishReason] = {
    None: types_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: types_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE: dict[int, FinishReason | None] = {number: reason for reason, number in _FINISH_TO_WIRE.items()}


class Rows:
    """The rows of a step in the columns they came in, checked. Iterating gives (slot, ChoiceDelta).

    `singles`: a row's token where the row is that and nothing else, -1 where it has more to say. Most rows are one
    token, and who takes them from the columns makes no object of each.
    """

    __slots__ = (
        "_ends",
        "_finishes",
        "_logprobs",
        "_stops",
        "_tokens",
        "_vectors",
        "choices",
        "positions",
        "singles",
        "slots",
    )

    def __init__(self, deltas: pb.StepDeltas) -> None:
        self.slots, self.choices, self.positions = deltas.slots[:], deltas.choices[:], deltas.positions[:]
        counts, finishes, stops = deltas.num_tokens[:], deltas.finish_reasons[:], deltas.stop_token_ids[:]
        tokens = deltas.token_ids[:]
        checks.equal_lengths(
            "deltas",
            slots=self.slots,
            choices=self.choices,
            positions=self.positions,
            num_tokens=counts,
            finish_reasons=finishes,
            stop_token_ids=stops,
        )
        if counts.count(1) == len(counts):
            self._ends: Sequence[int] = range(1, len(counts) + 1)
        else:
            self._ends = list(accumulate(counts))
        if (self._ends[-1] if counts else 0) != len(tokens):
            raise checks.fail("deltas.token_ids", f"has {len(tokens)} entries, num_tokens add up to {sum(counts)}")
        self._finishes, self._stops, self._tokens = finishes, stops, tokens
        for number in set(finishes):
            checks.enum_value(_FINISH_FROM_WIRE, number, "deltas.finish_reasons")
        self._logprobs = _logprobs_by_row(deltas, counts) if deltas.logprobs else {}
        self._vectors = _vectors_by_row(deltas, finishes) if deltas.vectors else {}
        self.singles = self._find_singles(counts)

    def _find_singles(self, counts: Sequence[int]) -> Sequence[int]:
        if isinstance(self._ends, range):
            singles = self._tokens[:]
        else:
            singles = [
                self._tokens[end - 1] if count == 1 else -1 for count, end in zip(counts, self._ends, strict=True)
            ]
        for column in (self._finishes, self._stops):
            if any(column):
                for row, value in enumerate(column):
                    if value:
                        singles[row] = -1
        for rows in (self._logprobs, self._vectors):
            for row in rows:
                singles[row] = -1
        return singles

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[tuple[int, ChoiceDelta]]:
        return ((slot, self.delta(row)) for row, slot in enumerate(self.slots))

    def delta(self, row: int) -> ChoiceDelta:
        token_id, stop = self.singles[row], self._stops[row]
        if token_id >= 0:
            return ChoiceDelta(choice=self.choices[row], position=self.positions[row], token_ids=(token_id,))
        return ChoiceDelta(
            choice=self.choices[row],
            position=self.positions[row],
            token_ids=tuple(self._tokens[self._ends[row - 1] if row else 0 : self._ends[row]]),
            finish=_FINISH_FROM_WIRE[self._finishes[row]],
            stop_token_id=stop - 1 if stop else None,
            logprobs=self._logprobs.get(row),
            vector=self._vectors.get(row, b""),
        )


class StepRows(NamedTuple):
    """One decoded StepDeltas; the first member of each pair is the slot."""

    rows: Rows
    failures: list[tuple[int, Failure]]
    stats: list[tuple[int, RequestStats]]
    prompt_logprobs: list[tuple[int, TokenLogprobs]]


def deltas_to_proto(
    rows: Sequence[tuple[int, ChoiceDelta]],
    failures: Collection[tuple[int, Failure]] = (),
    stats: Collection[tuple[int, RequestStats]] = (),
    prompt_logprobs: Collection[tuple[int, TokenLogprobs]] = (),
) -> pb.StepDeltas:
    out = pb.StepDeltas()
    if rows:
        _fill_columns(out, rows)
    if failures:
        out.errors.extend([pb.ErrorRow(slot=slot, error=failure_to_proto(f)) for slot, f in failures])
    if stats:
        out.stats.extend([pb.StatsRow(slot=slot, stats=stats_to_proto(s)) for slot, s in stats])
    if prompt_logprobs:
        out.prompt_logprobs.extend([_prompt_logprobs_to_proto(slot, p) for slot, p in prompt_logprobs])
    return out


def _fill_columns(out: pb.StepDeltas, rows: Sequence[tuple[int, ChoiceDelta]]) -> None:
    """In one pass over the rows: one for each column costs half as much again."""
    choices, positions, counts = [], [], []
    token_ids: list[int] = []
    finishes, stops = [types_pb2.FINISH_REASON_UNSPECIFIED] * len(rows), [0] * len(rows)
    for i, (_, delta) in enumerate(rows):
        choices.append(delta.choice)
        positions.append(delta.position)
        counts.append(len(delta.token_ids))
        token_ids += delta.token_ids
        if delta.finish is not None:
            finishes[i] = _FINISH_TO_WIRE[delta.finish]
        if delta.stop_token_id is not None:
            stops[i] = delta.stop_token_id + 1
        if delta.logprobs is not None:
            out.logprobs.append(_logprobs_to_proto(i, delta.logprobs))
        if delta.vector:
            out.vectors.append(pb.VectorRow(row=i, values=delta.vector))
    out.slots.extend([slot for slot, _ in rows])
    out.choices.extend(choices)
    out.positions.extend(positions)
    out.num_tokens.extend(counts)
    out.finish_reasons.extend(finishes)
    out.stop_token_ids.extend(stops)
    out.token_ids.extend(token_ids)


def deltas_from_proto(deltas: pb.StepDeltas) -> StepRows:
    return StepRows(
        Rows(deltas),
        [(row.slot, failure_from_proto(row.error)) for row in deltas.errors],
        [(row.slot, stats_from_proto(row.stats)) for row in deltas.stats],
        [(row.slot, _prompt_logprobs_from_proto(row)) for row in deltas.prompt_logprobs],
    )


def _logprobs_to_proto(row: int, logprobs: TokenLogprobs) -> pb.LogprobRow:
    return pb.LogprobRow(
        row=row,
        token_logprobs=logprobs.token_logprobs,
        top_n=logprobs.top_n,
        top_token_ids=logprobs.top_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def _prompt_logprobs_to_proto(slot: int, logprobs: TokenLogprobs) -> pb.PromptLogprobRow:
    return pb.PromptLogprobRow(
        slot=slot,
        token_logprobs=logprobs.token_logprobs,
        top_n=logprobs.top_n,
        top_token_ids=logprobs.top_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def _logprobs_by_row(deltas: pb.StepDeltas, counts: Sequence[int]) -> dict[int, TokenLogprobs]:
    found: dict[int, TokenLogprobs] = {}
    for entry in deltas.logprobs:
        if entry.row >= len(counts) or entry.row in found:
            raise checks.fail("deltas.logprobs.row", f"{entry.row} is named twice or not below {len(counts)}")
        if len(entry.token_logprobs) != counts[entry.row]:
            have = len(entry.token_logprobs)
            raise checks.fail("deltas.logprobs.token_logprobs", f"has {have} entries for {counts[entry.row]} tokens")
        found[entry.row] = _token_logprobs(entry, "deltas.logprobs")
    return found


def _vectors_by_row(deltas: pb.StepDeltas, finishes: Sequence[int]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for entry in deltas.vectors:
        row, nbytes = entry.row, len(entry.values)
        if row >= len(finishes) or row in found or finishes[row] != types_pb2.FINISH_REASON_STOP:
            raise checks.fail("deltas.vectors.row", f"{row} is named twice or does not end by stop")
        if not nbytes or nbytes % 4:
            raise checks.fail("deltas.vectors.values", f"has {nbytes} bytes, which is no whole number of float32")
        found[row] = entry.values
    return found


def _prompt_logprobs_from_proto(row: pb.PromptLogprobRow) -> TokenLogprobs:
    return _token_logprobs(row, "deltas.prompt_logprobs")


def _token_logprobs(row: pb.LogprobRow | pb.PromptLogprobRow, field: str) -> TokenLogprobs:
    checks.equal_lengths(field, top_token_ids=row.top_token_ids, top_logprobs=row.top_logprobs)
    want = len(row.token_logprobs) * row.top_n
    if len(row.top_token_ids) != want:
        raise checks.fail(f"{field}.top_token_ids", f"has {len(row.top_token_ids)} entries, not {want}")
    return TokenLogprobs(tuple(row.token_logprobs), row.top_n, tuple(row.top_token_ids), tuple(row.top_logprobs))
