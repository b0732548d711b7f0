"""One simulated worker: scheduler, cache manager, hand-off demand, load meter and KV feed are the real ones.

A step takes the time that a `Profile` says and brings what the plan computes. What a model, a device and a network
would do is left out: outputs are zeros, reads always succeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.config.schema import HandoffConfig
from common.engine.demand import Demand
from common.engine.load import LoadMeter
from common.engine.messages import EngineLoad, FromEngine, KvChanges
from common.engine.outbox import Outbox
from common.engine.scheduler import Scheduler, SchedulerLimits, StepPlan
from common.engine.sequence import OrderState, Phase, Sequence
from common.engine.sizing import BUSY_TOKENS
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, GroupSpec, KVLayout, Retention
from common.kvcache.manager import KVCacheManager, PrefixHit
from common.kvtransfer.session import Done, OrderSpec
from common.types import Clock, ModelInfo, Role, SamplingParams, WorkerInfo, WorkerLoad, WorkerRef, WorkerState
from services.worker.kv_feed import KvFeed

MODEL = ModelInfo(
    name="simulated",
    architecture="",
    model_hash=b"simulated-model!",
    max_model_len=1 << 20,
    vocab_size=1 << 31,
    dtype="bfloat16",
    path="",
)


@dataclass(frozen=True)
class Profile:
    """What a worker's device does. Times in seconds."""

    prefill_tokens_per_s: float = 20_000.0
    step_s: float = 0.008  # a step, whatever is in it
    sequence_s: float = 0.0001  # more, for each sequence that decodes
    transfer_tokens_per_s: float = 200_000.0
    handoff_s: float = 0.003
    kv_tokens: int = 400_000
    block_size: int = 64
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    busy_tokens: int = BUSY_TOKENS  # as many in a step keep the device busy

    def seconds(self, plan: StepPlan) -> float:
        prompt = sum(item.num_new for item in plan.items if item.num_new > 1)
        decoding = sum(item.num_new <= 1 for item in plan.items)
        return self.step_s + prompt / self.prefill_tokens_per_s + decoding * self.sequence_s


PROFILES = {
    "gpu": Profile(),
    "cpu": Profile(
        prefill_tokens_per_s=2_000.0,
        step_s=0.02,
        sequence_s=0.002,
        transfer_tokens_per_s=50_000.0,
        kv_tokens=32_768,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    ),
}


class _Reads:
    """The reader's side of hand-offs, as `Demand` uses it: orders go to `order`, what they bring comes by `done`."""

    def __init__(self, order: Callable[[OrderSpec], None]) -> None:
        self.place = order
        self._done: list[Done] = []

    def usable(self, peer: int) -> bool:
        return True

    def cancel(self, seq_id: int) -> None:
        """Nobody cancels here."""

    def poll(self) -> list[Done]:
        done, self._done = self._done, []
        return done

    def done(self, update: Done) -> None:
        self._done.append(update)


class Machine:
    """`key` names it among hand-off peers. `order(machine, spec)` takes its orders to a prefill worker."""

    def __init__(
        self,
        name: str,
        role: Role,
        key: int,
        profile: Profile,
        clock: Clock,
        order: Callable[[Machine, OrderSpec], None],
    ) -> None:
        self.name = name
        self.role = role
        self.key = key
        self.profile = profile
        self.is_stepping = False
        self.busy_s = 0.0
        self.num_requests = 0
        self.hits: dict[int, int] = {}  # sequence -> tokens found in the cache
        self._clock = clock
        self._outbox = Outbox()
        self._layout = _layout(profile)
        self._cache = KVCacheManager(self._layout, clock, record_events=True)
        most, busy = profile.max_num_batched_tokens, profile.busy_tokens
        limits = SchedulerLimits(profile.max_num_seqs, most, busy_tokens=busy)
        self.scheduler = Scheduler(self._cache, limits, clock)
        self._meter = LoadMeter(self.scheduler, self._cache, FULL_GROUP, self._outbox, clock, dict, tuple)
        self.reads = _Reads(lambda spec: order(self, spec))
        reader: Any = self.reads
        self._handoff = HandoffConfig()
        self._demand = Demand(reader, self._cache, self._handoff, clock)
        self.scheduler.connect(self._demand.try_remote, self._demand.cancel, self._started)
        self.feed = KvFeed()
        self.feed.begin(key, self._layout)
        self._steps = 0

    def info(self, load: WorkerLoad) -> WorkerInfo:
        return WorkerInfo(
            ref=WorkerRef(self.name, self.key, f"{self.name}:1"),
            role=self.role,
            state=WorkerState.READY,
            model=MODEL,
            device="cuda:0",
            max_num_seqs=self.profile.max_num_seqs,
            max_num_batched_tokens=self.profile.max_num_batched_tokens,
            kv_block_size=self.profile.block_size,
            min_remote_tokens=self._handoff.min_remote_tokens if self.role is Role.DECODE else 0,
            load=load,
        )

    # -- work --

    def submit(self, seq_id: int, token_ids: list[int], chain: list[bytes], output_tokens: int, peer: int) -> Sequence:
        """A request; `peer` is the prefill worker named, 0 for none."""
        seq = _sequence(seq_id, token_ids, chain, output_tokens)
        seq.remote_peer = peer
        seq.times.submitted = self._clock.now()
        self.scheduler.add(seq)
        self.num_requests += 1
        return seq

    def take_order(self, seq_id: int, spec: OrderSpec) -> None:
        seq = _sequence(seq_id, list(spec.token_ids), list(spec.chain), 1)
        seq.order = OrderState(0, 0, spec.start_position, self._clock.now())
        self.scheduler.add(seq)
        self.num_requests += 1

    def _started(self, seq: Sequence, hit: PrefixHit) -> None:
        self.hits.setdefault(seq.seq_id, hit.num_tokens)

    def begin_step(self) -> tuple[StepPlan, float] | None:
        """Plan a step and say how long it takes; None when there is nothing to do now."""
        self._demand.poll(self.scheduler)
        plan = self.scheduler.schedule()
        if not plan.items:
            return None
        self._steps += 1
        seconds = self.profile.seconds(plan)
        self.busy_s += seconds
        return plan, seconds

    def end_step(self, plan: StepPlan, launched_s: float) -> tuple[list[Sequence], list[Sequence]]:
        """Bring what it computed: (sequences with a first token, sequences that are over)."""
        first, over = [], []
        for item in plan.items:
            seq = item.seq
            if seq.phase is not Phase.RUNNING:
                continue
            seq.tail_ready = False
            if item.draws:
                seq.token_ids.append(0)
                if seq.num_output == 1:
                    first.append(seq)
            seq.num_computed += item.num_new
            seq.grow_chain()
            self._cache.advance(seq.seq_id, seq.chain, seq.num_computed)
            ended = seq.num_computed >= seq.num_tokens if seq.order else seq.num_output >= seq.sampling.max_tokens
            if ended:
                self.scheduler.finish(seq)
                over.append(seq)
        self._meter.step(plan, launched_s)
        return first, over

    def report(self) -> list[FromEngine]:
        """Load and cache changes that are due."""
        self._meter.report(self._steps, idle=not self.scheduler.has_work)
        return [m for m in self._outbox.drain(self._steps) if isinstance(m, EngineLoad | KvChanges)]


def _layout(profile: Profile) -> KVLayout:
    blocks = profile.kv_tokens // profile.block_size
    return KVLayout(
        model_hash=MODEL.model_hash,
        groups=(
            GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=profile.block_size, num_blocks=blocks),
            GroupSpec(name=TAIL_GROUP, retention=Retention.SNAPSHOT, block_size=1, num_blocks=profile.max_num_seqs),
        ),
        regions=(),
    )


def _sequence(seq_id: int, token_ids: list[int], chain: list[bytes], output_tokens: int) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        slot=seq_id,
        choice=0,
        label="",
        token_ids=token_ids,
        num_prompt=len(token_ids),
        sampling=SamplingParams(max_tokens=output_tokens),
        stop_ids=frozenset(),
        chain=chain,
        priority=0,
        arrival=seq_id,
        deadline=float("inf"),
    )
