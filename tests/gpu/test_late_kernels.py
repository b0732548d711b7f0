"""An engine that is ready has what its steps need: traffic of any shape compiles no more kernels.

Kernels that an earlier test of this process has loaded are not seen to be missing; each family has some of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from families import FAMILIES, Family
from mtp_support import make_mtp
from tiny_models import make_qwen3

from nanodeploy import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_for_engines")]

SEED = 20261126
ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 200,
}


@pytest.fixture
def loaded() -> Iterator[Counter[str]]:
    """Kernels by name that Triton compiles, or reads compiled, from when it is cleared on."""
    import triton

    found: Counter[str] = Counter()

    def heard(*, src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
        found[metadata["name"]] += 1

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = heard
    yield found
    triton.knobs.compilation.listener = before


def compiles_nothing(folder: Path, loaded: Counter[str], **options: Any) -> None:
    random = Random(SEED)
    with LLM(folder, **(ON_GPU | options)) as llm:
        loaded.clear()
        for count in (1, 3, 40):
            lengths = [random.choice((random.randint(1, 20), random.randint(1, 400))) for _ in range(count)]
            prompts = [[random.randrange(2, 250) for _ in range(length)] for length in lengths]
            params = [
                SamplingParams(
                    temperature=random.choice((0.0, 0.8)),
                    top_p=random.choice((1.0, 0.9)),
                    max_tokens=random.randint(1, 20),
                    ignore_eos=True,
                    seed=i,
                )
                for i in range(count)
            ]
            llm.generate(prompts, params)
            assert loaded == {}, f"{count} at once"


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_families(family: Family, loaded: Counter[str], tmp_path: Path) -> None:
    folder = family.configurations[family.quick_configurations[0]](tmp_path / "model")
    engine = {name: value for name, value in family.engine.items() if name != "block_size"}
    compiles_nothing(folder, loaded, **engine)


OPTIONS = ({"kv_dtype": "fp8_e4m3", "load_format": "dummy"}, {"deterministic": True}, {"enforce_eager": True})


@pytest.mark.parametrize("options", [pytest.param(o, id=next(iter(o))) for o in OPTIONS])
def test_options(options: dict[str, Any], loaded: Counter[str], tmp_path: Path) -> None:
    compiles_nothing(make_qwen3(tmp_path / "model", seed=3), loaded, **options)


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_drafts(method: str, loaded: Counter[str], tmp_path: Path) -> None:
    folder = make_mtp(tmp_path / "model") if method == "mtp" else make_qwen3(tmp_path / "model", seed=3)
    drafting = {"method": method, "num_speculative_tokens": 3}
    compiles_nothing(folder, loaded, speculative_config=drafting)
