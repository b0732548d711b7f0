"""A step under way, and what its sequences count of it while the next step is planned.

    of: each sequence's positions and draws are under way -> (the device computes) -> land: they are no longer

Between the two `Sequence.num_scheduled` and `num_expected` run ahead of what is known, and the scheduler holds the
blocks of a sequence that has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from common.engine.runner import Pending
from common.engine.scheduler import StepPlan
from common.engine.sequence import Sequence


@dataclass
class LaunchedStep:
    """Not `sampled`: grammars wait for the tokens of the step before. `at`: the engine's instant of the launch."""

    plan: StepPlan
    pending: Pending
    sampled: bool
    at: float
    followed: list[Sequence] = field(default_factory=list)  # by writes of the step before, which come behind this one

    @classmethod
    def of(cls, plan: StepPlan, pending: Pending, *, sampled: bool, at: float) -> LaunchedStep:
        """The step that was just launched."""
        num_draws = 0
        for item in plan.items:
            seq = item.seq
            seq.steps_under_way += 1
            seq.num_launched += item.num_new
            if item.draws:
                seq.num_pending += 1
                seq.pending_sample = num_draws
                num_draws += 1 + len(item.drafts)
        return cls(plan, pending, sampled, at)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """All that it holds blocks of."""
        yield from (item.seq for item in self.plan.items)
        yield from self.followed

    def follow(self, plan: StepPlan) -> None:
        """The device still writes to blocks of `plan`, the step before: they are held until this one is over."""
        for item in plan.items:
            self.followed.append(item.seq)
            item.seq.steps_under_way += 1

    def land(self) -> None:
        """The step is over for its sequences."""
        for item in self.plan.items:
            item.seq.steps_under_way -= 1
            item.seq.num_launched -= item.num_new
            item.seq.num_pending -= item.draws
        for seq in self.followed:
            seq.steps_under_way -= 1
