"""The whole matrix: every family and configuration in every mode, prompts of 1 to 700 tokens, 64 tokens of answer.

Run by `make test-exact`. In fp32 all tokens must be those of transformers and all logits within 1e-4 of its own, at
every position that an engine computes (`family_modes.py` says how they are seen). A token that differs where the
reference's best two logits are within 1e-4 is a near tie: counted and shown, not hidden. Beside the modes within one
process there is the hand-off between real processes over UCX, behind the API, where the logprobs of all tokens stand in
for logits. The table in docs/models.md and benchmarks/results/families-<date>.json are written at the end; a run of a
part (`-k llama`) replaces that part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from families import Family, all_configurations
from family_modes import MODES, Cell, run_cell
from family_oracle import Expected
from family_report import PROCESSES, Row, record
from family_support import TOLERANCE, Checkpoints
from identity_support import open_way

from benchmarks.report import environment

pytestmark = [pytest.mark.exact, pytest.mark.timeout(1800)]

LENGTHS, COUNT = (1, 2, 15, 16, 17, 100, 333, 700), 64
CONFIGURATIONS = [pytest.param(*c, id=f"{c[0].name}-{c[1]}") for c in all_configurations()]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("families"), pytestconfig)


@pytest.fixture(scope="module")
def cells() -> Iterator[list[Row]]:
    started = environment("torch", "transformers", prompts=list(LENGTHS), tokens_each=COUNT)
    found: list[Row] = []
    yield found
    record(started, cells=found)


def keep(cells: list[Row], family: Family, configuration: str, mode: str, cell: Cell, started: float) -> None:
    seconds = round(time.monotonic() - started, 1)
    cells.append(
        {"family": family.name, "configuration": configuration, "mode": mode, **asdict(cell), "seconds": seconds}
    )


def check(cell: Cell, expected: list[Expected]) -> None:
    assert cell.mismatches == []
    assert cell.error < TOLERANCE
    assert cell.prompts == len(expected)
    assert cell.near_ties or cell.tokens == len(expected) * COUNT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "configuration"), CONFIGURATIONS)
def test_a_mode_equals_transformers(
    family: Family, configuration: str, mode: str, checkpoints: Checkpoints, cells: list[Row]
) -> None:
    folder, expected = checkpoints.expect(family, configuration, LENGTHS, COUNT)
    assert max(e.disagreement for e in expected) < TOLERANCE / 2
    started = time.monotonic()
    cell = run_cell(mode, folder, expected, dict(family.engine))
    keep(cells, family, configuration, mode, cell, started)
    check(cell, expected)


@pytest.mark.parametrize(("family", "configuration"), CONFIGURATIONS)
def test_processes_that_hand_over_by_ucx_equal_transformers(
    family: Family, configuration: str, tmp_path: Path, checkpoints: Checkpoints, cells: list[Row]
) -> None:
    folder, expected = checkpoints.expect(family, configuration, LENGTHS, COUNT)
    started = time.monotonic()
    cell = Cell()
    engine = {"max_model_len": 1024, "max_num_seqs": 16, "num_threads": 1, "kv_cache_memory_bytes": 64 << 20}
    with open_way("separated", tmp_path, folder, min_remote_tokens=1, **engine | dict(family.engine)) as way:
        answers = way.answer([e.prompt for e in expected], max_tokens=COUNT)
    for one, got in zip(expected, answers, strict=True):
        equal = cell.compare_tokens(one, got.tokens)
        wanted = one.logits_PV[len(one.prompt) - 1 :].log_softmax(-1)
        for index in range(equal):
            cell.positions += 1
            cell.error = max(cell.error, abs(got.logprobs[index] - wanted[index, got.tokens[index]].item()))
        assert got.stats["fallback"] == ""
        assert got.stats["transferred_tokens"] == len(one.prompt)
    cell.happened["transferred_tokens"] = sum(got.stats["transferred_tokens"] for got in answers)
    keep(cells, family, configuration, PROCESSES, cell, started)
    check(cell, expected)
