"""Every family in the modes of an engine, a part of the matrix: see `test_families_exact.py` for all of it.

A family's first configuration goes through all modes, the others through two each, taken in turn. Prompts are of 1 to
100 tokens, with 64 tokens of answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from families import FAMILIES, Family
from family_modes import MODES, run_cell
from family_report import DOCS, newest, section, table
from family_support import TOLERANCE, Checkpoints

LENGTHS, COUNT = (1, 17, 100), 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("families"), pytestconfig)


def pairwise() -> Iterator[tuple[Family, str, str]]:
    names = tuple(MODES)
    for family in FAMILIES:
        first, *others = family.quick_configurations
        yield from ((family, first, mode) for mode in names)
        for i, configuration in enumerate(others):
            yield from ((family, configuration, names[(2 * i + k) % len(names)]) for k in range(2))


@pytest.mark.parametrize(
    ("family", "configuration", "mode"), [pytest.param(*c, id=f"{c[0].name}-{c[1]}-{c[2]}") for c in pairwise()]
)
def test_a_mode_equals_transformers(family: Family, configuration: str, mode: str, checkpoints: Checkpoints) -> None:
    folder, expected = checkpoints.expect(family, configuration, LENGTHS, COUNT)
    assert sum(e.near_ties for e in expected) == 0, "a near tie proves nothing: choose another seed"
    assert max(e.disagreement for e in expected) < TOLERANCE / 2
    cell = run_cell(mode, folder, expected, dict(family.engine))
    assert cell.mismatches == []
    assert cell.error < TOLERANCE
    assert cell.tokens == len(LENGTHS) * COUNT


def test_the_table_is_what_the_last_exact_run_wrote() -> None:
    assert section(DOCS.read_text(encoding="utf-8")) == table(newest())
