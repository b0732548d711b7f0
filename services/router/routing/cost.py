"""Predicted time of a request on a pair of workers: queue + prefill of what is not cached + transfer + decode load.

With h tokens cached of a prompt of n, on a decode worker d alone

    (queue(d) + ALONE * work(n - h(d))) / prefill rate(d) * (1 + share of its batch in use, which is held up)
    + DECODE * output tokens * step(d) * (1 + share)

and with a prefill worker p, which computes from what either has on and sends what d lacks

    (queue(p) + work(n - max(h(p), h(d)))) / prefill rate(p)
    + HANDOFF_S + (n - h(d)) / transfer rate(d) + the same decode

work(m) is m tokens at `WORK` each, but those of a hot prefix at 1: to have it in one place more is no waste.

The pair's cost is a sum of one part each but for the two hits: for every hit that decode workers have, the cheapest of
them is enough, so D + P * (different hits) evaluations find the best of D * P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.types import Role
from services.router.routing.view import Choice, Features, Seat, Terms, View, hit_of

WORK = 3.0  # what a request has computed is waited for by itself and by those who come next
ALONE = 1.5  # more, on a decode worker where prefill workers are there: all its sequences wait meanwhile
DECODE = 0.25  # who decodes beside a request changes many times before it is over: what is seen now counts in part
BALANCE = 0.03  # of a seat's recent work: what is new goes where little was, before `UNEVEN_S` has to part prefixes
HANDOFF_S = 0.003  # an order to and fro, and the last read
FULL_S = 60.0  # no room for the prompt: only where there is none anywhere
UNEVEN_S = 30.0  # had more than its share of late: only where all had
MAX_HITS = 8  # different hits of decode workers that are tried with each prefill worker


def decode_s(seat: Seat, features: Features, hit: int, limit_s: float) -> float:
    """Time of the output, longer the fuller the batch."""
    share = seat.open_requests / seat.slots
    cost = DECODE * features.output_tokens * seat.step_s * (1.0 + share)
    if share >= 1.0:
        cost *= 1.0 + 2.0 * (share - 1.0) + 2.0 / seat.slots
    if seat.kv_tokens_free < features.prompt_tokens - hit:
        cost += FULL_S
    return cost + _uneven_s(seat, limit_s)


def _uneven_s(seat: Seat, limit_s: float) -> float:
    return BALANCE * seat.recent_s + (UNEVEN_S if seat.recent_s > limit_s else 0.0)


def local_terms(seat: Seat, features: Features, hit: int, limit_s: float, *, alone: float = 1.0) -> Terms:
    """`alone`: `ALONE` where it could be prefilled elsewhere."""
    slowed = (1.0 + min(seat.open_requests / seat.slots, 1.0)) / seat.prefill_rate
    return Terms(
        seat.queue_tokens * slowed,
        prefill_s := (features.prompt_tokens - hit) * slowed,
        0.0,
        decode_s(seat, features, hit, limit_s),
        prefill_s * (alone - 1.0) + (WORK - 1.0) * alone * _cold(features, features.prompt_tokens - hit) * slowed,
    )


def _cold(features: Features, missing: int) -> int:
    """Of the tokens to compute, those that hardly anybody else will ask for."""
    return min(missing, features.prompt_tokens - features.hot)


def remote_terms(
    decode: Seat, prefill: Seat, features: Features, decode_hit: int, prefill_hit: int, limits_s: tuple[float, float]
) -> Terms:
    """`limits_s`: of the decode worker and of the prefill worker."""
    missing = features.prompt_tokens - max(decode_hit, prefill_hit)
    uneven_s = _uneven_s(prefill, limits_s[1])
    return Terms(
        prefill.queue_tokens / prefill.prefill_rate,
        missing / prefill.prefill_rate,
        HANDOFF_S + (features.prompt_tokens - decode_hit) / decode.transfer_rate,
        decode_s(decode, features, decode_hit, limits_s[0]) + uneven_s,
        (WORK - 1.0) * _cold(features, missing) / prefill.prefill_rate,
    )


def stays(seat: Seat, features: Features, hit: int) -> bool:
    """Does the decode worker prefill it in any case? It keeps to itself what is short or well cached."""
    return not features.remote or features.prompt_tokens - hit < seat.min_remote_tokens


def cheapest(view: View, decode: Sequence[Seat], prefill: Sequence[Seat], features: Features, draw: float) -> Choice:
    """The pair with the lowest total; `draw` in [0, 1) settles ties. All seats are of one model; `decode` has some."""
    limit_s = view.limit_s(Role.DECODE)
    hits, n = features.hits, features.prompt_tokens
    cold, more = n - features.hot, WORK - 1.0
    best, ties = float("inf"), [Choice(decode[0], None, 0, 0)]
    by_hit: dict[int, tuple[float, list[Seat]]] = {}
    output = DECODE * features.output_tokens
    for seat in decode:  # `decode_s` and `local_terms`, written out: this is what a choice's time goes to
        hit = hit_of(hits, seat.bit) if hits else 0
        requests, waiting = float(seat.own_requests), float(seat.own_prefill_tokens)
        if seat.other_requests > 0.0:
            requests += seat.other_requests
        if seat.other_tokens > 0.0:
            waiting += seat.other_tokens
        share = requests / seat.slots
        load_s = output * seat.step_s * (1.0 + share)
        slowed = (1.0 + share) / seat.prefill_rate
        if share >= 1.0:
            load_s *= 1.0 + 2.0 * (share - 1.0) + 2.0 / seat.slots
            slowed = 2.0 / seat.prefill_rate
        if seat.kv_tokens_free < n - hit:
            load_s += FULL_S
        load_s += BALANCE * seat.recent_s
        if seat.recent_s > limit_s:
            load_s += UNEVEN_S
        remote = bool(prefill) and not stays(seat, features, hit)
        missing = n - hit
        work = missing + more * (missing if missing < cold else cold)
        total = (waiting + (ALONE * work if remote else work)) * slowed + load_s
        offered = not (remote and features.separate)
        if offered and total < best:
            best, ties = total, [Choice(seat, None, hit, 0)]
        elif offered and total == best:
            ties.append(Choice(seat, None, hit, 0))
        if remote:
            load_s += missing / seat.transfer_rate
            found = by_hit.get(hit)
            if found is None or load_s < found[0]:
                by_hit[hit] = (load_s, [seat])
            elif load_s == found[0]:
                found[1].append(seat)
    if by_hit:
        best, ties = _with_prefill(view, by_hit, prefill, features, best, ties, draw)
    return ties[int(draw * len(ties))]


def _with_prefill(
    view: View,
    by_hit: dict[int, tuple[float, list[Seat]]],
    prefill: Sequence[Seat],
    features: Features,
    best: float,
    ties: list[Choice],
    draw: float,
) -> tuple[float, list[Choice]]:
    limit_s, hits = view.limit_s(Role.PREFILL), features.hits
    cold, more = features.prompt_tokens - features.hot, WORK - 1.0
    tried = sorted(by_hit.items(), key=lambda entry: entry[1][0])[:MAX_HITS]
    for seat in prefill:
        own_hit = hit_of(hits, seat.bit) if hits else 0
        waiting = seat.queue_tokens
        uneven_s = _uneven_s(seat, limit_s)
        for hit, (load_s, seats) in tried:
            missing = features.prompt_tokens - (hit if hit > own_hit else own_hit)
            work = missing + more * (missing if missing < cold else cold)
            total = (waiting + work) / seat.prefill_rate + HANDOFF_S + load_s + uneven_s
            if total <= best:
                choice = Choice(seats[int(draw * len(seats))], seat, hit, own_hit)
                if total < best:
                    best, ties = total, [choice]
                else:
                    ties.append(choice)
    return best, ties
