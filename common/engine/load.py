"""What an engine says of itself: load, progress, counters and histograms, about once a second."""

from __future__ import annotations

import collections
from collections.abc import Callable

from common.engine.messages import (
    EngineLoad,
    GetLedger,
    KvChange,
    KvChanges,
    LabelledCounter,
    Ledger,
    LedgerBlock,
    PeerTraffic,
)
from common.engine.outbox import Outbox
from common.engine.scheduler import Scheduler, StepPlan
from common.kvcache.manager import KVCacheManager
from common.kvcache.prefix import KVEvent
from common.types import Clock, WorkerLoad

REPORT_S = 1.0
RATE_WINDOW_S = 5.0
KV_REPORT_S = 0.05  # changes of the prefix cache are told together
FADE = 0.9  # what a step leaves of the weight of those before it, in the speeds


class LoadMeter:
    """`counters` (by name), `labelled` ones and `traffic` (per peer) are read at each report."""

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCacheManager,
        main_group: str,
        outbox: Outbox,
        clock: Clock,
        counters: Callable[[], dict[str, float]],
        traffic: Callable[[], tuple[PeerTraffic, ...]],
        labelled: Callable[[], tuple[LabelledCounter, ...]] = tuple,
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._main_group = main_group
        self._outbox = outbox
        self._clock = clock
        self._counters = counters
        self._traffic = traffic
        self._labelled = labelled
        self._rates: collections.deque[tuple[float, int]] = collections.deque()
        self._step_tokens: list[float] = []
        self._step_seqs: list[float] = []
        self._preemptions = 0
        self._prefill = [0.0, 0.0]  # prompt tokens and seconds of steps that compute some, fading
        self._decode = [0.0, 0.0]  # steps that compute none, and their seconds
        self._ended = 0.0  # when the last step was over
        self._was_idle = True
        self._next_kv = 0.0
        self.next_report = clock.now()

    def step(self, plan: StepPlan, launched: float | None) -> None:
        """Note a finished step, `launched` then; None: what was computed beside steps."""
        now = self._clock.now()
        if launched is not None:
            self._note_speed(plan, now, launched)
        num_tokens = plan.num_tokens
        self._rates.append((now, max(num_tokens, 1)))
        self._step_tokens.append(num_tokens)
        self._step_seqs.append(len(plan.items))
        self._preemptions += len(plan.preempted)

    def _note_speed(self, plan: StepPlan, now: float, launched: float) -> None:
        """Where steps overlap, one began when the one before it was over."""
        seconds, self._ended = now - max(launched, self._ended), now
        prompt = sum(item.num_new for item in plan.items if item.num_new > 1)
        speed, amount = (self._prefill, prompt) if prompt else (self._decode, 1)
        speed[:] = FADE * speed[0] + amount, FADE * speed[1] + seconds

    def clear(self) -> None:
        """Forget the steps noted so far."""
        self._rates.clear()
        self._prefill, self._decode = [0.0, 0.0], [0.0, 0.0]
        self._step_tokens, self._step_seqs = [], []

    def report(self, steps: int, *, idle: bool) -> None:
        """Send the load if it is time, or if the engine has just turned idle."""
        now = self._clock.now()
        if idle or now >= self._next_kv:
            self._next_kv = now + KV_REPORT_S
            self._tell_kv()
        turned_idle = idle and not self._was_idle
        self._was_idle = idle
        if now < self.next_report and not turned_idle:
            return
        self.next_report = now + REPORT_S
        counters = {"num_preemptions_total": float(self._preemptions), **self._counters()}
        self._outbox.send(
            EngineLoad(
                self._load(steps, now),
                self._traffic(),
                tuple(counters.items()),
                (("step_tokens", tuple(self._step_tokens)), ("step_sequences", tuple(self._step_seqs))),
                self._labelled(),
            )
        )
        self._step_tokens, self._step_seqs = [], []

    def _tell_kv(self) -> None:
        if events := self._cache.drain_events():
            self._outbox.send(KvChanges(tuple(map(_kv_change, events))))

    def _load(self, steps: int, now: float) -> WorkerLoad:
        while self._rates and self._rates[0][0] < now - RATE_WINDOW_S:
            self._rates.popleft()
        scheduler = self._scheduler
        queued = [*scheduler.waiting, *scheduler.running]  # what others compute is not in line here
        states = self._cache.ledger()
        main = next((s for s in states if s.group == self._main_group), states[0])
        return WorkerLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.remote),
            waiting_tokens=sum(s.gap for s in queued),
            kv_blocks_total=main.total,
            kv_blocks_available=main.free + main.cached,
            steps=steps,
            tokens_per_s=sum(n for _, n in self._rates) / RATE_WINDOW_S,
            kv_states=states,
            prefill_tokens_per_s=self._prefill[0] / self._prefill[1] if self._prefill[1] > 0 else 0.0,
            decode_step_ms=1e3 * self._decode[1] / self._decode[0] if self._decode[0] else 0.0,
        )


def ledger_of(cache: KVCacheManager, asked: GetLedger) -> Ledger:
    """Where every block is."""
    blocks: tuple[LedgerBlock, ...] = ()
    if asked.with_blocks:
        blocks = tuple(
            LedgerBlock(b.group, b.block_id, b.state, b.owner, int(b.age_s * 1e3)) for b in cache.ledger_blocks()
        )
    return Ledger(asked.call_id, cache.ledger(), blocks)


def _kv_change(event: KVEvent) -> KvChange:
    match event:
        case (str(kind), str(group), bytes(parent), tuple(hashes), int(size)):
            return KvChange(kind, group, parent, hashes, size)
        case (str(kind), str(group), tuple(hashes)):
            return KvChange(kind, group, hashes=hashes)
        case _:
            return KvChange("cleared")
