"""Weights that stay in FP8: each means what the loader makes of it in floats, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CPU
from quant_support import Quantised, fp8_block, fp8_config, quantise
from tiny_models import make_deepseek_v3, make_llama, make_qwen3_moe
from torch import Tensor

from common.errors import ConfigError
from common.kernels.fp8_ops import dequantise
from common.layers.base import Slot, TensorParallel
from common.layers.quant_spec import QuantSpec
from common.models import weights
from common.models.spec import ModelSpec
from common.models.weights import choose_forms, keeps_fp8, load_model

NAMES = ("weight", "weight_scale_inv")
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MOE = {**LLAMA, "moe_intermediate_size": 256}


def blocks(name: str, w: Tensor) -> Quantised | None:
    return fp8_block(w, (128, 128), torch.float32, NAMES) if name.endswith("_proj.weight") else None


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(weights, "keeps_fp8", lambda *_: True)


def load(folder: Path, tp: TensorParallel | None = None, **options: Any) -> dict[str, Slot]:
    spec = ModelSpec.from_folder(folder)
    model = load_model(spec, dtype="float32", device=CPU, tp=tp, **options)
    found = weights.assemble(weights.read_index(spec.folder), spec.quant).stored
    return {slot.name: slot for slot in choose_forms(model.slots(), found)[0]}


def floats(slot: Slot) -> Tensor:
    return slot.target.float() if slot.scales is None else dequantise(slot.target, slot.scales, torch.float32)


def in_fp8(slots: dict[str, Slot]) -> set[str]:
    return {name for name, slot in slots.items() if slot.target.dtype == torch.float8_e4m3fn}


def whole(name: str, w: Tensor) -> Quantised | None:
    """One scale for a tensor."""
    if not name.endswith("_proj.weight"):
        return None
    tensors, values = fp8_block(w, (1000, 1000), torch.float32, ("weight", "weight_scale"))
    return tensors | {"weight_scale": tensors["weight_scale"].view(())}, values


@pytest.mark.parametrize("choose", [blocks, whole])
@pytest.mark.parametrize("make", [make_llama, make_qwen3_moe])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoints_scales_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object, ranks: int, choose: object
) -> None:
    folder = tmp_path / "model"
    make(folder, **(MOE if make is make_qwen3_moe else LLAMA))  # type: ignore[operator]
    block = None if choose is whole else [128, 128]
    quantise(folder, tmp_path / "plain", fp8_config((1, 1), weight_block_size=block), choose)  # type: ignore[arg-type]
    for rank in range(ranks):
        tp = TensorParallel(rank, ranks, lambda partial: partial)
        want = load(folder, tp)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "keeps_fp8", lambda *_: True)
            got = load(folder, tp)
        assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight")}
        for name, slot in got.items():
            assert torch.equal(floats(slot), want[name].target), name


@pytest.mark.usefixtures("kept")
def test_other_weights_are_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --quantization fp8 does; shares off the boundaries, and what a layer reads itself, stay as they are."""
    folder = make_deepseek_v3(tmp_path / "model", hidden_size=128, q_lora_rank=128, moe_intermediate_size=128)
    got = load(folder, quantization="fp8")
    monkeypatch.undo()
    want = load(folder)
    assert any("experts" in name for name in in_fp8(got))
    assert any("q_a_proj" in name for name in in_fp8(got))
    assert not any("kv_b_proj" in name or ".gate.weight" in name or "embed" in name for name in in_fp8(got))
    for name, slot in got.items():
        error = (floats(slot) - want[name].target).norm() / want[name].target.norm().clamp(min=1e-9)
        assert error < (0.05 if name in in_fp8(got) else 1e-9), name


@pytest.mark.usefixtures("kept")
def test_dummy_weights(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path / "model", **MOE)
    for slot in load(folder, load_format="dummy").values():
        if slot.scales is not None:
            assert abs(float(floats(slot).std()) / 0.02 - 1) < 0.05


def test_who_keeps_fp8() -> None:
    blocks, other = QuantSpec("fp8", (128, 128)), QuantSpec("fp8", (64, 64))
    gpu = torch.device("cuda")
    assert keeps_fp8(blocks, "auto", "bfloat16", gpu)
    assert keeps_fp8(None, "fp8", "bfloat16", gpu)
    assert not keeps_fp8(blocks, "none", "bfloat16", gpu)
    assert not keeps_fp8(blocks, "auto", "float32", gpu)
    assert not keeps_fp8(other, "auto", "bfloat16", gpu)
    assert not keeps_fp8(None, "auto", "bfloat16", gpu)
    assert not keeps_fp8(blocks, "auto", "bfloat16", CPU)
    with pytest.raises(ConfigError, match="needs a GPU"):
        keeps_fp8(blocks, "fp8", "bfloat16", CPU)
