"""Quantised checkpoints: loaded weights equal the reference's bit for bit, and logits those of the float checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CPU, PagedModel, Sum
from quant_support import (
    Quantised,
    fp4_rows,
    fp8_block,
    fp8_config,
    int4_config,
    int4_groups,
    load_shards,
    quantise,
    save_shards,
)
from safetensors.torch import load_file, save_file
from tiny_models import make_deepseek_v3, make_deepseek_v4, make_deepseek_v32, make_llama, make_qwen3_moe
from torch import Tensor

from common.errors import ConfigError
from common.layers.quant_spec import QuantSpec
from common.models.spec import ModelSpec
from common.models.weights import choose_forms, load_model

V3 = ("weight", "weight_scale_inv")
V4 = ("weight", "scale")
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
SIZES = {"hidden_size": 80, "intermediate_size": 88}
TOKENS = list(range(7, 60))


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight"))


def fp8(block: tuple[int, int], scale: torch.dtype = torch.float32, names: tuple[str, str] = V3) -> Any:
    return lambda name, w: fp8_block(w, block, scale, names) if is_linear(name) else None


def fp8_fp4(name: str, w: Tensor) -> Quantised | None:
    """As DeepSeek-V4 has it: experts in FP4, the rest in FP8, scales that are powers of two."""
    if ".experts." in name:
        return fp4_rows(w, V4)
    is_dense = is_linear(name) or re.search(r"attn\.w[a-z_]+\.weight|indexer\.wq_b|shared_experts", name)
    return fp8_block(w, (32, 32), torch.float8_e8m0fnu, V4) if is_dense else None


def fused_fp8(name: str, w: Tensor) -> Quantised | None:
    """[E, N, K] tensors, which have no `.weight` in their names."""
    names = (name, f"{name}_scale_inv")
    return fp8_block(w, (32, 48), torch.float32, names) if "experts" in name else None


def fp8_alone(scale_shape: tuple[int, ...], rows: bool = False) -> Any:
    """One scale for a tensor, or for each row; and scales of activations, which nobody reads."""

    def choose(name: str, w: Tensor) -> Quantised | None:
        if not is_linear(name):
            return None
        tensors, values = fp8_block(w, (1 if rows else 1000, 1000), torch.float32, ("weight", "weight_scale"))
        tensors["weight_scale"] = (
            tensors["weight_scale"].reshape(-1, 1) if rows else tensors["weight_scale"].view(scale_shape)
        )
        return tensors | {"input_scale": torch.tensor(0.5)}, values

    return choose


def compressed_fp8(strategy: str, **weights: Any) -> dict[str, Any]:
    """As compressed-tensors writes FP8."""
    config = int4_config(32, ["lm_head"]) | {"format": "float-quantized"}
    scheme = config["config_groups"]["group_0"]
    scheme["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    scheme["weights"] |= {"num_bits": 8, "type": "float", "strategy": strategy, "group_size": None, **weights}
    return config


def int4(group: int, scale: torch.dtype) -> Any:
    return lambda name, w: int4_groups(w, group, scale) if ".experts." in name else None


def fuse(folder: Path) -> None:
    """One tensor for all experts of a layer."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{e}.{n}_proj.weight") for e in range(8)]) for n in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
    save_file(tensors, folder / "model.safetensors")


def llama(folder: Path) -> Path:
    return make_llama(folder, **SIZES)


def moe(folder: Path) -> Path:
    return make_qwen3_moe(folder, **SIZES)


def moe_fused(folder: Path) -> Path:
    fuse(make_qwen3_moe(folder, **SIZES))
    return folder


E8M0, BF16 = torch.float8_e8m0fnu, torch.bfloat16
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], Any]] = {
    "fp8": (llama, fp8_config((32, 48)), fp8((32, 48))),
    "fp8-128": (llama, fp8_config((128, 128), modules_to_not_convert=["lm_head"]), fp8((128, 128))),
    "fp8-bf16-scales": (llama, fp8_config((16, 16)), fp8((16, 16), BF16)),
    "fp8-e8m0": (llama, fp8_config((32, 32), scale_fmt="ue8m0"), fp8((32, 32), E8M0, V4)),
    "fp8-experts": (moe, fp8_config((32, 32)), fp8((32, 32))),
    "fp8-tensor": (llama, fp8_config((1, 1), weight_block_size=None, activation_scheme="static"), fp8_alone(())),
    "fp8-tensor-compressed": (moe, compressed_fp8("tensor"), fp8_alone((1,))),
    "fp8-rows": (llama, compressed_fp8("channel"), fp8_alone((), rows=True)),
    "fp8-block-compressed": (
        llama,
        compressed_fp8("block", block_structure=[32, 48]),
        fp8((32, 48), names=("weight", "weight_scale")),
    ),
    "fp8-fused": (moe_fused, fp8_config((32, 48), modules_to_not_convert=["self_attn"]), fused_fp8),
    "fp4-experts": (moe, fp8_config((32, 32), scale_fmt="ue8m0", expert_dtype="fp4"), fp8_fp4),
    "int4": (moe, int4_config(32, IGNORED), int4(32, BF16)),
    "int4-groups-of-12": (moe, int4_config(12, IGNORED), int4(12, torch.float16)),
}


RELEASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], Any]] = {
    "deepseek_v3": (make_deepseek_v3, fp8_config((16, 16)), fp8((16, 16))),
    "deepseek_v32": (make_deepseek_v32, fp8_config((32, 32), scale_fmt="ue8m0"), fp8((32, 32))),
    "deepseek_v4": (make_deepseek_v4, fp8_config((32, 32), scale_fmt="ue8m0", expert_dtype="fp4"), fp8_fp4),
    "kimi_k2": (
        partial(make_deepseek_v3, model_type="kimi_k2"),
        int4_config(32, [*IGNORED, "re:.*shared_experts.*"]),
        int4(32, BF16),
    ),
}
"""Whole families as they are released; the other cases are about tensors."""


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(quantised, what it stands for in floats)."""
    return make_pair(tmp_path_factory.mktemp(request.param), *CASES[request.param])


def make_pair(root: Path, make: Callable[[Path], Path], config: dict[str, Any], choose: Any) -> tuple[Path, Path]:
    quantise(make(root / "quantised"), root / "plain", config, choose)
    return root / "quantised", root / "plain"


def tensors_of(folder: Path, dtype: str = "float32", **kwargs: Any) -> dict[str, Tensor]:
    model = load_model(ModelSpec.from_folder(folder), dtype=dtype, device=CPU, **kwargs)
    slots = [s for s in choose_forms(model.slots(), {})[0] if not s.twin]
    return {s.name: s.target for s in slots}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_equal_the_reference_bit_for_bit(pair: tuple[Path, Path], dtype: str) -> None:
    quantised, plain = pair
    assert ModelSpec.from_folder(quantised).quant is not None
    got, want = tensors_of(quantised, dtype), tensors_of(plain, dtype)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert len(load_shards(quantised)) > len(load_file(plain / "model.safetensors"))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_their_parts(pair: tuple[Path, Path], size: int) -> None:
    """Parts begin in the middle of blocks, groups and words."""
    quantised, plain = pair
    for rank in range(size):
        tp = Sum(size).of(rank)
        want = tensors_of(plain, tp=tp)
        for name, got in tensors_of(quantised, tp=tp).items():
            assert torch.equal(got, want[name]), name


def test_logits_equal_those_of_the_float_checkpoint(pair: tuple[Path, Path]) -> None:
    quantised, plain = pair
    (got,) = PagedModel(quantised).step([(0, TOKENS)])
    (want,) = PagedModel(plain).step([(0, TOKENS)])
    assert torch.equal(got, want)
    assert got.isfinite().all()


@pytest.mark.parametrize("name", list(RELEASES))
def test_families_as_they_are_released(tmp_path: Path, name: str) -> None:
    quantised, plain = make_pair(tmp_path, *RELEASES[name])
    assert sum(t.element_size() < 4 or t.dtype == torch.int32 for t in load_shards(quantised).values()) > 20
    want = tensors_of(plain)
    for tensor, got in tensors_of(quantised).items():
        assert torch.equal(got, want[tensor]), tensor
    (got,) = PagedModel(quantised).step([(0, TOKENS)])
    (expected,) = PagedModel(plain).step([(0, TOKENS)])
    assert torch.equal(got, expected)


def test_ranks_together_equal_one(pair: tuple[Path, Path]) -> None:
    quantised, plain = pair
    (want,) = PagedModel(plain).step([(0, TOKENS)])
    total = Sum(2)
    got: dict[int, Tensor] = {}

    def rank(r: int) -> None:
        (got[r],) = PagedModel(quantised, tp=total.of(r)).step([(0, TOKENS)])

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all((got[r] - want).abs().max() < 1e-4 for r in range(2))


def test_progress_counts_all_parts(pair: tuple[Path, Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    tensors_of(pair[0], progress=lambda *args: seen.append(args))
    assert seen[-1][1] == seen[-1][2] == sum(t.nbytes for t in load_shards(pair[0]).values())
    assert len({name for name, _, _ in seen}) == len(seen)


Q = "model.layers.0.self_attn.q_proj"
X = "model.layers.1.mlp.experts.2.up_proj"


def broken(folder: Path, case: str, change: dict[str, Tensor | None]) -> str:
    """The error of a quantised checkpoint with some tensors exchanged, or, for None, gone."""
    make, config, choose = CASES[case]
    quantise(make(folder), folder / "plain", config, choose)
    tensors = load_shards(folder) | change
    save_shards(folder, {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(ConfigError) as raised:
        load_model(ModelSpec.from_folder(folder), dtype="float32", device=CPU)
    return str(raised.value.message).removeprefix("checkpoint does not match its config.json: ")


FP8_ERRORS: list[tuple[dict[str, Tensor | None], str]] = [
    ({f"{Q}.weight_scale_inv": None}, f"missing: {Q}.weight_scale_inv [2, 2]"),
    (
        {f"{Q}.weight_scale_inv": torch.ones(2, 1)},
        f"misshapen: {Q}.weight_scale_inv is [2, 1], blocks of 32 x 48 want [2, 2]",
    ),
    ({f"{Q}.weight_scale_inv": torch.ones(2, 2).int()}, f"of the wrong type: {Q}.weight_scale_inv is I32"),
    ({f"{Q}.weight": torch.ones(64, 80)}, f"unknown: {Q}.weight_scale_inv [2, 2]"),
    ({f"{Q}.scale": torch.ones(2, 2)}, f"unknown: {Q}.scale [2, 2]"),
    (
        {f"{Q}.weight": torch.ones(64, 40).to(torch.float8_e4m3fn), f"{Q}.weight_scale_inv": torch.ones(2, 1)},
        f"misshapen: {Q}.weight is [64, 40], the config wants [64, 80]",
    ),
    (
        {"model.norm.weight": torch.ones(80).to(torch.float8_e4m3fn)},
        "of the wrong type: model.norm.weight is F8_E4M3",
    ),
    ({f"{Q}.weight": torch.ones(64, 80).to(torch.float8_e5m2)}, f"of the wrong type: {Q}.weight is F8_E5M2"),
]


@pytest.mark.parametrize(("change", "words"), FP8_ERRORS, ids=range(len(FP8_ERRORS)))
def test_fp8_checkpoints_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    assert words in broken(tmp_path / "x", "fp8", change)


INT4_ERRORS: list[tuple[dict[str, Tensor | None], str]] = [
    ({f"{X}.weight_scale": None}, f"missing: {X}.weight_scale"),
    ({f"{X}.weight_shape": None, f"{X}.weight_scale": None}, f"missing: {X}.weight_scale and {X}.weight_shape"),
    ({f"{X}.weight_packed": None}, f"missing: {X}.weight [40, 80]"),
    (
        {f"{X}.weight_scale": torch.ones(40, 2).bfloat16()},
        f"misshapen: {X}.weight_scale is [40, 2], blocks of 1 x 32 want [40, 3]",
    ),
    ({f"{X}.weight_shape": torch.tensor([40, 96])}, f"misshapen: {X}.weight_packed is [40, 10]"),
    ({f"{X}.weight_shape": torch.ones(2)}, f"of the wrong type: {X}.weight_shape"),
    ({f"{X}.weight_packed": torch.ones(40, 10)}, f"of the wrong type: {X}.weight_packed is F32"),
    ({f"{X}.weight": torch.ones(40, 80)}, f"twice: {X}.weight and {X}.weight_packed"),
    ({f"{X}.weight_g_idx": torch.ones(80)}, f"unknown: {X}.weight_g_idx"),
    (
        {
            f"{Q}.weight": None,
            f"{Q}.weight_packed": torch.ones(64, 10).int(),
            f"{Q}.weight_scale": torch.ones(64, 3),
            f"{Q}.weight_shape": torch.tensor([64, 80]),
        },
        f"quantised: {Q}.weight_packed, which quantization_config.ignore excludes",
    ),
]


@pytest.mark.parametrize(("change", "words"), INT4_ERRORS, ids=range(len(INT4_ERRORS)))
def test_int4_checkpoints_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    error = broken(tmp_path / "x", "int4", change)
    assert words in error
    assert ";" not in error or words.startswith("missing: model.layers.1.mlp.experts.2.up_proj.weight [")


def test_quantised_tensors_without_a_word_in_the_config(tmp_path: Path) -> None:
    quantise(llama(tmp_path / "x"), tmp_path / "plain", *CASES["fp8"][1:])
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=re.escape(f"of the wrong type: {Q}.weight is F8_E4M3")):
        load_model(ModelSpec.from_folder(tmp_path / "x"), dtype="float32", device=CPU)


def int4_with(**weights: Any) -> dict[str, Any]:
    config = int4_config(32, [])
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


def turned(*locations: str) -> dict[str, Any]:
    """What SpinQuant writes beside the scheme."""
    places = [{"targets": ["re:.*down_proj$"], "location": location} for location in locations]
    return {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": places}}}}


@pytest.mark.parametrize("transforms", [{"transform_config": {}}, turned("weight_input", "weight_output")])
def test_rotations_within_the_weights_need_nothing(tmp_path: Path, transforms: dict[str, Any]) -> None:
    folder = make_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": int4_config(32, []) | transforms}))
    assert ModelSpec.from_folder(folder).quant == QuantSpec("int4", (1, 32))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method 'awq' is not supported"),
        ({"bits": 4}, "quantization_config.quant_method '' is not supported"),
        (fp8_config((128, 128), fmt="e5m2"), "quantization_config.fmt 'e5m2'"),
        (fp8_config((128, 128), activation_scheme="none"), "activation_scheme 'none'"),
        (fp8_config((128, 128), weight_block_size=128), "weight_block_size must be two positive integers"),
        (fp8_config((0, 128)), "weight_block_size must be two positive integers, got [0, 128]"),
        (fp8_config((128, 128), scale_fmt="other"), "scale_fmt 'other'"),
        (fp8_config((128, 128), expert_dtype="int4"), "expert_dtype 'int4'"),
        (int4_config(32, []) | {"format": "dense"}, "quantization_config.format 'dense'"),
        (int4_config(32, []) | {"format": "float-quantized"}, "weights.num_bits 4 is not supported; supported is: 8"),
        (compressed_fp8("group"), "weights.strategy 'group'"),
        (compressed_fp8("block", block_structure=[128]), "block_structure must be two positive integers"),
        (int4_config(32, []) | {"config_groups": {}}, "config_groups must be one group, got 0"),
        (int4_config(32, []) | {"ignore": "lm_head"}, "ignore must be a list of names"),
        (int4_with(num_bits=8), "config_groups.group_0.weights.num_bits 8 is not supported; supported is: 4"),
        (int4_with(symmetric=False), "weights.symmetric False"),
        (int4_with(strategy="channel"), "weights.strategy 'channel'"),
        (int4_with(type="float"), "weights.type 'float'"),
        (int4_with(actorder="group"), "weights.actorder 'group'"),
        (int4_with(group_size=None), "weights.group_size is missing"),
        (int4_config(32, []) | turned("weight_input", "input"), "quantization_config.transform_config at 'input'"),
        (compressed_fp8("channel") | turned("k_cache"), "quantization_config.transform_config at 'k_cache'"),
    ],
)
def test_schemes_that_are_not_known(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    folder = make_llama(tmp_path)
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as raised:
        ModelSpec.from_folder(folder)
    assert words in raised.value.message


def test_modules_that_are_ignored() -> None:
    spec = QuantSpec("int4", (1, 32), ignored=("lm_head", "re:.*self_attn.*", "re:.*mlp\\.(gate|up)_proj.*"))
    assert spec.is_ignored("lm_head")
    assert spec.is_ignored("language_model.model.layers.3.self_attn.o_proj")
    assert spec.is_ignored("model.layers.0.mlp.up_proj")
    assert not spec.is_ignored("model.layers.0.mlp.experts.3.up_proj")
    assert not spec.is_ignored("model.lm_head")


_PEAK = """
import resource, sys, torch
from common.models.spec import ModelSpec
from common.models.weights import load_model
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
spec = ModelSpec.from_folder(sys.argv[1])
import common.models.llama, safetensors
before = peak()
model = load_model(spec, dtype="bfloat16", device=torch.device("cpu"))
print(peak() - before, sum(s.target.nbytes for s in model.slots()))
"""


def test_peak_memory_is_one_model(tmp_path: Path) -> None:
    """One model and what the files' pages take, which is half of it; never the floats of a whole tensor besides."""
    folder = make_llama(
        tmp_path / "x", hidden_size=1024, intermediate_size=16384, num_hidden_layers=2, head_dim=256, vocab_size=512
    )

    def choose(name: str, w: Tensor) -> Quantised | None:
        if not is_linear(name):
            return None
        grid = torch.full((w.shape[0] // 128, w.shape[1] // 128), 0.5)
        return {"weight": w.to(torch.float8_e4m3fn), "weight_scale_inv": grid}, w

    quantise(folder, tmp_path / "plain", fp8_config((128, 128)), choose)
    out = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    grown, nbytes = map(int, out.stdout.splitlines()[-1].split())
    assert nbytes > 200 * 2**20
    assert grown < 1.7 * nbytes, f"{grown} bytes more for a model of {nbytes}"
