"""Passes of the multi-token-prediction layer as they are recorded: the drafts of passes as they are run, to the token,
and the same rows in the layer's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from draft_graph_support import hold_padding, let_padding_go, record
from engine_support import Solo, greedy, prompts, reference_tokens
from mtp_support import ALWAYS, MTP, make_mtp
from test_mtp import TRAINED

from common.engine.draft_graphs import source_rows
from common.types import SamplingParams

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.8, "frequency_penalty": 0.7},
    {"min_tokens": 12, "ignore_eos": False},
    {"logit_bias": ((7, 3.0),)},
    {"temperature": 0.7, "n": 2},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp(tmp_path_factory.mktemp("mtp"), seed=4)


def drafting_engine(folder: Path, *, recorded: tuple[int, ...] = (), always: bool = True, **options: Any) -> Any:
    """(engine, the drafts of all passes, recorded passes or None)"""
    solo = Solo(folder, speculative_config=MTP, **options)
    graphs = None
    if recorded:
        graphs = record(solo.decode, recorded, MTP["num_speculative_tokens"] + 1)
    else:
        hold_padding(solo.decode)
    speculator, runner = solo.decode.parts.speculator, solo.decode.parts.drafting._model  # type: ignore[union-attr]
    if always:
        speculator._cost = ALWAYS  # type: ignore[union-attr]
    found: list[list[tuple[int, ...]]] = []
    run = runner.run
    runner.run = lambda hidden, work: (found.append(run(hidden, work)), found[-1])[1]  # type: ignore[method-assign]
    return solo, found, graphs


def answers(solo: Solo, given: list[tuple[int, ...]], count: int) -> list[dict[int, list[int]]]:
    asked = [solo.submit(p, greedy(count, **KINDS[i % len(KINDS)] | {"seed": i})) for i, p in enumerate(given)]
    solo.run()
    let_padding_go(solo.decode)
    solo.check_idle()
    return [a.tokens for a in asked]


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (3,)])
@pytest.mark.parametrize("always", [True, False])
def test_recorded_drafts_are_those_of_passes_as_they_are_run(sizes: tuple[int, ...], always: bool) -> None:
    """The trained model's: some sequences have all drafts right, others none, and numbers of drafts differ."""
    given = [(1, *range(5, 5 + 2 * n)) for n in range(1, 8)]
    eager, wanted, _ = drafting_engine(TRAINED, always=always)
    solo, found, graphs = drafting_engine(TRAINED, recorded=sizes, always=always)
    assert answers(solo, given, 60) == answers(eager, given, 60)
    assert found == wanted
    assert {query_len for _, query_len in graphs.replayed} >= {1, 4}
    assert {size for size, _ in graphs.replayed} <= set(sizes)
    rows, others = (s.decode.parts.runner._pool.region("draft_mla_latent") for s in (solo, eager))
    padding = graphs._pool.padding_block("")
    assert (rows[padding] != 0).any()
    rows[padding] = others[padding]
    assert torch.allclose(rows, others, atol=1e-4)


def test_recorded_passes_take_what_waited_and_what_a_cached_prefix_has_kept(model: Path) -> None:
    """Drafts that never pay: rows wait, and are made when a trial comes."""
    given = prompts(98, (20, 33, 7))
    eager, wanted, _ = drafting_engine(model, always=False)
    solo, found, graphs = drafting_engine(model, recorded=(1, 2, 4), always=False)
    for engine in (eager, solo):
        for prompt in (*given, given[1] + given[0]):
            answer = engine.submit(prompt, greedy(64))
            engine.run()
            assert answer.tokens[0] == reference_tokens(model, prompt, 64)
    assert found == wanted
    assert graphs.replayed


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_draw_that_fails_ends_a_chain_and_changes_no_token(model: Path, value: float) -> None:
    solo, found, _ = drafting_engine(model, recorded=(1,))
    (prompt,) = prompts(96, (40,))
    answer = solo.submit(prompt, greedy(20))
    pool = solo.decode.parts.runner._pool
    while not answer.ended:
        for region in ("draft_mla_latent", "draft_hidden"):
            pool.region(region).fill_(value)
        solo.step()
    assert answer.tokens[0] == reference_tokens(model, prompt, 20)
    assert any(not drafts for step in found for drafts in step) == (value != 1e30)


def test_rows_before_are_padded_in_front() -> None:
    assert source_rows([4, 0], [1, 3], 3).tolist() == [4, 4, 4, 0, 1, 2]
    assert source_rows([0, 2, 3], [2, 1, 2], 2).tolist() == [0, 1, 2, 2, 3, 4]


def test_drawn_answers_with_recorded_drafts_are_right_as_often() -> None:
    solo, _, _ = drafting_engine(TRAINED, recorded=(1, 2), always=False)
    params = [SamplingParams(temperature=t, seed=3, max_tokens=200, ignore_eos=True) for t in (0.0, 1.0)]
    got = [solo.submit((1, *range(5, 12)), one) for one in params]
    solo.run()
    shares = [a.stats.accepted_draft_tokens / a.stats.draft_tokens for a in got]
    assert shares[0] > 0.7
    assert shares[1] > 0.5
