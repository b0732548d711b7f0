"""The policies: pure functions of a view and a request's features, and of the random numbers passed in.

cost          the pair with the lowest predicted time (`cost`), spread evenly where a prefix is hot
deadline      of the pairs predicted to bring the first token in time the one with least work; if none is, the fastest
prefix        the longest cached prefix among the workers that had no more than their share; then the least tokens
session       the worker that the caller's key hashes to (rendezvous hashing: few keys move when workers come and go)
least_tokens  the fewest tokens to compute and to make
power_of_two  of two workers drawn at random the one with fewer requests
round_robin   one after the other
random        any

A decode worker and a prefill worker are chosen together by `cost` and `deadline`, which also leave the prefill worker
out where that is predicted to be faster; the others choose each of the two by their rule. In a large cluster a choice
looks at `MAX_SEATS` workers of each kind: those with hits first, and a random run of the others.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Sequence
from typing import Final

from common.errors import UnavailableError
from common.types import Role, WorkerRef
from services.router.routing.cost import ALONE, cheapest, local_terms, remote_terms, stays
from services.router.routing.view import Choice, Features, Seat, View, hit_of

MAX_SEATS: Final = 64
MAX_HIT_SEATS: Final = 16
MOST_DECODE: Final = 8  # decode workers that `deadline` looks at closely, with `MOST_PREFILL` each
MOST_PREFILL: Final = 4
_MASK: Final = 2**64 - 1

Pick = Callable[[View, Role, Sequence[Seat], Features, random.Random], Seat]


def choose(
    view: View,
    features: Features,
    rng: random.Random,
    *,
    policy: str = "cost",
    avoid: Collection[WorkerRef] = (),
) -> Choice:
    """The pair for a request. Workers in `avoid` are never taken. `UnavailableError` if no decode worker is left."""
    decode: Sequence[Seat] = (
        view.decode if not avoid else [seat for seat in view.decode if seat.worker.ref not in avoid]
    )
    if not decode:
        raise UnavailableError("no decode worker is ready")
    if policy in ("cost", "deadline"):
        decode = _narrowed(view, decode, features, rng)
        return _paired(view, decode, features, rng, policy, avoid)
    pick = _PICKS[policy]
    chosen = pick(view, Role.DECODE, _narrowed(view, decode, features, rng, policy), features, rng)
    prefill = _prefill_for(view, chosen, features, avoid)
    hit = hit_of(features.hits, chosen.bit)
    if not prefill or stays(chosen, features, hit):
        return Choice(chosen, None, hit, 0)
    helper = pick(view, Role.PREFILL, _narrowed(view, prefill, features, rng, policy), features, rng)
    return Choice(chosen, helper, hit, hit_of(features.hits, helper.bit))


def _prefill_for(view: View, decode: Seat, features: Features, avoid: Collection[WorkerRef]) -> Sequence[Seat]:
    seats = view.prefill.get(decode.worker.model.model_hash, ()) if features.remote else ()
    return seats if not avoid else [seat for seat in seats if seat.worker.ref not in avoid]


def _narrowed(
    view: View, seats: Sequence[Seat], features: Features, rng: random.Random, policy: str = ""
) -> Sequence[Seat]:
    """At most `MAX_SEATS`: some with hits, and a run of the others from a random place on."""
    if len(seats) <= MAX_SEATS or policy in ("round_robin", "session", "random", "power_of_two"):
        return seats
    role = seats[0].worker.role
    found: list[Seat] = []
    for _, mask in features.hits:
        while mask and len(found) < MAX_HIT_SEATS:
            bit = mask & -mask
            mask ^= bit
            seat = view.by_bit.get(bit)
            if seat is not None and seat.worker.role is role:
                found.append(seat)
    start, room = int(rng.random() * len(seats)), MAX_SEATS - len(found)
    return [*found, *seats[start : start + room], *seats[: max(start + room - len(seats), 0)]]


# -- pairs -------------------------------------------------------------------------------------------


def _paired(
    view: View,
    decode: Sequence[Seat],
    features: Features,
    rng: random.Random,
    policy: str,
    avoid: Collection[WorkerRef],
) -> Choice:
    """All of one model's hash are compared; where a name stands for several, the first one drawn is taken."""
    model_hash = decode[0].worker.model.model_hash
    if len(view.model_hashes) > 1:
        model_hash = decode[int(rng.random() * len(decode))].worker.model.model_hash
        decode = [seat for seat in decode if seat.worker.model.model_hash == model_hash]
    prefill = _narrowed(view, _prefill_for(view, decode[0], features, avoid), features, rng)
    if policy == "deadline":
        return _in_time(view, decode, prefill, features, rng)
    return cheapest(view, decode, prefill, features, rng.random())


def _in_time(
    view: View, decode: Sequence[Seat], prefill: Sequence[Seat], features: Features, rng: random.Random
) -> Choice:
    """The best fit: of what is in time the least work, even behind a queue: idle workers are for those in need."""
    limits_s = (view.limit_s(Role.DECODE), view.limit_s(Role.PREFILL))
    helpers = heapq.nsmallest(
        MOST_PREFILL,
        prefill,
        key=lambda p: (p.queue_tokens + features.prompt_tokens - hit_of(features.hits, p.bit)) / p.prefill_rate,
    )
    if len(decode) > MOST_DECODE:
        decode = heapq.nsmallest(MOST_DECODE, decode, key=lambda seat: _local_s(seat, features))
    best: tuple[bool, float, float] | None = None
    chosen: list[Choice] = []
    for seat in decode:
        hit = hit_of(features.hits, seat.bit)
        remote = bool(helpers) and not stays(seat, features, hit)
        options = []
        if not (remote and features.separate):
            terms = local_terms(seat, features, hit, limits_s[0], alone=ALONE if remote else 1.0)
            options.append((Choice(seat, None, hit, 0), terms))
        if remote:
            for helper in helpers:
                own = hit_of(features.hits, helper.bit)
                options.append(
                    (Choice(seat, helper, hit, own), remote_terms(seat, helper, features, hit, own, limits_s))
                )
        for choice, terms in options:
            late = terms.ttft_s > features.ttft_s
            key = (late, terms.ttft_s if late else terms.total_s - terms.queue_s, terms.total_s)
            if best is None or key < best:
                best, chosen = key, [choice]
            elif key == best:
                chosen.append(choice)
    return chosen[int(rng.random() * len(chosen))]


def _local_s(seat: Seat, features: Features) -> float:
    """A rough order of decode workers, by what they would do alone."""
    tokens = seat.queue_tokens + features.prompt_tokens - hit_of(features.hits, seat.bit)
    return tokens / seat.prefill_rate + seat.open_requests * seat.step_s


# -- one worker at a time ----------------------------------------------------------------------------


def _least(seats: Sequence[Seat], key: Callable[[Seat], float], rng: random.Random) -> Seat:
    keys = [key(seat) for seat in seats]
    low = min(keys)
    tied = [seat for seat, value in zip(seats, keys, strict=True) if value == low]
    return tied[int(rng.random() * len(tied))]


def _round_robin(view: View, role: Role, seats: Sequence[Seat], features: Features, rng: random.Random) -> Seat:
    return seats[features.turn % len(seats)]


def _random(view: View, role: Role, seats: Sequence[Seat], features: Features, rng: random.Random) -> Seat:
    return seats[int(rng.random() * len(seats))]


def _power_of_two(view: View, role: Role, seats: Sequence[Seat], features: Features, rng: random.Random) -> Seat:
    one = int(rng.random() * len(seats))
    other = (one + 1 + int(rng.random() * (len(seats) - 1))) % len(seats) if len(seats) > 1 else one
    return min(seats[one], seats[other], key=lambda seat: seat.open_requests / seat.slots)


def _least_tokens(view: View, role: Role, seats: Sequence[Seat], features: Features, rng: random.Random) -> Seat:
    return _least(seats, lambda seat: seat.open_tokens, rng)


def _session(view: View, role: Role, seats: Sequence[Seat], features: Features, rng: random.Random) -> Seat:
    """Without a key, the fewest tokens; a full worker's keys go to their second choice."""
    if not features.session:
        return _least_tokens(view, role, seats, features, rng)
    open_seats = [seat for seat in seats if seat.open_requests < seat.slots] or seats
    return max(open_seats, key=lambda seat: _mixed(features.session ^ seat.salt))


def _mixed(x: int) -> int:
    """The finaliser of splitmix64: every bit of the input changes half of the output's."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _prefix(view: View, role: Role, seats: Sequence[Seat], features: Features, rng: random.Random) -> Seat:
    limit_s = view.limit_s(role)
    even = [seat for seat in seats if seat.recent_s <= limit_s and seat.open_requests < seat.slots] or seats
    return _least(even, lambda seat: seat.open_tokens * 1e-9 - hit_of(features.hits, seat.bit), rng)


_PICKS: Final[dict[str, Pick]] = {
    "round_robin": _round_robin,
    "random": _random,
    "power_of_two": _power_of_two,
    "least_tokens": _least_tokens,
    "session": _session,
    "prefix": _prefix,
}
