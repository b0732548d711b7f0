"""Blocks are given back when the device no longer writes to them: what a hand-off brings there would be written over.

The CPU does everything at once, so the device here is a book of what a GPU would still have before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_support import Pair, Solo, greedy, prompts
from mtp_support import MTP, make_mtp

from common.engine.build import BuiltEngine
from common.engine.drafting import DraftWork
from common.engine.runner import Pending, StepResult
from common.kvcache.tables import BlockCopy


class Book:
    """Of one engine. `behind`: was anything that writes to blocks queued since the host waited last?"""

    def __init__(self, built: BuiltEngine, patch: pytest.MonkeyPatch) -> None:
        self.behind = False
        self.num_queued = self.num_given_back = 0
        runner, cache, drafting = built.parts.runner, built.parts.cache, built.parts.drafting
        copy, collect, close, wait = runner.copy_blocks, runner.collect, cache.close, runner.wait

        def copy_blocks(copies: Sequence[BlockCopy]) -> None:
            self._queue(bool(copies))
            copy(copies)

        def collect_step(pending: Pending) -> StepResult:
            self.behind = False
            return collect(pending)

        def wait_for_all() -> None:
            self.behind = False
            wait()

        def give_back(seq_id: int) -> None:
            self.num_given_back += 1
            assert not self.behind
            close(seq_id)

        patch.setattr(runner, "copy_blocks", copy_blocks)
        patch.setattr(runner, "collect", collect_step)
        patch.setattr(runner, "wait", wait_for_all)
        patch.setattr(cache, "close", give_back)
        if drafting is None:
            return
        draft = drafting._model.run

        def run(hidden: object, work: DraftWork) -> list[tuple[int, ...]]:
            self._queue(not any(row.num_drafts for row in work.rows))  # the host reads what is drawn
            return draft(hidden, work)

        patch.setattr(drafting._model, "run", run)

    def _queue(self, writes: bool) -> None:
        self.num_queued += writes
        self.behind |= writes


def drafts(folder: Path) -> Solo:
    return Solo(make_mtp(folder), speculative_config=MTP)


def drafts_apart(folder: Path) -> Solo:
    return Pair(make_mtp(folder), prefill={"speculative_config": MTP}, speculative_config=MTP)


def states(folder: Path) -> Solo:
    return Solo(tiny_models.make_qwen3_5(folder, seed=6, max_position_embeddings=1024), state_snapshot_interval=16)


@pytest.mark.parametrize("make", [drafts, drafts_apart, states])
def test_no_block_is_given_back_while_the_device_writes(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tmp_path / "checkpoint")
    built = [engine.decode, engine.prefill] if isinstance(engine, Pair) else [engine.decode]
    books = [Book(one, monkeypatch) for one in built]
    lengths = (16, 40, 32, 1, 33)
    asked = [(prompt, count) for count in (1, 2, 20) for prompt in prompts(70 + count, lengths)]
    answers = [engine.submit(prompt, greedy(count)) for prompt, count in asked]
    engine.step()
    engine.cancel(answers[-1])
    engine.run(*answers[:-1])
    for prompt, count in asked:
        engine.run(engine.submit(prompt, greedy(count)))
    engine.check_idle()
    assert all(book.num_queued for book in books)
    assert all(book.num_given_back for book in books)
