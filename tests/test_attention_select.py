from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from common.attention import flashinfer_modules, ragged
from common.attention.capability import Capability, Needs
from common.attention.flashmla import FlashMlaBackend
from common.attention.reference import ReferenceBackend, capability
from common.attention.select import Registration, choose
from common.errors import ConfigError

NEEDS = Needs(
    device="cpu", dtype="bfloat16", kv_dtype="bfloat16", head_dim=64, group_size=3, block_size=16, has_windows=True
)
REFERENCE = Registration(capability, ReferenceBackend)
FAST = Capability("fast", ("cpu",), ("float32", "bfloat16"), ("float32", "bfloat16"), head_dims=(64, 128))


class FastBackend(ReferenceBackend):
    name = "fast"


def registered(fast: Capability) -> tuple[Registration, ...]:
    return (Registration(lambda: fast, FastBackend), REFERENCE)


def test_auto_takes_the_first_that_can() -> None:
    choice = choose("auto", NEEDS, registered(FAST))
    assert choice.backend.name == "fast"
    assert choice.refusals == {"reference": "another one comes first"}


def test_a_name_is_obeyed() -> None:
    choice = choose("reference", NEEDS, registered(FAST))
    assert choice.backend.name == "reference"
    assert choice.refusals == {"fast": "reference was asked for"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"unavailable": "needs AVX2"}, "AVX2"),
        ({"devices": ("cuda",)}, "cuda"),
        ({"dtypes": ("float16",)}, "float16"),
        ({"kv_dtypes": ("float32",)}, "kv dtype bfloat16"),
        ({"head_dims": (80,)}, "head_dim 64"),
        ({"block_sizes": (32, 64)}, "block size 16: it has 32, 64"),
        ({"max_group_size": 2}, "3 query heads"),
        ({"windows": False}, "sliding windows"),
    ],
)
def test_what_one_cannot_do_leads_to_the_next(change: dict[str, object], word: str) -> None:
    fast = replace(FAST, **change)  # type: ignore[arg-type]
    choice = choose("auto", NEEDS, registered(fast))
    assert choice.backend.name == "reference"
    assert word in choice.refusals["fast"]
    with pytest.raises(ConfigError, match="fast cannot") as raised:
        choose("fast", NEEDS, registered(fast))
    assert word in raised.value.message


def test_latent_rows_are_asked_of_those_that_have_them() -> None:
    needs = replace(NEEDS, latent=True)
    assert choose("auto", needs, registered(replace(FAST, head_dims=()))).refusals["fast"] == "latent attention"
    assert choose("auto", needs, registered(replace(FAST, latent=True))).backend.name == "fast"


def test_mixed_types_can_be_refused() -> None:
    able = replace(FAST, mixed_dtypes=False)
    assert not able.refusal(NEEDS)
    assert "differs" in able.refusal(replace(NEEDS, kv_dtype="float32"))


def test_unknown_name_and_nothing_that_can() -> None:
    with pytest.raises(ConfigError, match="'warp': there are fast, reference"):
        choose("warp", NEEDS, registered(FAST))
    with pytest.raises(ConfigError, match=r"fast cannot: device tpu.*reference cannot: device tpu"):
        choose("auto", replace(NEEDS, device="tpu"), registered(FAST))


def test_the_registered_backends_serve_the_demo() -> None:
    assert choose("auto", NEEDS).backend.name
    assert choose("reference", NEEDS).backend.name == "reference"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    ragged.missing.cache_clear()
    yield
    ragged.missing.cache_clear()


@pytest.mark.parametrize("installed", [False, True], ids=["not installed", "not to be loaded"])
def test_a_package_that_is_missing_or_broken_leads_to_the_next_with_a_line(
    installed: bool, hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("flashinfer", "flash_mla")
    monkeypatch.syspath_prepend(tmp_path)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # to Python, what is not there
        if installed:
            monkeypatch.delitem(sys.modules, name)
            (tmp_path / f"{name}.py").write_text("import something_that_it_needs\n", encoding="utf-8")
    reason = "something_that_it_needs" if installed else "is not installed"
    assert reason in flashinfer_modules.missing()
    with capture_logs() as lines:
        backend = FlashMlaBackend()
    assert not backend.ragged.able(torch.bfloat16, 192, 128)
    flash_mla, flashinfer = lines
    assert reason in flash_mla["reason"]
    assert flash_mla["instead"] == "kernels in Triton"
    assert reason in flashinfer["reason"]
    assert flashinfer["instead"] == "plain torch"
