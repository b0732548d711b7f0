"""Where the states of recurrent layers are kept, and how steps are cut to end there."""

from __future__ import annotations

import itertools
import random

from common.engine.batch import BatchRow, build_batch
from common.engine.checkpoints import MAX_INTERVALS, checkpoints, cut
from common.kvcache.manager import NO_HIT, PrefixHit


def test_the_end_of_a_prompt_is_kept_where_a_hit_may_end() -> None:
    """The last token is always computed, so a hit of the same prompt ends before it."""
    assert checkpoints(NO_HIT, 100, 100, 16, 2048) == (96,)
    assert checkpoints(NO_HIT, 97, 97, 16, 2048) == (96,)
    assert checkpoints(NO_HIT, 96, 96, 16, 2048) == (80,)
    assert checkpoints(NO_HIT, 16, 16, 16, 2048) == ()
    assert checkpoints(NO_HIT, 100, 100, 48, 2048) == (96,)
    assert checkpoints(PrefixHit(96, reach=96), 100, 100, 16, 2048) == ()


def test_long_prompts_are_kept_at_intervals() -> None:
    assert checkpoints(NO_HIT, 5000, 5000, 16, 2048) == (2048, 4096, 4992)
    assert checkpoints(PrefixHit(2048, reach=2048), 5000, 5000, 16, 2048) == (4096, 4992)
    assert checkpoints(NO_HIT, 200, 200, 16, 50) == (64, 128, 192), "rounded up to whole steps"
    assert checkpoints(NO_HIT, 100, 300, 16, 128) == (96, 128, 256), "tokens of the answer are recomputed too"


def test_the_number_of_intervals_is_bounded_and_prompts_agree_on_them() -> None:
    found = {n: set(checkpoints(NO_HIT, n, n, 16, 64)[:-1]) for n in (900, 1100, 5000, 100_000)}
    assert all(len(marks) <= MAX_INTERVALS for marks in found.values())
    for few, many in itertools.pairwise(found[n] for n in sorted(found, reverse=True)):
        assert {m for m in few if m < max(many)} <= many


def test_a_prefix_met_again_is_kept_at_its_end() -> None:
    assert checkpoints(PrefixHit(reach=48), 100, 100, 16, 2048) == (48, 96)
    assert checkpoints(PrefixHit(32, reach=64), 100, 100, 16, 2048) == (64, 96)
    assert checkpoints(PrefixHit(64, reach=64), 100, 100, 16, 2048) == (96,)


def test_steps_end_at_each_mark_and_lose_no_token() -> None:
    rng = random.Random()
    for _ in range(200):
        total = rng.randint(1, 3000)
        marks = checkpoints(PrefixHit(reach=rng.randrange(0, 3000, 16)), total, total, 16, rng.randint(1, 900))
        done, ends = 0, []
        while done < total:
            num_new = cut(marks, done, min(total - done, rng.randint(1, 700)))
            assert num_new > 0
            done += num_new
            ends.append(done)
        assert ends[-1] == total
        assert set(marks) <= set(ends)
    assert cut((), 5, 7) == 7


def test_the_batch_names_the_state_of_each_row_with_tokens() -> None:
    rows = [
        BatchRow([1, 2, 3], 0, {"full": [4]}, states={"state": 5}),
        BatchRow([], 9, {"full": [6]}, states={"state": 7}),
        BatchRow([8], 9, {"full": [6]}, states={"state": 2}),
    ]
    batch = build_batch(rows, {"full": (16, 0)})
    assert {name: ids.tolist() for name, ids in batch.states_S.items()} == {"state": [5, 2]}
    assert build_batch([rows[1]], {"full": (16, 0)}).states_S == {}
    assert build_batch([BatchRow([1], 0, {"full": [4]})], {"full": (16, 0)}).states_S == {}
