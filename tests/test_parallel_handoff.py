"""KV handed from an engine of some ranks to one of others: every rank reads its part from where it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import PEER, Pair, greedy, llama, prompts, reference_tokens
from families import FAMILIES
from mtp_support import MTP, make_mtp

from common.config import SpeculativeConfig
from common.errors import RankLostError
from common.kvtransfer.memory import Fault
from common.kvtransfer.rank_reads import ReadExtent, ReadsLoop
from common.types import WorkerRef

__all__ = ["llama"]

COUNT = 8
Pairs = Callable[..., "RankedPair"]


class RankedPair(Pair):
    """A prefill engine of `source` ranks behind a decode engine of `reader` ranks, which are threads."""

    def __init__(self, folder: Path, source: int, reader: int, **engine: Any) -> None:
        super().__init__(
            folder,
            prefill={"tensor_parallel_size": source, "max_num_batched_tokens": 64} | engine,
            tensor_parallel_size=reader,
            **engine,
        )
        while not self.verdicts:
            self.step()

    def step(self) -> None:
        super().step()
        time.sleep(5e-4)  # ranks need a turn

    def close(self) -> None:
        self.decode.close()
        self.prefill.close()


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    made: list[RankedPair] = []

    def make(*args: Any, **options: Any) -> RankedPair:
        made.append(RankedPair(*args, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.mark.parametrize(("source", "reader"), [(2, 2), (1, 2), (2, 1), (4, 2), (2, 4)])
def test_tokens_after_a_hand_off_between_ranks(llama: Path, source: int, reader: int, pairs: Pairs) -> None:
    pair = pairs(llama, source, reader)
    given = prompts(17, [100, 33, 7])
    answers = [pair.submit(p, greedy(COUNT)) for p in given]
    pair.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.stats.fallback == ""
        assert answer.stats.transferred_tokens == len(prompt)
        assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
    again = pair.submit((*given[0], 5, 6), greedy(COUNT))
    pair.run()
    assert again.tokens[0] == reference_tokens(llama, (*given[0], 5, 6), COUNT)
    pair.check_idle()


SHARED = {"deepseek_v32": "latent rows that every rank has", "qwen3_next": "states by head", "qwen3": "windows"}


@pytest.mark.parametrize("name", SHARED)
def test_what_else_ranks_keep_is_handed_over(name: str, pairs: Pairs, tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    configuration = "window of 24, 8 heads" if name == "qwen3" else family.quick_configurations[0]
    folder = family.configurations[configuration](tmp_path / "checkpoint")
    given = prompts(18, [70, 20])
    results = []
    for source, reader in ((1, 1), (2, 2), (2, 1), (1, 2)):
        pair = pairs(folder, source, reader, **family.engine)
        answers = [pair.submit(p, greedy(COUNT)) for p in given]
        pair.run()
        assert [a.stats.fallback for a in answers] == ["", ""]
        results.append([a.tokens[0] for a in answers])
    assert results[1:] == results[:1] * 3


def test_rows_of_a_draft_layer_are_handed_over(pairs: Pairs, tmp_path: Path) -> None:
    folder = make_mtp(tmp_path / "checkpoint")
    (prompt,) = prompts(22, [70])
    results = []
    for source, reader in ((1, 1), (2, 1), (2, 2)):
        pair = pairs(folder, source, reader, speculative_config=SpeculativeConfig(**MTP))
        answer = pair.submit(prompt, greedy(COUNT))
        pair.run()
        assert answer.stats.fallback == ""
        results.append((answer.tokens[0], answer.stats.draft_tokens, answer.stats.accepted_draft_tokens))
    assert results[1:] == results[:1] * 2
    assert results[0][1] > 0


def test_a_fault_on_one_rank_fails_the_hand_off_on_all(llama: Path, pairs: Pairs) -> None:
    """The bytes of one rank are wrong: the prompt is computed here, and no block stays in flight on any rank."""
    pair = pairs(llama, 2, 2)
    (prompt,) = prompts(19, [90])
    seen: list[int] = []

    def fault_for(read_id: int, pieces: object) -> Fault:
        seen.append(read_id)
        return Fault.CORRUPT if len(seen) == 2 else Fault.NONE  # rank 0 and rank 1 read the same extent

    pair.network.fault_for = fault_for
    answer = pair.submit(prompt, greedy(COUNT))
    pair.run()
    assert answer.stats.fallback == "digest_mismatch"
    assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
    pair.check_idle()


def test_a_source_that_is_lost_on_one_rank_is_lost(llama: Path, pairs: Pairs) -> None:
    pair = pairs(llama, 2, 2)
    (prompt,) = prompts(20, [90])
    pair.network.held = True
    answer = pair.submit(prompt, greedy(COUNT))
    while not pair.network.num_waiting:
        pair.step()
    pair.kill_prefill()
    pair.network.held = False
    pair.run()
    assert answer.tokens[0] == reference_tokens(llama, prompt, COUNT)
    pair.check_idle()


def test_reads_that_end_on_one_rank_end_the_engine(llama: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a read that no rank will ever say has ended are never free again."""

    def break_down(self: ReadsLoop, message: ReadExtent) -> None:
        raise RuntimeError("out of order")

    pair = pairs(llama, 2, 2)
    monkeypatch.setattr(ReadsLoop, "_read", break_down)
    pair.submit(prompts(21, [90])[0], greedy(COUNT))
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        pair.run()


def test_a_source_that_offers_too_few_ranks_is_refused(llama: Path, pairs: Pairs) -> None:
    pair = pairs(llama, 2, 1)
    ready = pair.prefill.ready
    ref = WorkerRef("prefill-1", 2, "nowhere:1")
    assert pair.verdicts[-1].state == "ready"
    reader = pair.decode.parts.reader
    reader.peer_ready(PEER + 1, ref, ready.layout, ready.endpoints[:1], 30.0)
    pair.step()
    assert pair.verdicts[-1].state == "refused"
    assert "2 ranks" in pair.verdicts[-1].detail
