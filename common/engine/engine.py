"""One rank's engine: messages in, steps, messages out. No threads, no sockets, no clock of its own.

    handle(message)* -> step() -> drain() -> ... ; sleep until `next_deadline` or a message when not `has_work`

A step is planned, launched, and collected: then it brings tokens to requests and extents to readers. Where the device
works by itself the next step is planned and launched before this one is collected (decision 5), whose tokens are known
to the device alone until then. A step with a grammar draws when they are known, while the device computes its logits.
Drafts that are to come, penalties and copies of states follow from tokens beside the tokens themselves: they have the
step collected first. What arrives while a step is awaited with none behind it is launched then. A step that raises
fails the requests that were in it; the engine gives up after several in a row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping

from common.engine.drafting import Moved
from common.engine.first_tokens import FirstTokens
from common.engine.launched import LaunchedStep
from common.engine.load import ledger_of
from common.engine.messages import (
    Cancel,
    Drain,
    FromEngine,
    GetLedger,
    PeerComputes,
    PeerEvent,
    PeerGone,
    PeerReady,
    ReaderGone,
    Submit,
    ToEngine,
)
from common.engine.parts import EngineParts
from common.engine.rows import batch_of, state_copies
from common.engine.runner import Pending, StepResult
from common.engine.sampler import NOT_FINITE
from common.engine.samples import needs_history
from common.engine.scheduler import StepItem, StepPlan
from common.engine.sequence import Phase, Sequence
from common.errors import InternalError, RankLostError
from common.kvcache.layout import Retention
from common.kvtransfer.orders import DropOrder, PlaceOrder, ReleaseLease
from common.telemetry import get_logger
from common.types import TokenLogprobs

log = get_logger(__name__)

MAX_FAILED_STEPS = 3
IDLE_WAIT_S = 1.0
STALL_RETRY_S = 0.05


class Engine:
    def __init__(self, parts: EngineParts) -> None:
        self._p = parts
        self._groups: Mapping[str, tuple[int, int]] = {
            g.name: (g.block_size, g.window) for g in parts.layout.groups if g.retention is not Retention.SNAPSHOT
        }
        self._failed_steps = 0
        self._writes_on = False  # the device, to blocks, behind the step that is collected
        self._stalled = False
        self._under_way: LaunchedStep | None = None
        self._firsts: FirstTokens | None = None
        if parts.beside is not None:
            tails = parts.demand.tails
            self._firsts = FirstTokens(parts.scheduler, tails, parts.beside, parts.cache, self._groups)
            parts.demand.on_lost_tail = self._firsts.cancel
        self._num_planned = 0  # of the sequences ever queued, those that a plan could have taken
        self.while_waiting: Callable[[], None] | None = None
        """Called again and again while the device computes what is to be collected next; may handle messages."""
        self.on_awaited: Callable[[], None] = lambda: None
        """Called when what somebody waits for is there to be drained, the first token of a hand-off or KV for one: the
        launch of the next step takes longer than the rest of its way."""
        self.steps = 0

    # -- messages --

    def handle(self, message: ToEngine) -> None:
        """Take one message. Bad input ends in a failure of that request or order, never in an exception."""
        p = self._p
        match message:
            case Submit():
                p.requests.submit(message)
            case Cancel():
                self._cancel(message)
            case PeerReady():
                p.reader.peer_ready(message.peer, message.ref, message.layout, message.endpoints, message.lease_ttl_s)
            case PeerGone():
                p.reader.peer_gone(message.peer, message.reason)
            case PeerEvent():
                p.reader.on_event(message.peer, message.event)
            case PeerComputes():
                p.reader.peer_computes(message.peer)
            case PlaceOrder():
                p.supply.order(message)
            case DropOrder():
                p.supply.cancel(message.peer, message.order_id)
            case ReleaseLease():
                p.supply.release(message.lease_id)
            case ReaderGone():
                p.supply.reader_gone(message.reader)
            case GetLedger():
                p.outbox.send(ledger_of(p.cache, message))
            case Drain():
                p.requests.draining = True
                p.supply.draining = True

    def _cancel(self, message: Cancel) -> None:
        p = self._p
        choices = message.choices or (None,) * len(message.slots)
        for slot, choice in zip(message.slots, choices, strict=True):
            p.requests.cancel(slot, choice)

    # -- work --

    @property
    def has_work(self) -> bool:
        """True if a step now would compute something, or bring what is computed."""
        return self._under_way is not None or (self._p.scheduler.has_work and not self._stalled)

    @property
    def stalled(self) -> bool:
        """Sequences wait for blocks that only a message, a read or a deadline can free."""
        return self._stalled

    @property
    def next_deadline(self) -> float:
        """Instant at which `step` must run even if nothing arrives."""
        p = self._p
        work = min(p.requests.next_deadline, p.reader.next_deadline(), p.supply.next_deadline, p.media.next_deadline)
        compiled = p.grammars.next_deadline if p.grammars is not None else math.inf
        return min(work, compiled, p.meter.next_report)

    def step(self) -> bool:
        """Do what can be done now; True if tokens were computed."""
        p = self._p
        worked = self._under_way is not None
        self._poll_handoffs()
        p.media.poll()
        if p.grammars is not None:
            p.grammars.poll()
        p.requests.expire()
        p.supply.expire()
        if self._under_way is not None and not self._may_go_ahead(self._under_way.plan):
            self.settle()
        plan = self._plan(ahead=self._under_way is not None)
        if plan.short_of_blocks:
            self.settle()
            plan = self._plan(ahead=False)
        before, self._under_way = self._under_way, self._launch(plan) if plan.items else None
        worked = worked or self._under_way is not None or bool(self._firsts)
        if before is not None:
            self._collect(before, go_on=True)
            self._sample_late()
        elif self._under_way is None:
            self._await_firsts()
        if not p.overlap:
            self.settle()
        # what was collected behind the plan may have given blocks back, and messages may have come meanwhile
        self._stalled = not (plan.items or worked) and p.scheduler.has_work
        p.meter.report(self.steps, idle=not p.scheduler.has_work)
        if p.check_ledger:
            p.cache.check()
        return worked

    def _plan(self, *, ahead: bool) -> StepPlan:
        self._num_planned = self._p.scheduler.num_queued
        return self._p.scheduler.schedule(ahead=ahead)

    def _poll_handoffs(self) -> None:
        """Take what hand-offs have brought. First tokens are drawn at once, and delivered when all else is there."""
        p = self._p
        p.demand.poll(p.scheduler)
        if self._firsts is None:
            return
        for plan in self._firsts.due():
            try:
                self._firsts.launch(plan, self._p.masks.begin_late(plan).get())
            except Exception as error:  # noqa: BLE001 - the edge of a step
                self._step_failed(plan, error)
        for drawn in self._firsts.ended():
            self._bring(*drawn)
            self.on_awaited()

    def _await_firsts(self) -> None:
        """There is nothing else to do: wait for the draws under way, as for a step."""
        while self._firsts and self.while_waiting is not None:
            self.while_waiting()
            self._poll_handoffs()
        for drawn in self._firsts.ended(wait=True) if self._firsts else ():
            self._bring(*drawn)

    def _may_go_ahead(self, plan: StepPlan) -> bool:
        """Can the next step be planned without the tokens of this one?"""
        p, drawing = self._p, []
        for item in plan.items:
            if item.drafts:
                return False
            if item.draws and item.seq.phase is Phase.RUNNING:
                if needs_history(item.seq):
                    return False
                drawing.append(item.seq)
        if p.cache.snapshots.has_states and any(self._copies_state(item) for item in plan.items):
            return False
        if p.drafting is not None and any(item.seq.order or item.seq.tail_ready for item in plan.items):
            return False  # what its rows are made from, or published with, does not wait for another step
        return p.speculator is None or not p.speculator.expects(drawing, len(p.scheduler.running))

    def _copies_state(self, item: StepItem) -> bool:
        """Does the step leave a state that is to be cached, or begin one, as it would again until it is collected?"""
        seq = item.seq
        if seq.phase is not Phase.RUNNING:
            return False
        return item.start + item.num_new in seq.checkpoints or bool(self._p.cache.snapshots.state_origin(seq.seq_id))

    def drain(self) -> list[FromEngine]:
        """Messages since the last call."""
        return self._p.outbox.drain(self.steps)

    def _launch(self, plan: StepPlan) -> LaunchedStep | None:
        """Start a step; None if that failed."""
        self.steps += 1
        runner, began = self._p.runner, self._p.clock.now()
        pending: Pending | None = None
        try:
            runner.copy_blocks(state_copies(plan, self._p.cache))
            masks = self._p.masks.begin(plan)
            pending = runner.forward(batch_of(plan, self._p.cache, self._groups))
            if masks is not None:
                runner.sample(pending, masks.get())
            publishes = self._p.drafting is None  # whose layer writes after the step
            for item in plan.items:
                if item.num_new > 1:
                    item.seq.grow_chain()  # while the device computes: at the end somebody waits
                if publishes and item.seq.order is not None:
                    self._p.supply.launched(item.seq, item.start, item.start + item.num_new)
        except Exception as error:  # noqa: BLE001 - edge of the step: fails what was in it
            self._step_failed(plan, error, pending)
            return None
        return LaunchedStep.of(plan, pending, sampled=masks is not None, at=began)

    def settle(self) -> None:
        """Bring what the step under way has computed, if there is one."""
        step, self._under_way = self._under_way, None
        if step is not None:
            self._collect(step)

    def _collect(self, step: LaunchedStep, *, go_on: bool = False) -> None:
        """Wait for a step that is no longer `_under_way`, and bring what it has computed.

        `go_on`: launch one behind it when something arrives and none is there.
        """
        p, plan, pending = self._p, step.plan, step.pending
        while self.while_waiting is not None and not p.runner.is_done(pending):
            self.while_waiting()
            self._poll_handoffs()  # they go on without waiting for the step
            if go_on and self._under_way is None and self._num_planned < p.scheduler.num_queued:
                more = self._plan(ahead=True)
                self._under_way = self._launch(more) if more.items else None
        step.land()
        self._bring(plan, pending, step.followed, step.at)

    def _sample_late(self) -> None:
        """Draw in the step under way if that had to wait for tokens that are known now, while the device computes."""
        step = self._under_way
        if step is None or step.sampled:
            return
        step.sampled = True
        try:
            self._p.runner.sample(step.pending, self._p.masks.begin_late(step.plan).get())
        except Exception as error:  # noqa: BLE001 - the edge of a step
            self._under_way = None
            step.land()
            self._step_failed(step.plan, error, step.pending)
            for seq in step.sequences:
                self._p.scheduler.settle(seq)

    def _bring(
        self, plan: StepPlan, pending: Pending, followed: Iterable[Sequence] = (), at: float | None = None
    ) -> None:
        """Take what was computed of a plan to requests and readers. Waits for it. `at`: a step, launched then."""
        p = self._p
        try:
            result = p.runner.collect(pending)
            moved = self._advance(plan, result)
            if p.drafting is not None:
                self._writes_on |= p.drafting.follow(pending.hidden_TD, moved)
            self._hold_written(plan)
        except Exception as error:  # noqa: BLE001 - the same edge
            self._step_failed(plan, error)
        else:
            self._failed_steps = 0
            p.meter.step(plan, at)
            self._deliver(result, moved)
        finally:
            for seq in [*(item.seq for item in plan.items), *followed]:
                if seq.phase is Phase.ENDED:
                    p.scheduler.settle(seq)

    def _hold_written(self, plan: StepPlan) -> None:
        """What writes behind a step, or the one under way, holds blocks: hand-offs write to those given back."""
        writes, self._writes_on, step = self._writes_on, False, self._under_way
        if writes and step is None:
            self._p.runner.wait()
        elif writes and step is not None:
            step.follow(plan)

    def _advance(self, plan: StepPlan, result: StepResult) -> list[Moved]:
        """Append the tokens that stand, and make final what was computed of those before the last."""
        p, moved, first_row = self._p, [], 0
        cache, standing, has_states = p.cache, p.requests.standing, p.cache.snapshots.has_states
        for item, drawn in zip(plan.items, result.drawn, strict=True):
            seq, start = item.seq, item.start
            if seq.phase is not Phase.RUNNING:  # it ended while the step was under way
                moved.append(Moved(seq, start, first_row, 0, goes_on=False))
                first_row += item.num_new + len(item.drafts)
                continue
            num_tokens, finish = standing(seq, drawn.token_ids, item.drafts)
            seq.token_ids += drawn.token_ids[:num_tokens]
            goes_back = has_states and num_tokens <= len(item.drafts) > 0
            if item.num_new and not goes_back:
                seq.num_computed += item.num_new + max(num_tokens - 1, 0)
                seq.grow_chain()
                cache.advance(seq.seq_id, seq.chain, seq.num_computed)
                if seq.num_computed in seq.checkpoints:
                    self._checkpoint(seq)
            if item.drafts:
                assert p.speculator is not None
                num_right = sum(map(operator.eq, item.drafts, drawn.token_ids[:num_tokens]))
                p.speculator.observe(seq, len(item.drafts), num_right)
                cache.snapshots.release_backup(seq.seq_id, go_back=goes_back)
                if num_tokens <= len(item.drafts):
                    cache.truncate(seq.seq_id, seq.num_tokens)
            goes_on = drawn.failure is None and num_tokens > 0 and finish is None
            moved.append(Moved(seq, start, first_row, num_tokens, goes_on, finish, goes_back))
            first_row += item.num_new + len(item.drafts)
        return moved

    def _deliver(self, result: StepResult, moved: list[Moved]) -> None:
        """Bring tokens to requests, and what is computed to readers."""
        p = self._p
        for index, (drawn, m) in enumerate(zip(result.drawn, moved, strict=True)):
            seq, num_tokens = m.seq, m.num_tokens
            if seq.phase is not Phase.RUNNING:
                continue  # a failure of another choice ended it
            if seq.order is not None:
                if drawn.failure is None:
                    p.supply.advanced(seq)
                else:
                    p.supply.broken(seq, drawn.failure)
                self.on_awaited()
                continue
            if seq.tail_ready:
                seq.tail_ready = False
                p.cache.snapshots.free_tail(seq.seq_id)
            if index in result.prompt_logprobs:
                p.requests.take_prompt_logprobs(seq, result.prompt_logprobs[index])
            if seq.constraint is not None and seq.constraint.error:
                p.requests.fail(seq.slot, seq.constraint.failure())
            elif drawn.failure == NOT_FINITE:
                p.requests.broken(seq, drawn.failure)
            elif drawn.failure is not None:
                p.requests.fail(seq.slot, InternalError(drawn.failure))
            elif drawn.hidden_D is not None:
                p.requests.pooled(seq, drawn.hidden_D)
            elif num_tokens:
                logprobs = TokenLogprobs.join(drawn.logprobs[:num_tokens]) if drawn.logprobs else None
                p.requests.tokens(seq, num_tokens, m.finish, logprobs)

    def _checkpoint(self, seq: Sequence) -> None:
        """Cache a copy of the state that the step has left, where there is room for one."""
        self._p.runner.copy_blocks(self._p.cache.snapshots.checkpoint(seq.seq_id, seq.prefix_hash(seq.num_computed)))
        self._writes_on = True

    def _step_failed(self, plan: StepPlan, error: Exception, pending: Pending | None = None) -> None:
        """`pending`: of a step that was launched and will not be collected."""
        self._failed_steps += 1
        log.error("step failed", step=self.steps, sequences=len(plan.items), exc_info=error)
        if self._failed_steps >= MAX_FAILED_STEPS or isinstance(error, RankLostError):
            raise error
        # what of it was launched still writes to blocks that are given back now
        if pending is None:
            self._p.runner.wait()
        else:
            self._p.runner.drop(pending)
        reason = InternalError(f"the engine step failed: {type(error).__name__}")
        for item in plan.items:
            if item.seq.phase is Phase.ENDED:
                continue  # its end is known: it was cancelled while the step was under way
            if item.seq.order is not None:
                self._p.supply.fail(item.seq, reason)
            else:
                self._p.requests.fail(item.seq.slot, reason)


def sleep_until(engine: Engine, now: float) -> float:
    """Seconds an engine with nothing to compute may wait for a message."""
    if engine.has_work:
        return 0.0
    longest = STALL_RETRY_S if engine.stalled else IDLE_WAIT_S
    return min(longest, max(0.0, engine.next_deadline - now))
