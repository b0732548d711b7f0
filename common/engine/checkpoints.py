"""At which positions of a prompt the state of a model with recurrent layers is kept. Pure.

A state cannot be cut back, so a prefix hit ends where a copy of it was made. Copies are large (a snapshot per KV
block would cost 48 times the KV), so there are few: at the end of the prompt, where the next turn and other
choices go on; at long intervals, for what is preempted or resumed; and where the cached KV goes further than the
copies do, since a prefix met for the second time will be met again. A hand-over brings the state at the end of the
prompt, where no hit ends: its one copy is made a few tokens later, in time for the next turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.kvcache.manager import PrefixHit

MAX_INTERVALS = 16


def checkpoints(hit: PrefixHit, num_prompt: int, num_tokens: int, step: int, interval: int) -> tuple[int, ...]:
    """Positions after `hit`, ascending, for a sequence that is about to compute up to `num_tokens`.

    All are multiples of `step`, in tokens. `interval` is rounded up to one and doubled until no more than
    `MAX_INTERVALS` are needed, so that a long prompt does not push out all others, and any two agree on positions.
    """
    spacing = -(-interval // step) * step
    while num_tokens > spacing * MAX_INTERVALS:
        spacing *= 2
    ends = ((num_prompt - 1) // step * step, hit.reach)
    marks = {*range(spacing, num_tokens, spacing), *ends}
    return tuple(sorted(m for m in marks if hit.num_tokens < m < num_tokens))


def checkpoint_after(num_tokens: int, step: int) -> int:
    """Where the state of a prompt of `num_tokens` that came from a peer is kept."""
    return (num_tokens // step + 1) * step


def cut(marks: Sequence[int], num_computed: int, num_new: int) -> int:
    """How many of `num_new` tokens a step may take from `num_computed` on without passing one of `marks`."""
    if not marks or num_computed >= marks[-1]:
        return num_new
    return min(num_new, next(m for m in marks if m > num_computed) - num_computed)
