"""Steps of a prefill worker: prompts come to their ends one after the other, and a long one's last step is short."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import tiny_models
from kvcache_support import HandClock

from common.engine.scheduler import Scheduler, SchedulerLimits
from common.engine.sequence import OrderState, Sequence
from common.engine.sizing import BUSY_TOKENS, busy_tokens
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, GroupSpec, KVLayout, Retention
from common.kvcache.manager import KVCacheManager
from common.models.spec import ModelSpec
from common.types import SamplingParams
from common.types.prefix import root_hash

BUSY, BUDGET = BUSY_TOKENS, 4096


class Worker:
    """Scheduler and cache of one, whose steps take as long as they have tokens."""

    def __init__(self, busy: int = BUSY, budget: int = BUDGET) -> None:
        groups = (
            GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=16, num_blocks=8192),
            GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=256),
        )
        clock = HandClock()
        self.cache = KVCacheManager(KVLayout(model_hash=b"0" * 16, groups=groups, regions=()), clock)
        limits = SchedulerLimits(64, budget, busy_tokens=busy)
        self.scheduler = Scheduler(self.cache, limits, clock)
        self.num = 0
        self.computed = 0  # tokens, which are its time
        self.ends: dict[int, int] = {}  # sequence -> when its prompt was whole
        self.last: dict[int, int] = {}  # sequence -> tokens of its own in its last step

    def add(self, length: int, *, order: bool = True) -> int:
        self.num += 1
        seq = Sequence(
            seq_id=self.num,
            slot=0,
            choice=0,
            label=str(self.num),
            token_ids=[self.num] * length,
            num_prompt=length,
            sampling=SamplingParams(),
            stop_ids=frozenset(),
            chain=[root_hash(b"0" * 16)],
            priority=0,
            arrival=self.num,
            deadline=float("inf"),
            order=OrderState(1, self.num, 0, 0.0) if order else None,
        )
        self.scheduler.add(seq)
        return self.num

    def step(self) -> list[tuple[int, int]]:
        """(sequence, new tokens) of each item."""
        plan = self.scheduler.schedule()
        self.computed += plan.num_tokens
        for item in plan.items:
            item.seq.num_computed += item.num_new
            if item.reaches_end:
                self.ends[item.seq.seq_id] = self.computed
                self.last[item.seq.seq_id] = item.num_new
                self.scheduler.finish(item.seq)
        return [(item.seq.seq_id, item.num_new) for item in plan.items]

    def run(self) -> list[list[tuple[int, int]]]:
        steps = []
        while self.scheduler.has_work:
            steps.append(self.step())
            assert steps[-1], "it stands still"
        return steps


def test_a_long_order_is_computed_in_halves_and_shares_neither() -> None:
    worker = Worker()
    worker.add(4096)
    assert worker.step() == [(1, 2048)]
    worker.add(4096)
    assert worker.run() == [[(1, 2048)], [(2, 2048)], [(2, 2048)]]


def test_a_long_order_is_computed_at_once_where_others_wait_behind_it() -> None:
    worker = Worker()
    for _ in range(3):
        worker.add(4096)
    assert worker.run() == [[(1, 4096)], [(2, 4096)], [(3, 2048)], [(3, 2048)]]


@pytest.mark.parametrize(("length", "steps"), [(2048, [2048]), (2049, [1025, 1024]), (3001, [1501, 1500])])
def test_no_half_is_less_than_keeps_the_device_busy(length: int, steps: list[int]) -> None:
    worker = Worker()
    worker.add(length)
    assert worker.run() == [[(1, count)] for count in steps]


def test_an_order_longer_than_a_step() -> None:
    worker = Worker()
    worker.add(10_000)
    worker.add(100)
    assert worker.run() == [[(1, 4096)], [(1, 4096)], [(1, 1808)], [(2, 100)]]


def test_short_orders_share_a_step_until_the_device_is_busy() -> None:
    worker = Worker()
    for _ in range(30):
        worker.add(100)
    steps = worker.run()
    assert [sum(n for _, n in step) for step in steps] == [1024, 1024, 952]


def test_other_sequences_are_batched_as_ever() -> None:
    worker = Worker()
    for _ in range(3):
        worker.add(2000, order=False)
    assert worker.run() == [[(1, 2000), (2, 2000), (3, 96)], [(3, 1904)]]


def test_without_a_number_orders_are_batched_as_ever() -> None:
    worker = Worker(busy=SchedulerLimits(1, 1).busy_tokens)
    for _ in range(3):
        worker.add(2000)
    assert worker.run() == [[(1, 2000), (2, 2000), (3, 96)], [(3, 1904)]]


def test_a_short_end_is_filled_up_with_the_next_until_the_device_is_busy() -> None:
    worker = Worker()
    worker.add(4100)
    worker.add(5000)
    assert worker.run()[:2] == [[(1, 4096)], [(1, 4), (2, 1020)]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [BUDGET, 2 * BUDGET, 3000])
def test_prompts_are_whole_one_after_the_other(seed: int, budget: int) -> None:
    """As if each were computed alone, in turn, but for what keeps the device busy; sooner than by steps filled to the
    brim, and what is left to send at the very end is little.
    """
    rng = random.Random(seed)
    lengths = [rng.choice((1, 30, 500, 1023, 1024, 2047, 2048, 3000, 4096, 5000, 9000)) for _ in range(40)]
    ours, full = Worker(budget=budget), Worker(busy=SchedulerLimits(1, 1).busy_tokens, budget=budget)
    for length in lengths:
        ours.add(length)
        full.add(length)
    ours.run()
    full.run()
    assert ours.computed == full.computed == sum(lengths)
    before = 0
    for number, length in enumerate(lengths, 1):
        before += length
        assert before <= ours.ends[number] < before + BUSY
    assert ours.last[len(lengths)] <= 2 * BUSY  # nobody waits behind it
    assert sum(ours.ends.values()) < sum(full.ends.values())


def test_what_keeps_a_device_busy_follows_from_the_share_of_experts(tmp_path: Path) -> None:
    folder = tiny_models.make_qwen3_moe(tmp_path)
    spec = ModelSpec.from_folder(folder)
    assert spec.moe is not None
    share = spec.moe.num_experts / spec.moe.top_k
    assert share > 1
    assert busy_tokens(spec) == int(share * BUSY_TOKENS)
    assert busy_tokens(dataclasses.replace(spec, moe=None)) == BUSY_TOKENS
