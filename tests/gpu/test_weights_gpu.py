"""Weights on a GPU: read, drawn and kept in FP8, beside what the CPU makes of the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_support import Quantised, fp8_block, fp8_config, quantise
from tiny_models import make_llama, make_qwen3_moe
from torch import Tensor

from common.kernels.fp8_ops import dequantise
from common.layers.base import Slot
from common.models.spec import ModelSpec
from common.models.weights import choose_forms, load_model

pytestmark = pytest.mark.gpu

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
SIZES = {"hidden_size": 256, "intermediate_size": 512, **HEADS}


def load(folder: Path, device: torch.device, **options: str) -> dict[str, Slot]:
    model = load_model(ModelSpec.from_folder(folder), dtype="bfloat16", device=device, **options)
    return {slot.name: slot for slot in choose_forms(model.slots(), {})[0]}


def floats(slot: Slot) -> Tensor:
    if slot.scales is None:
        return slot.target.float().cpu()
    return dequantise(slot.target, slot.scales, torch.bfloat16).float().cpu()


def blocks(name: str, w: Tensor) -> Quantised | None:
    return fp8_block(w, (128, 128), torch.float32, ("weight", "weight_scale_inv")) if "_proj." in name else None


def test_weights_are_the_cpus(cuda: torch.device, tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path / "model", moe_intermediate_size=256, **SIZES)
    got, want = load(folder, cuda), load(folder, torch.device("cpu"))
    for name, slot in got.items():
        assert slot.target.is_cuda
        assert torch.equal(floats(slot), floats(want[name])), name


def test_blocks_of_fp8_stay(cuda: torch.device, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", **SIZES)
    quantise(folder, tmp_path / "plain", fp8_config((128, 128)), blocks)
    got, want = load(folder, cuda), load(folder, torch.device("cpu"))
    assert sum(slot.target.dtype == torch.float8_e4m3fn for slot in got.values()) > 5
    for name, slot in got.items():
        assert torch.equal(floats(slot), floats(want[name])), name


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_what_is_not_converted_is_read_as_it_is(cuda: torch.device, tmp_path: Path, quantization: str) -> None:
    """A layer's attention, and a matrix of a packed two: the other is turned into numbers."""
    excluded = ["model.layers.0.self_attn", "model.layers.1.mlp.up_proj"]
    folder = make_llama(tmp_path / "model", **SIZES)
    config = fp8_config((128, 128), modules_to_not_convert=excluded)
    choose = lambda name, w: None if any(part in name for part in excluded) else blocks(name, w)  # noqa: E731
    quantise(folder, tmp_path / "plain", config, choose)
    got, want = load(folder, cuda, quantization=quantization), load(folder, torch.device("cpu"))
    floating = {name for name, slot in got.items() if slot.target.dtype != torch.float8_e4m3fn and "_proj." in name}
    assert {".".join(name.split(".")[2:4]) for name in floating} == {"0.self_attn", "1.mlp"}
    assert not any("down_proj" in name for name in floating)
    for name, slot in got.items():
        assert torch.equal(floats(slot), floats(want[name])), name


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_drawn_weights(cuda: torch.device, tmp_path: Path, quantization: str) -> None:
    folder = make_qwen3_moe(tmp_path / "model", moe_intermediate_size=256, **SIZES)
    options = {"load_format": "dummy", "quantization": quantization}
    first, second = load(folder, cuda, **options), load(folder, cuda, **options)
    for name, slot in first.items():
        assert torch.equal(floats(slot), floats(second[name])), name
        if name.endswith("_proj.weight"):
            assert abs(float(floats(slot).std()) / 0.02 - 1) < 0.05
