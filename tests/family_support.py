"""What both matrices of families need: checkpoints made once, prompts, and the reference's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from engine_support import prompts
from families import Family
from family_oracle import Expected, FamilyOracle

TOLERANCE = 1e-4  # logits, fp32


class Checkpoints:
    """Makes a configuration's checkpoint when it is first asked for, and asks the reference about it."""

    def __init__(self, root: Path, pytestconfig: pytest.Config) -> None:
        assert pytestconfig.cache is not None
        self._root = root
        self._cache = pytestconfig.cache.mkdir("families")
        self._oracles: dict[str, tuple[Path, FamilyOracle]] = {}

    def expect(
        self, family: Family, configuration: str, lengths: Sequence[int], count: int
    ) -> tuple[Path, list[Expected]]:
        """The checkpoint's folder, and the answers to one prompt of each length."""
        name = f"{family.name}-{configuration}".replace(" ", "-").replace(",", "")
        if name not in self._oracles:
            folder = family.configurations[configuration](self._root / name)
            self._oracles[name] = (folder, FamilyOracle(folder, family.reference, self._cache))
        folder, oracle = self._oracles[name]
        return folder, [oracle.answer(p, count) for p in prompts(1000, lengths)]
