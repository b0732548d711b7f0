"""First tokens of prompts that hand-offs have brought, drawn beside the steps: such a draw waits for none of them.

    hand-off done -> due -> launch (head and draw, from the hidden row that was handed over) -> ended -> delivered

What a step with other sequences would make of it comes two steps later: one is collected when the hand-off ends, and
the next one is launched already. Until its token is there the scheduler leaves a sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from common.engine.batch import Batch, RowMasks
from common.engine.rows import batch_of
from common.engine.runner import Pending
from common.engine.scheduler import Scheduler, StepItem, StepPlan
from common.kvcache.manager import KVCacheManager


class DrawsBeside(Protocol):
    """What a runner must be able to do: see `common.engine.runner.ModelRunner`."""

    def draw_beside(self, batch: Batch, masks: RowMasks | None = None) -> Pending: ...

    def is_done(self, pending: Pending) -> bool: ...


class FirstTokens:
    """Owns the draws under way. `groups` as `build_batch` takes them."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: DrawsBeside,
        cache: KVCacheManager,
        groups: Mapping[str, tuple[int, int]],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._cache = cache
        self._groups = groups
        self._drawing: list[tuple[StepPlan, Pending]] = []

    def __bool__(self) -> bool:
        """Is a draw under way?"""
        return bool(self._drawing)

    def due(self) -> StepPlan:
        """Sequences of which only the head is missing, and that no step has."""
        running = self._scheduler.running
        return StepPlan(tuple(StepItem.of(s, 0) for s in running if s.tail_ready and not s.steps_under_way))

    def launch(self, plan: StepPlan, masks: RowMasks | None) -> None:
        """Start to draw for what was due."""
        pending = self._runner.draw_beside(batch_of(plan, self._cache, self._groups), masks)
        for item in plan.items:
            item.seq.steps_under_way += 1
            item.seq.first_under_way = True
        self._drawing.append((plan, pending))

    def ended(self, *, wait: bool = False) -> Iterator[tuple[StepPlan, Pending]]:
        """Draws that `collect` does not wait for, or all of them; their sequences are the scheduler's again."""
        for drawn in self._drawing:
            plan, pending = drawn
            if not wait and not self._runner.is_done(pending):
                continue
            self._drawing = [d for d in self._drawing if d is not drawn]
            for item in plan.items:
                item.seq.steps_under_way -= 1
                item.seq.first_under_way = False
            yield drawn
