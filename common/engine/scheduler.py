"""Which sequences advance in the next step, and by how many tokens.

    schedule() -> StepPlan -> (runner) -> engine appends tokens -> finish() | preempted by a later schedule()

Running sequences come first, then waiting ones by priority and arrival, all within one token budget.
Blocks are reserved before a sequence is planned. When a running sequence cannot grow, the running
sequence that comes last by (priority, arrival) gives its blocks back and waits again: recompute is the same
rule from the start. Steps of a prompt end where its state is to be cached (`common.engine.checkpoints`).

Orders reserve their whole prompt when they start and are never preempted. Whoever ordered waits for the end of the step
that computes the end of the prompt, and then for what that step computed to be sent. So a step that ends an order takes
nothing more once the device is busy with it, and the last step of a long prompt is a short one where nobody waits
behind it: most is sent meanwhile.

A running sequence that lacks one token only may carry drafts behind it, from what the running ones leave of the
budget and of the free blocks: nobody is preempted for a guess. Where a state cannot be cut back, a copy is kept for the
step; if a draft was wrong the sequence goes back to it, and its next step computes the tokens that stand again, with
no drafts.

A step may be planned while another is under way (`schedule(ahead=True)`): nobody is preempted then, since what the
running step writes must not be another's, and a sequence that ends keeps its blocks until `settle`.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from common.engine.checkpoints import checkpoint_after, checkpoints, cut
from common.engine.sequence import Phase, Sequence
from common.kvcache.manager import NO_HIT, KVCacheManager, PrefixHit
from common.types import Clock


@dataclass(frozen=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    state_snapshot_interval: int = 2048
    max_model_len: int = sys.maxsize
    busy_tokens: int = sys.maxsize
    """As many in a step keep the device busy: more take longer in proportion."""


class StepItem(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Compute `num_new` tokens of `seq` from position `start` on; 0 means only the head on its tail row.

    `reaches_end`: the last of them is the last it has, or will have when the step before is over. `draws`: and a token
    behind it is wanted. `drafts` follow it and are verified.
    """

    seq: Sequence
    start: int
    num_new: int
    reaches_end: bool
    draws: bool
    drafts: tuple[int, ...] = ()

    @staticmethod
    def of(seq: Sequence, start: int, num_new: int) -> StepItem:
        """The next `num_new` tokens of `seq`."""
        reaches_end = start + num_new == len(seq.token_ids) + seq.num_pending
        return StepItem(seq, start, num_new, reaches_end, reaches_end and seq.order is None and seq.pooling is None)

    @property
    def pools(self) -> bool:
        """Is its vector there when it is computed?"""
        return self.reaches_end and self.seq.pooling is not None


@dataclass(frozen=True)
class StepPlan:
    """`short_of_blocks`: made ahead, and nothing is planned, because somebody would have to be preempted."""

    items: tuple[StepItem, ...]
    preempted: tuple[Sequence, ...] = ()
    short_of_blocks: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(i.num_new + len(i.drafts) for i in self.items)


class _Room:
    """For tokens in a step. Where an order ends, or will with the steps behind this one, what keeps the device busy
    is enough.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._most = limits.max_num_batched_tokens
        self._busy = limits.busy_tokens
        self._near = max(limits.max_num_batched_tokens, 2 * limits.busy_tokens)  # to an order's end
        self._taken = 0

    @property
    def left(self) -> int:
        return self._most - self._taken

    def take(self, item: StepItem) -> None:
        self._taken += max(item.num_new, 1)
        if item.seq.order is not None and item.seq.num_tokens - item.start - item.num_new <= self._near:
            self._most = min(self._most, max(self._busy, self._taken))

    def take_drafts(self, count: int) -> None:
        self._taken += count


TryRemote = Callable[[Sequence, PrefixHit], bool]
Abandon = Callable[[Sequence], None]
OnStarted = Callable[[Sequence, PrefixHit], None]
Propose = Callable[[Sequence, int, int], tuple[int, ...]]


def _rank(seq: Sequence) -> tuple[int, int, int]:
    return (seq.priority, seq.arrival, seq.choice)


class Scheduler:
    """Owns the queues.

    `try_remote(seq, hit)` may take a waiting sequence over for a hand-off: True if it did; False with
    `seq.remote_peer` cleared to run it here, False with it kept when there is no room yet.
    `abandon(seq)` is told of one that ends while its hand-off is under way, before its blocks are given back.
    `on_started(seq, hit)` is told of each admission, after `num_computed` was set.
    `propose(seq, room, num_running)` gives drafts for a sequence that generates: `room` at most. None: there is no
    speculation.
    """

    def __init__(self, cache: KVCacheManager, limits: SchedulerLimits, clock: Clock) -> None:
        self._cache = cache
        self._limits = limits
        self._clock = clock
        self._try_remote: TryRemote = lambda seq, hit: False
        self._abandon: Abandon = lambda seq: None
        self._on_started: OnStarted = lambda seq, hit: None
        self._propose: Propose | None = None
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.remote: dict[int, Sequence] = {}
        self.num_queued = 0  # sequences that were, ever

    def connect(
        self, try_remote: TryRemote, abandon: Abandon, on_started: OnStarted, propose: Propose | None = None
    ) -> None:
        """Name those who hear of sequences; see the class."""
        self._try_remote = try_remote
        self._abandon = abandon
        self._on_started = on_started
        self._propose = propose

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        seq.phase = Phase.WAITING
        bisect.insort(self.waiting, seq, key=_rank)
        self.num_queued += 1

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, in whatever phase; its blocks go back to the cache, now or by `settle`. Idempotent."""
        if seq.phase is Phase.ENDED:
            return
        if seq.phase is Phase.REMOTE:
            self._abandon(seq)
        self._unlink(seq)
        seq.phase = Phase.ENDED
        self.settle(seq)

    def forget(self, seq: Sequence) -> None:
        """Nobody is to go on from what `seq` went on from, or computed."""
        self._cache.forget_prefix(seq.chain)

    def settle(self, seq: Sequence) -> None:
        """A step is over: a sequence that has ended gives its blocks back if that was the last one it was in."""
        if seq.phase is Phase.ENDED and not seq.steps_under_way:
            self._cache.close(seq.seq_id)

    def remote_done(self, seq: Sequence) -> None:
        """A hand-off brought all KV and the tail row: only the head is missing."""
        del self.remote[seq.seq_id]
        seq.remote_peer = 0
        seq.num_computed = seq.num_drafted = seq.num_tokens
        seq.tail_ready = True
        if step := self._cache.snapshots.checkpoint_step:
            seq.checkpoints = (checkpoint_after(seq.num_tokens, step),)
        seq.phase = Phase.RUNNING
        bisect.insort(self.running, seq, key=_rank)

    def remote_failed(self, seq: Sequence, num_verified: int) -> None:
        """A hand-off failed: what was verified is sealed, found again as a prefix hit, and the rest computed here."""
        del self.remote[seq.seq_id]
        seq.grow_chain()
        self._cache.advance(seq.seq_id, seq.chain, num_verified)
        self._cache.close(seq.seq_id)
        seq.remote_peer = 0
        self.add(seq)

    def schedule(self, *, ahead: bool = False) -> StepPlan:
        """Plan a step; an empty plan means that nothing can run now. `ahead`: while another is under way."""
        room = _Room(self._limits)
        items: list[StepItem] = []
        preempted: list[Sequence] = []
        index, reserve = 0, self._cache.reserve
        while index < len(self.running) and room.left > 0:
            seq = self.running[index]
            if seq.first_under_way or (ahead and self._must_wait(seq)):
                index += 1
                continue
            start = seq.num_computed + seq.num_launched
            num_new = self._new_tokens(seq, start, len(seq.token_ids) + seq.num_pending, room.left)
            if not reserve(seq.seq_id, start + num_new):
                if ahead:
                    return StepPlan((), short_of_blocks=True)
                if not self._make_room(seq, num_new, preempted):
                    continue
            items.append(StepItem.of(seq, start, num_new))
            room.take(items[-1])
            index += 1
        if not preempted:
            if self._propose is not None and not ahead:
                self._add_drafts(self._propose, items, room)
            self._admit(items, room)
        items.sort(key=lambda item: item.num_new > 1)  # kernels take sequences with one new token together
        return StepPlan(tuple(items), tuple(preempted))

    def _new_tokens(self, seq: Sequence, start: int, end: int, most: int) -> int:
        """Of those from `start` to `end`, how many a step takes; a long end of an order is computed in halves.

        What is published, sent and verified behind the last step is a half then. Two steps take longer than one, so
        not where others wait for them.
        """
        num_new = min(end - start, most)
        if seq.order is not None and num_new == end - start > 2 * self._limits.busy_tokens:
            others_wait = len(self.waiting) > (seq.phase is Phase.WAITING)
            num_new -= 0 if others_wait else num_new // 2
        return cut(seq.checkpoints, start, num_new) if seq.checkpoints else num_new

    def _must_wait(self, seq: Sequence) -> bool:
        """Does the step under way bring all that can be computed of `seq`, or draw the last token it may have?"""
        if not seq.num_pending:
            return seq.steps_under_way > 0 and seq.num_scheduled == seq.num_expected
        longest = min(seq.num_prompt + seq.sampling.max_tokens, self._limits.max_model_len)
        return seq.num_expected >= longest

    def _add_drafts(self, propose: Propose, items: list[StepItem], step: _Room) -> None:
        """Drafts for those of `items` that generate."""
        for index, item in enumerate(items):
            seq = item.seq
            if step.left <= 0:
                break
            if item.num_new != 1 or not item.reaches_end or not seq.num_output:
                continue
            room = 0 if seq.num_tokens in seq.checkpoints else cut(seq.checkpoints, seq.num_tokens, step.left)
            drafts = propose(seq, room, len(self.running)) if room else ()
            fits = drafts and self._cache.reserve(seq.seq_id, seq.num_tokens + len(drafts))
            if fits and self._cache.snapshots.reserve_backup(seq.seq_id):
                items[index] = msgspec.structs.replace(item, drafts=drafts)
                step.take_drafts(len(drafts))

    def _make_room(self, seq: Sequence, num_new: int, preempted: list[Sequence]) -> bool:
        """Reserve for `seq`, preempting those that come last. False when it was preempted itself."""
        while not self._cache.reserve(seq.seq_id, seq.num_computed + num_new):
            victim = next(s for s in reversed(self.running) if s is seq or not (s.order or s.first_under_way))
            self._preempt(victim)
            preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._unlink(seq)
        self._cache.close(seq.seq_id)
        seq.num_computed = 0
        seq.tail_ready = False
        seq.prompt_logprobs.clear()
        seq.preemptions += 1
        seq.phase = Phase.WAITING
        bisect.insort(self.waiting, seq, key=_rank)

    def _admit(self, items: list[StepItem], room: _Room) -> None:
        index = 0
        most = self._limits.max_num_seqs
        while index < len(self.waiting) and room.left > 0 and len(self.running) + len(self.remote) < most:
            seq = self.waiting[index]
            if seq.awaits_media and not seq.remote_peer:  # those behind it need not wait for its images
                index += 1
                continue
            hit = self._match(seq)
            if seq.remote_peer and self._try_remote(seq, hit):
                self.waiting.pop(index)
                seq.phase = Phase.REMOTE
                self.remote[seq.seq_id] = seq
                continue
            if seq.remote_peer:  # wants the hand-off and has no room yet: stays first in line
                break
            if seq.awaits_media:
                continue
            self._plan_checkpoints(seq, hit)
            num_new = self._new_tokens(seq, hit.num_tokens, seq.num_tokens, room.left)
            if not self._start(seq, hit, num_new):
                break
            self.waiting.pop(index)
            seq.phase = Phase.RUNNING
            seq.num_computed = seq.num_drafted = hit.num_tokens
            bisect.insort(self.running, seq, key=_rank)
            items.append(StepItem.of(seq, hit.num_tokens, num_new))
            room.take(items[-1])
            self._on_started(seq, hit)

    def _match(self, seq: Sequence) -> PrefixHit:
        """What is hashed of a long prompt that nobody began is its beginning: the rest can wait until it runs."""
        seq.grow_chain(self._cache.shortest_hit)
        if not self._cache.may_hit(seq.chain):
            return NO_HIT
        seq.grow_chain()
        limit = 0 if seq.wants_prompt_logprobs else seq.num_tokens - 1
        return self._cache.match_prefix(seq.chain, limit)

    def _plan_checkpoints(self, seq: Sequence, hit: PrefixHit) -> None:
        step = self._cache.snapshots.checkpoint_step
        if step:
            interval = self._limits.state_snapshot_interval
            seq.checkpoints = checkpoints(hit, seq.num_prompt, seq.num_tokens, step, interval)

    def _start(self, seq: Sequence, hit: PrefixHit, num_new: int) -> bool:
        whole = seq.order is not None
        self._cache.open(seq.seq_id, seq.label)
        ok = self._cache.reserve(seq.seq_id, seq.num_tokens if whole else hit.num_tokens + num_new, hit)
        ok = ok and self._cache.snapshots.reserve_states(seq.seq_id)
        if ok and whole:
            ok = self._cache.snapshots.reserve_tail(seq.seq_id) is not None
        if not ok:
            self._cache.close(seq.seq_id)
        return ok

    def _unlink(self, seq: Sequence) -> None:
        if seq.phase is Phase.RUNNING:
            self.running.remove(seq)
        elif seq.phase is Phase.WAITING:
            self.waiting.remove(seq)
        elif seq.phase is Phase.REMOTE:
            del self.remote[seq.seq_id]
