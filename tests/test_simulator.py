"""The simulator, and by it the numbers that the policies are held to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from services.cli.main import app
from services.simulator.run import Cluster, Outcome, Simulation, quantile, simulate
from services.simulator.trace import TRACE_BLOCK, Mixture, Tokens, TraceRequest, best_hit_rate, load_trace

HOT = Mixture(1500, rate=40.0, hot_share=0.8, hot_blocks=8)
TURNS = Mixture(2000, rate=30.0, num_conversations=250)


def worst(spread: Outcome) -> float:
    return max(*spread.spread.values(), *spread.request_spread.values())


@pytest.mark.parametrize("rate", [4.0, 40.0, 70.0])
@pytest.mark.parametrize("policy", ["cost", "prefix"])
def test_a_hot_prefix_is_no_death_spiral(policy: str, rate: float) -> None:
    """One prefix in 80 % of the requests, at low and at high load: the busiest worker has at most 1.5 times the mean,
    in seconds of work and in requests, and the hit rate is above 80 % of the best possible."""
    mixture = Mixture(1200, rate=rate, hot_share=0.8, hot_blocks=8)
    outcome = simulate(Cluster(8), policy, mixture.requests())  # type: ignore[arg-type]
    assert worst(outcome) <= 1.5
    assert outcome.hit_rate > 0.95 * outcome.best_hit_rate


def test_a_hot_prefix_is_soon_where_it_is_wanted() -> None:
    """From cold caches on: its first requests do not all wait for the one worker that has it."""
    requests = Mixture(1500, rate=100.0, hot_share=0.8, hot_blocks=8).requests()
    cost, turns = (simulate(Cluster(8), policy, requests) for policy in ("cost", "round_robin"))
    assert cost.ttft_s[2] < 0.8 * turns.ttft_s[2]
    assert cost.hit_rate > 0.98 * cost.best_hit_rate


def test_a_hot_prefix_in_a_separated_cluster() -> None:
    """Half of the prompts go by way of a prefill worker: their first tokens come sooner than if all did."""
    outcome, always = (simulate(Cluster(4, 4), policy, HOT.requests()) for policy in ("cost", "round_robin"))
    assert worst(outcome) <= 1.5
    assert outcome.hit_rate > 0.95 * outcome.best_hit_rate
    assert 0.4 < outcome.separated < always.separated == 1.0
    assert outcome.ttft_s[0] < 0.85 * always.ttft_s[0]
    assert outcome.ttft_s[2] < always.ttft_s[2]


def test_the_cache_is_known_and_used() -> None:
    """Turns of conversations: three times the hit rate of policies that do not look, and half their tail."""
    requests = TURNS.requests()
    cost, prefix, blind, turns = (
        simulate(Cluster(8), policy, requests) for policy in ("cost", "prefix", "least_tokens", "round_robin")
    )
    for knowing in (cost, prefix):
        assert knowing.hit_rate > 0.9 * knowing.best_hit_rate
        assert knowing.hit_rate > 2.5 * max(blind.hit_rate, turns.hit_rate)
        assert knowing.ttft_s[1] < 0.5 * min(blind.ttft_s[1], turns.ttft_s[1])
        assert knowing.spread["decode"] < 1.25
    assert cost.best_hit_rate == prefix.best_hit_rate


def test_the_same_seed_gives_the_same_numbers() -> None:
    requests = Mixture(300, rate=30.0, hot_share=0.3).requests()
    first, second = (simulate(Cluster(3, 1), "cost", requests, seed=5) for _ in range(2))
    assert first == second
    assert Mixture(50, seed=1).requests() == Mixture(50, seed=1).requests() != Mixture(50, seed=2).requests()


def test_everything_ends_where_nothing_fits_at_once() -> None:
    """Far more than the cluster can take: queues, preemptions and evictions, and every request answered."""
    requests = Mixture(400, rate=400.0, num_conversations=40, output_tokens=200).requests()
    from services.simulator.machine import PROFILES

    outcome = simulate(Cluster(2, 1, PROFILES["cpu"]), "cost", requests)
    assert outcome.num_requests == 400
    assert outcome.ttft_s[0] > 1.0


def test_workers_report_how_fast_they_are() -> None:
    """What the profile says of a step is what the load meter makes of many."""
    requests = Mixture(60, rate=20.0, num_conversations=60, output_tokens=40).requests()
    simulation = Simulation(Cluster(1), "cost", requests, 0)
    simulation.run()
    (worker,) = simulation.workers.values()
    assert 5.0e3 < worker.load.prefill_tokens_per_s < 20.0e3  # with the fixed part of a step, below the profile's 20000
    assert 8.0 <= worker.load.decode_step_ms < 10.0


def test_a_thousand_workers() -> None:
    requests = Mixture(3000, rate=3000.0, hot_share=0.5, num_conversations=500, output_tokens=4).requests()
    outcome = simulate(Cluster(1000), "cost", requests)
    assert outcome.num_requests == 3000
    assert outcome.hit_rate > 0.3


def test_best_hit_rate_counts_what_a_perfect_cache_would_have() -> None:
    one = TraceRequest(0.0, 2 * TRACE_BLOCK, 1, (1, 2))
    longer = TraceRequest(1.0, 3 * TRACE_BLOCK, 1, (1, 2, 3))
    part = TraceRequest(2.0, TRACE_BLOCK + 100, 1, (1, 9))
    again = TraceRequest(3.0, TRACE_BLOCK + 200, 1, (1, 9))
    total = sum(r.input_tokens for r in (one, longer, part, again))
    found = 2 * TRACE_BLOCK + TRACE_BLOCK + (TRACE_BLOCK + 96)
    assert best_hit_rate([one, longer, part, again]) == pytest.approx(found / total)


def test_chains_of_a_trace_are_those_of_its_tokens() -> None:
    from common.types.prefix import extend_chain

    tokens = Tokens(b"r" * 16)
    for request in Mixture(40, hot_share=0.5).requests():
        ids = Tokens.of(request)
        chain = [b"r" * 16]
        extend_chain(chain, ids)
        assert tokens.chain(request, ids) == chain


def test_quantiles() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0], 0.99) == 1.0
    assert quantile(list(map(float, range(100))), 0.9) == 90.0


def test_a_trace_is_read_and_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 2000, "input_length": 700, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [request.at_s for request in load_trace(path)] == [0.0, 2.0]
    path.write_text('{"timestamp": 0, "input_length": 5000, "output_length": 1, "hash_ids": [1]}')
    with pytest.raises(ConfigError, match="line 1: 1 hash_ids for 5000 tokens"):
        load_trace(path)
    path.write_text('{"timestamp": Infinity, "input_length": 5, "output_length": 1, "hash_ids": [1]}')
    with pytest.raises(ConfigError, match="line 1: ValueError timestamp inf"):
        load_trace(path)
    path.write_text("\n\n{}")
    with pytest.raises(ConfigError, match="line 3"):
        load_trace(path)


def test_the_command(tmp_path: Path) -> None:
    small = ["simulate", "--num-requests", "60", "--decode", "2", "--policy", "cost,cache_aware"]
    shown = CliRunner().invoke(app, small)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("cost", "prefix", "hit rate", "TTFT p99", "█"))
    printed = CliRunner().invoke(app, [*small, "--json", "-"])
    assert [row["policy"] for row in json.loads(printed.output)["policies"]] == ["cost", "prefix"]
    wrong = CliRunner().invoke(app, ["simulate", "--policy", "best"])
    assert isinstance(wrong.exception, ConfigError)
