"""How many drafts a sequence gets, by what came of its earlier ones. Plain arithmetic; one object per sequence.

    drafting <-> waiting (drafts do not pay: `MIN_WAIT_STEPS` to `MAX_WAIT_STEPS` steps without, then a trial of one)

`rate` is the moving share of right ones among the drafts that were tested: those up to the first wrong one. The
i-th draft of a step is of use with probability rate^i, and then saves the sequence a step later; so a step has as
many drafts as are of use with at least the probability `cost`, the price of one against what it may save.
"""

from __future__ import annotations

from dataclasses import dataclass

START_RATE = 0.6
SMOOTHING = 0.25  # weight of the newest draft
MIN_WAIT_STEPS = 8
MAX_WAIT_STEPS = 128
FIXED_TOKENS = 24  # of computation that take as long as what a step costs at any size: reading the weights


def price(draft_cost: float, num_sequences: int) -> float:
    """A draft's cost against the worth of one that is right. `draft_cost`: of making it, in steps of one sequence.

    To verify it takes a token's computation; right, it saves that and a share of a step's fixed cost, which is the
    smaller, the more sequences share it.
    """
    return draft_cost + num_sequences / (num_sequences + FIXED_TOKENS)


@dataclass
class Pace:
    rate: float = START_RATE
    cost: float = 0.0  # of the drafts allowed last
    wait: int = 0  # steps until the next trial
    last_wait: int = 0
    asked_at: int = -1  # how many tokens there were when drafts were allowed last
    allowed: int = 0  # how many it were
    num_drafts: int = 0  # steps that had drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def allow_at(self, num_tokens: int, most: int, cost: float) -> int:
        """`allow` for the step behind `num_tokens`; may be asked again until there are more."""
        if num_tokens != self.asked_at:
            self.asked_at, self.allowed = num_tokens, self.allow(most, cost)
        return min(self.allowed, most)

    def allow(self, most: int, cost: float) -> int:
        """Drafts for this step, `most` at most, at the `cost` that they have in it; called once a step."""
        self.cost = cost
        if self.wait and self.rate < cost:
            self.wait -= 1
            return 0
        count, use = min(1, most), self.rate * self.rate
        while count < most and use >= cost:
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
        if num_accepted:
            self.wait = self.last_wait = 0
        elif self.rate < self.cost:
            self.wait = self.last_wait = min(max(2 * self.last_wait, MIN_WAIT_STEPS), MAX_WAIT_STEPS)
