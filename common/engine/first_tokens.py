"""First tokens of prompts that hand-offs bring, drawn beside the steps: such a draw waits for none of them.

    hidden row verified -> due -> launch (head and draw, from that row) -> ended, once the hand-off is done -> delivered
                                        `-> cancel: the hand-off failed, or nobody wants it any more

What a step with other sequences would make of it comes two steps later: one is collected when the hand-off ends, and
the next one is launched already. Until its token is there the scheduler leaves a sequence alone. The row comes before
the KV of all layers, so the draw costs no time; its token is nobody's before all of that is verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from common.engine.batch import Batch, RowMasks
from common.engine.rows import batch_of
from common.engine.runner import Pending, StepResult
from common.engine.scheduler import Scheduler, StepItem, StepPlan
from common.engine.sequence import Phase, Sequence
from common.kvcache.manager import KVCacheManager


class DrawsBeside(Protocol):
    """What a runner must be able to do: see `common.engine.runner.ModelRunner`."""

    def draw_beside(self, batch: Batch, masks: RowMasks | None = None) -> Pending: ...

    def is_done(self, pending: Pending) -> bool: ...

    def collect(self, pending: Pending) -> StepResult: ...


class FirstTokens:
    """Owns the draws under way. `groups` as `build_batch` takes them. `tails`: rows of hand-offs that go on."""

    def __init__(
        self,
        scheduler: Scheduler,
        tails: Mapping[int, Sequence],
        runner: DrawsBeside,
        cache: KVCacheManager,
        groups: Mapping[str, tuple[int, int]],
    ) -> None:
        self._scheduler = scheduler
        self._tails = tails
        self._runner = runner
        self._cache = cache
        self._groups = groups
        self._drawing: list[tuple[StepPlan, Pending]] = []

    def __bool__(self) -> bool:
        """Is a draw under way that is to be delivered?"""
        return any(_is_deliverable(plan) for plan, _ in self._drawing)

    def due(self) -> Iterator[StepPlan]:
        """Sequences of which only the head is missing, and that no step has. By itself each that may still fail.

        Those under a grammar wait for the end: masks are made of what runs.
        """
        running = self._scheduler.running
        items = tuple(StepItem.of(s, s.num_scheduled, 0) for s in running if s.tail_ready and not s.steps_under_way)
        if items:
            yield StepPlan(items)
        for seq in list(self._tails.values()):
            if not seq.steps_under_way and seq.pooling is None and seq.constraint is None:
                yield StepPlan((StepItem(seq, seq.num_tokens, 0, reaches_end=True, draws=True),))

    def launch(self, plan: StepPlan, masks: RowMasks | None) -> None:
        """Start to draw for what was due."""
        for item in plan.items:
            item.seq.tail_ready = True
        pending = self._runner.draw_beside(batch_of(plan, self._cache, self._groups), masks)
        for item in plan.items:
            item.seq.steps_under_way += 1
            item.seq.first_under_way = True
        self._drawing.append((plan, pending))

    def ended(self, *, wait: bool = False) -> Iterator[tuple[StepPlan, Pending]]:
        """Draws that `collect` does not wait for, or all of them; their sequences are the scheduler's again."""
        for drawn in self._drawing:
            plan, pending = drawn
            if not _is_deliverable(plan) or not (wait or self._runner.is_done(pending)):
                continue
            self._take_out(drawn)
            yield drawn

    def cancel(self, seq: Sequence) -> None:
        """Its hand-off ends without success: forget what was drawn. Waits for that, which reads the tail block."""
        seq.tail_ready = False
        for drawn in self._drawing:
            plan, pending = drawn
            if any(item.seq is seq for item in plan.items):
                self._runner.collect(pending)
                self._take_out(drawn)

    def _take_out(self, drawn: tuple[StepPlan, Pending]) -> None:
        self._drawing = [d for d in self._drawing if d is not drawn]
        for item in drawn[0].items:
            item.seq.steps_under_way -= 1
            item.seq.first_under_way = False


def _is_deliverable(plan: StepPlan) -> bool:
    return all(item.seq.phase is not Phase.REMOTE for item in plan.items)
