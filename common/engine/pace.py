"""How many drafts a sequence gets, by what came of its earlier ones. Plain arithmetic; one object per sequence.

    drafting <-> waiting (drafts fail: `MIN_WAIT_STEPS` to `MAX_WAIT_STEPS` steps without, then a trial of one)

`rate` is the moving share of right ones among the drafts that were tested: those up to the first wrong one. The
i-th draft of a step is of use with probability rate^i, so a step has as many drafts as are of use with at least
the probability `cost`, what one more token costs a step. It depends on nothing but the sequence's own history.
"""

from __future__ import annotations

from dataclasses import dataclass

START_RATE = 0.6
SMOOTHING = 0.25  # weight of the newest draft
MIN_WAIT_STEPS = 8
MAX_WAIT_STEPS = 128


@dataclass
class Pace:
    """`cost` in decode steps, above 0."""

    cost: float
    rate: float = START_RATE
    wait: int = 0  # steps until the next trial
    last_wait: int = 0
    num_drafts: int = 0  # steps that had drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def allow(self, most: int) -> int:
        """Drafts for this step, `most` at most; called once a step."""
        if self.wait:
            self.wait -= 1
            return 0
        count, use = min(1, most), self.rate * self.rate
        while count < most and use >= self.cost:
            count += 1
            use *= self.rate
        return count

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """The first `num_accepted` of a step's drafts were right."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        for i in range(min(num_accepted + 1, num_drafts)):
            self.rate += SMOOTHING * ((1.0 if i < num_accepted else 0.0) - self.rate)
        if self.rate >= self.cost:
            self.last_wait = 0
        else:
            self.wait = self.last_wait = min(max(2 * self.last_wait, MIN_WAIT_STEPS), MAX_WAIT_STEPS)
