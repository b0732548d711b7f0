"""Choices as functions of plain data, and the board that counts for them."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from typing import Any

import msgspec
import pytest
from router_support import StaticMembers

from common.config.schema import RouterConfig
from common.errors import NotFoundError, UnavailableError
from common.types import (
    GenerationRequest,
    ModelInfo,
    RequestStats,
    Role,
    SamplingParams,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerState,
)
from services.router.routing.board import Board, Hints, Ticket
from services.router.routing.cost import ALONE, local_terms, remote_terms, stays
from services.router.routing.explain import explain
from services.router.routing.policies import MAX_SEATS, choose
from services.router.routing.view import Choice, Features, Seat, View

MODEL = ModelInfo(
    name="m",
    architecture="llama",
    model_hash=b"m" * 16,
    max_model_len=1 << 20,
    vocab_size=10,
    dtype="float32",
    path="",
    served_names=("alias",),
)
POLICIES = ("cost", "deadline", "prefix", "session", "least_tokens", "power_of_two", "round_robin", "random")


class HandClock:
    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return self.at


def worker(name: str, role: Role = Role.DECODE, state: WorkerState = WorkerState.READY, **load: Any) -> WorkerInfo:
    ref = WorkerRef(name, 1, f"{name}:1")
    facts = {"max_num_seqs": 10, "kv_block_size": 16, "device": "cuda:0"}
    return WorkerInfo(ref=ref, role=role, state=state, model=MODEL, load=WorkerLoad(**load), **facts)


def view_of(*workers: WorkerInfo) -> View:
    view = View()
    for i, info in enumerate(workers):
        view.add(Seat(info, 1 << i, 0x9E37 * (i + 1)))
    return view


def name_of(seat: Seat | None) -> str:
    return "" if seat is None else seat.worker.ref.worker_id


def pick(view: View, features: Features, policy: str = "cost", seed: int = 0) -> str:
    return name_of(choose(view, features, random.Random(seed), policy=policy).decode)


def test_the_least_loaded_is_chosen() -> None:
    features = Features(100)
    assert pick(view_of(worker("a", running=3), worker("b", running=1), worker("c", waiting=2)), features) == "b"
    assert pick(view_of(worker("a", waiting_tokens=500), worker("b", waiting_tokens=50)), features) == "b"
    own = view_of(worker("a"), worker("b"))
    own.decode[0].own_requests = 1
    assert pick(own, features) == "b"
    small = msgspec.structs.replace(worker("small", running=4), max_num_seqs=8)
    large = msgspec.structs.replace(worker("large", running=8), max_num_seqs=64)
    assert pick(view_of(small, large), features) == "large"


def test_a_worker_without_room_for_the_prompt_comes_last() -> None:
    full = worker("full", kv_blocks_total=100, kv_blocks_available=2)
    busy = worker("busy", running=9, kv_blocks_total=100, kv_blocks_available=50)
    assert pick(view_of(full, busy), Features(100)) == "busy"
    assert pick(view_of(full), Features(100)) == "full"


@pytest.mark.parametrize("policy", ["cost", "deadline", "prefix", "least_tokens", "power_of_two", "random"])
def test_ties_follow_the_random_source(policy: str) -> None:
    view = view_of(*(worker(name) for name in "abc"))
    assert pick(view, Features(100), policy, seed=5) == pick(view, Features(100), policy, seed=5)
    counts = Counter(pick(view, Features(100), policy, seed=seed) for seed in range(300))
    assert min(counts.values()) > 60


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_to_what_may_be_taken(policy: str) -> None:
    view = view_of(worker("a"), worker("b"), worker("p", Role.PREFILL), worker("q", Role.PREFILL))
    rng, features = random.Random(1), Features(1000)
    avoided = [seat.worker.ref for seat in (view.decode[0], view.prefill[MODEL.model_hash][0])]
    for _ in range(20):
        choice = choose(view, features, rng, policy=policy, avoid=avoided)
        assert name_of(choice.decode) == "b"
        assert name_of(choice.prefill) in ("", "q")
    with pytest.raises(UnavailableError):
        choose(view, features, rng, policy=policy, avoid=[seat.worker.ref for seat in view.decode])
    assert choose(view, Features(1000, remote=False), rng, policy=policy).prefill is None


def test_a_cached_prefix_is_worth_a_queue_of_its_length() -> None:
    """The worker with 900 tokens cached wins until the prompts before it take longer than those tokens would, for the
    request itself and for who comes next.
    """
    for waiting, expected in ((0, "a"), (2600, "a"), (2800, "b")):
        view = view_of(worker("a", waiting_tokens=waiting), worker("b"))
        assert pick(view, Features(1000, hits=[(900, 1)])) == expected


def test_a_hot_prefix_is_computed_once_more_sooner() -> None:
    for waiting, expected in ((0, "a"), (800, "a"), (1000, "b")):
        view = view_of(worker("a", waiting_tokens=waiting), worker("b"))
        assert pick(view, Features(1000, hits=[(900, 1)], hot=896)) == expected
        assert pick(view, Features(1000, hits=[(900, 1)], hot=0)) == "a"
    view = view_of(worker("d"), worker("p", Role.PREFILL, waiting_tokens=6000), worker("q", Role.PREFILL))
    for hot, expected in ((0, "p"), (4096, "q")):
        choice = choose(view, Features(5000, hits=[(4200, 2)], hot=hot, separate=True), random.Random(0))
        assert name_of(choice.prefill) == expected


def test_the_pair_is_chosen_together_and_left_out_where_it_is_slower() -> None:
    decode = msgspec.structs.replace(worker("d"), min_remote_tokens=32)
    view = view_of(decode, worker("p", Role.PREFILL), worker("q", Role.PREFILL, waiting_tokens=4000))
    assert choose(view, Features(8000), random.Random(0)).prefill is view.prefill[MODEL.model_hash][0]
    cached = choose(view, Features(8000, hits=[(7990, 1)]), random.Random(0))
    assert cached == Choice(view.decode[0], None, 7990, 0)  # the worker would keep it to itself
    short = choose(view, Features(40), random.Random(0))
    assert short.prefill is None  # an order costs more than 40 tokens
    assert choose(view, Features(40, separate=True), random.Random(0)).prefill is not None
    held = choose(view, Features(8000, hits=[(7000, 4)]), random.Random(0))
    assert name_of(held.prefill) == "q"  # 4000 in line are less than the 7000 it has
    assert held.prefill_hit == 7000


def test_the_best_of_all_pairs_is_found() -> None:
    """Against every pair, for random loads, speeds and hits."""
    rng = random.Random(7)
    for _ in range(300):
        infos = [
            worker(
                f"w{i}",
                rng.choice((Role.DECODE, Role.PREFILL)) if i else Role.DECODE,
                running=rng.randrange(12),
                waiting_tokens=rng.randrange(5000),
                prefill_tokens_per_s=rng.choice((0.0, 5e3, 4e4)),
                decode_step_ms=rng.choice((0.0, 8.0, 30.0)),
            )
            for i in range(8)
        ]
        view = view_of(*(msgspec.structs.replace(w, min_remote_tokens=rng.choice((0, 64))) for w in infos))
        hits = sorted(((rng.randrange(16, 3000), 1 << i) for i in rng.sample(range(8), 3)), reverse=True)
        features = Features(3000, 50, hits, hot=rng.choice((0, 1024, 2944)))
        limits_s = (view.limit_s(Role.DECODE), view.limit_s(Role.PREFILL))

        def total(
            choice: Choice,
            view: View = view,
            features: Features = features,
            limits_s: tuple[float, float] = limits_s,
        ) -> float:
            if choice.prefill is None:
                elsewhere = bool(view.prefill) and not stays(choice.decode, features, choice.decode_hit)
                alone = ALONE if elsewhere else 1.0
                return local_terms(choice.decode, features, choice.decode_hit, limits_s[0], alone=alone).total_s
            hit, own = choice.decode_hit, choice.prefill_hit
            return remote_terms(choice.decode, choice.prefill, features, hit, own, limits_s).total_s

        best = explain(view, features, choose(view, features, rng), "cost")["candidates"][0]["score"]
        assert 1e3 * total(choose(view, features, rng)) == pytest.approx(best, abs=2e-3)


def test_round_robin_takes_turns() -> None:
    view = view_of(*(worker(name) for name in "abc"))
    taken = [
        name_of(choose(view, Features(1, turn=i), random.Random(0), policy="round_robin").decode) for i in range(6)
    ]
    assert taken == list("abcabc")


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    view = view_of(worker("idle"), *(worker(f"busy{i}", running=9) for i in range(3)))
    counts = Counter(pick(view, Features(1), "power_of_two", seed) for seed in range(400))
    assert 0.4 < counts["idle"] / 400 < 0.6  # it is one of the two with probability 1/2


def test_least_tokens_counts_what_is_to_compute_and_to_make() -> None:
    view = view_of(worker("a"), worker("b", waiting_tokens=10))
    view.decode[0].own_tokens = 11
    assert pick(view, Features(1), "least_tokens") == "b"


def test_a_session_stays_and_few_move() -> None:
    view = view_of(*(worker(f"w{i}") for i in range(8)))
    keys = [random.Random(i).getrandbits(64) | 1 for i in range(400)]
    before = [pick(view, Features(1, session=key), "session") for key in keys]
    assert before == [pick(view, Features(1, session=key), "session", seed=9) for key in keys]
    assert min(Counter(before).values()) > 25
    smaller = View(decode=view.decode[:-1])
    after = [pick(smaller, Features(1, session=key), "session") for key in keys]
    assert all(old == new for old, new in zip(before, after, strict=True) if old != "w7")


def test_deadline_takes_the_least_work_that_is_in_time() -> None:
    """a has most of the prompt and a queue of 0.4 s, b is idle: a is enough for a second, b is needed for a fifth."""
    view = view_of(worker("a", waiting_tokens=8000), worker("b"))
    hits = [(900, 1)]
    assert pick(view, Features(1000, hits=hits, ttft_s=1.0), "deadline") == "a"
    assert pick(view, Features(1000, hits=hits, ttft_s=0.2), "deadline") == "b"
    assert pick(view, Features(1000, hits=hits, ttft_s=0.001), "deadline") == "b"  # late anyway: as early as can be


def test_prefix_takes_the_longest_but_not_more_than_its_share() -> None:
    view = view_of(worker("a", waiting_tokens=10**6), worker("b"))
    features = Features(1000, hits=[(900, 1), (500, 2)])
    assert pick(view, features, "prefix") == "a"
    view.recent_s = {Role.DECODE: 1.0}
    view.decode[0].recent_s = 1.9
    assert pick(view, features, "prefix") == "b"
    assert pick(view, features, "cost") == "b"


def test_large_clusters_are_sampled_and_hits_are_found() -> None:
    view = view_of(*(worker(f"w{i}") for i in range(1000)))
    rng = random.Random(3)
    seen = {name_of(choose(view, Features(100), rng).decode) for _ in range(300)}
    assert len(seen) > 200
    assert pick(view, Features(1000, hits=[(900, 1 << 777)])) == "w777"
    assert MAX_SEATS < 1000


# -- board -------------------------------------------------------------------------------------------


def request(ids: int | list[int] = 100, model: str = "m", **fields: Any) -> GenerationRequest:
    tokens = tuple(range(ids)) if isinstance(ids, int) else tuple(ids)
    return GenerationRequest(
        request_id="r", model=model, prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=20), **fields
    )


def board_of(*workers: WorkerInfo, **config: Any) -> tuple[Board, StaticMembers, HandClock]:
    members, clock = StaticMembers(), HandClock()
    for info in workers:
        members.put(info)
    return Board(members, RouterConfig(**config), clock=clock, rng=random.Random(0)), members, clock


def decode_of(ticket: Ticket) -> str:
    return name_of(ticket.choice.decode)


def test_names_and_states() -> None:
    board, members, _ = board_of(worker("a"))
    assert decode_of(board.place(request(model="alias"))) == "a"
    with pytest.raises(NotFoundError, match="`other` does not exist"):
        board.place(request(model="other"))
    for state in (WorkerState.STARTING, WorkerState.UNREADY, WorkerState.DRAINING):
        members.put(worker("a", state=state))
        with pytest.raises(UnavailableError, match="No decode worker for model `m`"):
            board.place(request())
    members.put(worker("p", Role.PREFILL))
    with pytest.raises(UnavailableError):
        board.place(request())


def test_what_is_sent_counts_at_once_and_is_given_back() -> None:
    board, _, _ = board_of(worker("a"), worker("b"))
    tickets = [board.place(request([i] * 300)) for i in range(4)]
    assert Counter(map(decode_of, tickets)) == {"a": 2, "b": 2}
    seats = [ticket.choice.decode for ticket in tickets]
    assert all(seat.own_requests == 2 and seat.own_prefill_tokens == 600 for seat in seats)
    for ticket in tickets:
        ticket.began(None)
        ticket.began(None)
        ticket.end(20)
        ticket.end(20)
    assert all((s.own_requests, s.own_prefill_tokens, s.own_tokens) == (0, 0, 0) for s in seats)


def test_a_pair_is_counted_on_both_and_given_back() -> None:
    board, _, _ = board_of(worker("d", running=4), worker("p", Role.PREFILL))
    ticket = board.place(request(5000))
    prefill = ticket.choice.prefill
    assert prefill is not None
    assert (prefill.own_requests, prefill.own_prefill_tokens) == (1, 5000)
    assert (ticket.choice.decode.own_requests, ticket.choice.decode.own_prefill_tokens) == (1, 0)
    ticket.end(3)
    for seat in (prefill, ticket.choice.decode):
        assert (seat.own_requests, seat.own_prefill_tokens, seat.own_tokens) == (0, 0, 0)
        assert seat.own_prompt_tokens == 0


def test_what_a_worker_reports_of_ones_own_is_not_counted_twice() -> None:
    """It takes what waits for all to be computed, as it has not looked yet; this router knows how much is cached."""
    board, members, clock = board_of(worker("a"))
    tickets = [board.place(request(4000)) for _ in range(3)]
    seat = tickets[0].choice.decode
    assert (seat.own_prefill_tokens, seat.own_prompt_tokens) == (4000 + 2 * (4000 - 31 * 128), 12_000)
    for reported, others in ((12_000, 0), (12_000, 0), (11_000, 0), (23_000, 3000)):
        members.put(worker("a", waiting_tokens=reported))
        clock.at += 1.0
        board.place(request([1] * 40)).end(1)
        assert seat.queue_tokens == pytest.approx(seat.own_prefill_tokens + others, abs=200)


def test_a_prompt_on_its_way_draws_its_like() -> None:
    """Before any event: the same long prompt again goes where the first one went."""
    board, _, clock = board_of(*(worker(f"w{i}") for i in range(8)))
    first = board.place(request(4000))
    clock.at += 0.5
    first.began(None)
    second = board.place(request(4000))
    assert decode_of(second) == decode_of(first)
    assert second.choice.decode_hit == 31 * 128
    assert board.place(request(4000, cache_salt="other")).choice.decode_hit == 0


def test_the_board_knows_a_hot_prefix() -> None:
    """From the fifth like it on, so that a worker that has it is not waited for longer than computing it would take."""
    board, _, clock = board_of(*(worker(f"w{i}") for i in range(3)))
    tickets = []
    for _ in range(8):
        tickets.append(board.place(request(4000)))
        clock.at += 0.01
    assert [ticket.features.hot for ticket in tickets] == [0] * 4 + [31 * 128] * 4
    clock.at += 10.0
    assert board.place(request(4000)).features.hot == 0


def test_speeds_are_learned_from_stats_where_workers_report_none() -> None:
    board, _, clock = board_of(worker("a"))
    ticket = board.place(request(1000))
    ticket.began(RequestStats(prompt_tokens=1000, computed_tokens=1000, prefill_ms=500.0))
    clock.at += 1
    board.place(request(1000))
    assert ticket.choice.decode.learned_prefill == pytest.approx(2000)


def test_a_prefill_workers_queue_is_not_its_speed() -> None:
    board, _, _ = board_of(worker("a"))
    ticket = board.place(request(1000))
    waited = {"prefill_ms": 2600.0, "prefill_queue_ms": 2090.0, "prefill_compute_ms": 500.0}
    ticket.began(RequestStats(prompt_tokens=1000, transferred_tokens=1000, **waited))
    assert ticket.choice.decode.learned_prefill == pytest.approx(2000)


def test_names_of_other_routers_are_understood() -> None:
    assert RouterConfig(policy="cache_aware").policy == "prefix"  # type: ignore[arg-type]
    assert RouterConfig(policy="power-of-two").policy == "power_of_two"  # type: ignore[arg-type]
    assert RouterConfig(policy="consistent_hash").policy == "session"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="policy"):
        RouterConfig(policy="best")  # type: ignore[arg-type]


def test_session_keys_keep_their_worker_over_boards() -> None:
    """Two routers agree, without a word between them."""
    one, _, _ = board_of(*(worker(f"w{i}") for i in range(8)), policy="session")
    two, _, _ = board_of(*(worker(f"w{i}") for i in reversed(range(8))), policy="session")
    for key in map(str, range(50)):
        assert decode_of(one.place(request(), Hints(key))) == decode_of(two.place(request(), Hints(key)))


def test_explain_names_every_candidate_and_the_chosen_pair() -> None:
    board, _, _ = board_of(worker("a", running=3), worker("b"), worker("p", Role.PREFILL))
    ticket = board.place(request(6000), Hints(explain=True))
    told: Any = ticket.explained
    assert told["policy"] == "cost"
    assert told["chosen"] == {"decode": decode_of(ticket), "prefill": name_of(ticket.choice.prefill) or None}
    assert len(told["candidates"]) == 4
    best = told["candidates"][0]
    assert {key: best[key] for key in ("decode", "prefill")} == told["chosen"]
    assert best["score"] == pytest.approx(sum(best["terms"].values()), abs=0.01)
    assert [c["score"] for c in told["candidates"]] == sorted(c["score"] for c in told["candidates"])


def test_a_choice_is_cheap() -> None:
    """With 64 workers and prompts of 512 tokens; the bound leaves room for a busy machine."""
    board, _, _ = board_of(*(worker(f"w{i}", waiting_tokens=i) for i in range(64)))
    asked = [request([i] * 512) for i in range(400)]
    taken: list[float] = []
    for one in asked:
        began = time.perf_counter()
        ticket = board.place(one)
        taken.append(time.perf_counter() - began)
        ticket.end(20)
    assert statistics.median(taken) < 400e-6
