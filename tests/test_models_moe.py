"""Mixture-of-experts checkpoints: what their config says, and strict loading of each way of naming experts."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CPU, PagedModel, Sum
from safetensors.torch import load_file, save_file
from tiny_models import make_deepseek_v4, make_qwen3_moe
from torch import Tensor

from common.errors import ConfigError
from common.layers.moe_spec import MoESpec
from common.models.config_reader import ConfigReader
from common.models.decoder import DecoderModel
from common.models.spec import ModelSpec
from common.models.specs.moe import read_deepseek_experts, read_qwen_experts
from common.models.weights import choose_forms, load_model

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
QWEN: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
}


def reader(fields: dict[str, Any]) -> ConfigReader:
    return ConfigReader(Path("config.json"), {k: v for k, v in fields.items() if v is not None})


def test_qwen_fields() -> None:
    assert read_qwen_experts(reader(QWEN), 2) == MoESpec(8, 3, 40, (True, True))
    older = QWEN | {"num_experts": 16, "num_local_experts": None, "norm_topk_prob": None}
    assert read_qwen_experts(reader(older), 1) == MoESpec(16, 3, 40, (True,), norm_topk_prob=False)
    assert read_qwen_experts(reader(older), 1, norm_topk_prob=True).norm_topk_prob
    mixed = read_qwen_experts(reader(QWEN | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}), 6)
    assert mixed.is_moe_layer == (False, True, False, False, False, True)
    shared = read_qwen_experts(reader(QWEN | {"shared_expert_intermediate_size": 32}), 1)
    assert (shared.shared_intermediate_size, shared.shared_gate) == (32, True)


def test_deepseek_fields() -> None:
    assert read_deepseek_experts(reader(DEEPSEEK), 3) == MoESpec(
        16,
        4,
        24,
        (False, True, True),
        "sigmoid",
        routed_scaling_factor=2.5,
        num_groups=4,
        topk_groups=2,
        correction_bias=True,
        router_fp32=True,
        shared_intermediate_size=48,
    )
    assert read_deepseek_experts(reader(DEEPSEEK | {"routed_scaling_factor": None}), 3).routed_scaling_factor == 2.5
    listed = DEEPSEEK | {"mlp_layer_types": ["sparse", "dense"], "first_k_dense_replace": 7}
    assert read_deepseek_experts(reader(listed), 2).is_moe_layer == (True, False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (QWEN | {"num_local_experts": None}, "num_local_experts is missing"),
        (QWEN | {"num_experts_per_tok": 9}, "9 experts of a token are not among 8"),
        (QWEN | {"mlp_only_layers": "all"}, "mlp_only_layers must be a list"),
        (QWEN | {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        (DEEPSEEK | {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq other than 1"),
        (DEEPSEEK | {"n_group": 3}, "16 experts cannot be in 2 of 3 groups"),
        (DEEPSEEK | {"mlp_layer_types": ["dense"]}, "must say dense or sparse of 2 layers"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], words: str) -> None:
    read = read_deepseek_experts if "n_routed_experts" in fields else read_qwen_experts
    with pytest.raises(ConfigError, match=re.escape(words)):
        read(reader(fields), 2)


def load(folder: Path) -> DecoderModel:
    return load_model(ModelSpec.from_folder(folder), dtype="float32", device=CPU)


def packed(model: DecoderModel) -> list[Tensor]:
    layers: list[Any] = model.model.layers
    return [t for layer in layers for t in (layer.mlp.experts.weights.gate_up_ELD, layer.mlp.experts.weights.down_EDI)]


def fuse(tensors: dict[str, Tensor], layer: int, *, transpose: bool = False) -> dict[str, Tensor]:
    """The same checkpoint with one layer's experts fused."""
    prefix = f"model.layers.{layer}.mlp.experts."
    out = {n: t for n, t in tensors.items() if not n.startswith(prefix)}

    def stack(name: str) -> Tensor:
        return torch.stack([tensors[f"{prefix}{e}.{name}.weight"] for e in range(8)])

    fused = {"gate_up_proj": torch.cat((stack("gate_proj"), stack("up_proj")), 1), "down_proj": stack("down_proj")}
    return out | {prefix + n: (t.mT if transpose else t).contiguous() for n, t in fused.items()}


def test_every_tensor_lands_in_its_place(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path)
    saved = load_file(folder / WEIGHTS)
    model = load(folder)
    slots, mixed = choose_forms(model.slots(), dict(saved))
    assert not mixed
    assert {s.name for s in slots} == saved.keys()
    for slot in slots:
        assert torch.equal(slot.target, saved[slot.name]), slot.name


@pytest.mark.parametrize("transpose", [False, True])
def test_fused_checkpoints(tmp_path: Path, transpose: bool) -> None:
    """Layers may differ in form: a multi-token-prediction layer, say, comes from elsewhere."""
    folder = make_qwen3_moe(tmp_path)
    want = packed(load(folder))
    tensors = load_file(folder / WEIGHTS)
    for layer in (0, 2):
        tensors = fuse(tensors, layer, transpose=transpose)
    save_file(tensors, folder / WEIGHTS)
    seen: list[tuple[str, int, int]] = []
    model = load_model(ModelSpec.from_folder(folder), dtype="float32", device=CPU, progress=lambda *a: seen.append(a))
    for got, value in zip(packed(model), want, strict=True):
        assert torch.equal(got, value)
    assert sorted(name for name, _, _ in seen) == sorted(tensors)
    assert seen[-1][1] == seen[-1][2] == sum(t.nbytes for t in tensors.values())


def test_a_mixture_of_forms_is_refused(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    fused = fuse(tensors, 1)
    save_file(tensors | {f"{EXPERTS}.down_proj": fused[f"{EXPERTS}.down_proj"]}, folder / WEIGHTS)
    with pytest.raises(ConfigError) as raised:
        load(folder)
    assert f"mixed: {EXPERTS}.* is both one tensor per expert and fused" in raised.value.message
    assert f"unknown: {EXPERTS}.down_proj" in raised.value.message


def test_one_error_lists_all(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path, mlp_only_layers=[0])
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{EXPERTS}.3.up_proj.weight"], tensors["model.layers.2.mlp.gate.weight"]
    tensors[f"{EXPERTS}.0.down_proj.weight"] = torch.zeros(40, 64)
    tensors[f"{EXPERTS}.8.down_proj.weight"] = torch.zeros(64, 40)
    tensors["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.zeros(64, 40)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError) as raised:
        load(folder)
    for words in (
        f"missing: {EXPERTS}.3.up_proj.weight [40, 64]",
        "missing: model.layers.2.mlp.gate.weight [8, 64]",
        f"misshapen: {EXPERTS}.0.down_proj.weight is [40, 64], the config wants [64, 40]",
        f"unknown: {EXPERTS}.8.down_proj.weight",
        "unknown: model.layers.0.mlp.experts.0.down_proj.weight",
    ):
        assert words in raised.value.message
    assert raised.value.message.count(";") == 4


def test_a_fused_tensor_of_another_shape(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path)
    tensors = fuse(load_file(folder / WEIGHTS), 1)
    tensors[f"{EXPERTS}.gate_up_proj"] = tensors[f"{EXPERTS}.gate_up_proj"][:7].contiguous()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"gate_up_proj is \[7, 80, 64\], the config wants \[8, 80, 64\]"):
        load(folder)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_equal_one(tmp_path: Path, size: int) -> None:
    folder = make_qwen3_moe(tmp_path, mlp_only_layers=[1])
    tokens = list(range(5, 45))
    (expected,) = PagedModel(folder).step([(0, tokens)])
    total = Sum(size)
    got: dict[int, Tensor] = {}

    def rank(r: int) -> None:
        (got[r],) = PagedModel(folder, tp=total.of(r)).step([(0, tokens)])

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(got) == list(range(size))
    for logits in got.values():
        assert (logits - expected).abs().max() < 1e-4


def test_dummy_weights_are_seeded(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path)
    (folder / WEIGHTS).unlink()
    spec = ModelSpec.from_folder(folder, weights=False)
    first, again, other = (
        packed(load_model(spec, dtype="float32", device=CPU, load_format="dummy", seed=seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(not torch.equal(t[0], t[1]) for t in first)


def test_spec_of_a_saved_checkpoint(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(make_qwen3_moe(tmp_path, decoder_sparse_step=3))
    assert spec.moe == MoESpec(8, 3, 40, (False, False, True))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 12}))
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        ModelSpec.from_folder(tmp_path)


def test_tables_of_experts(tmp_path: Path) -> None:
    """Whole numbers of either width; one that names no expert would read out of bounds."""
    folder = make_deepseek_v4(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (name,) = [n for n in tensors if n.endswith("tid2eid")]
    save_file(tensors | {name: tensors[name].int()}, folder / WEIGHTS)
    layers: list[Any] = load(folder).model.layers
    assert torch.equal(layers[0].ffn.gate.table_VK, tensors[name])
    for value in (8, -1):
        wrong = tensors[name].clone()
        wrong[77, 1] = value
        save_file(tensors | {name: wrong}, folder / WEIGHTS)
        with pytest.raises(ConfigError, match=r"tid2eid holds numbers that are not in 0\.\.7"):
            load(folder)
    save_file(tensors | {name: tensors[name].float()}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"of the wrong type: .*tid2eid is F32"):
        load(folder)
    (folder / WEIGHTS).unlink()
    spec = ModelSpec.from_folder(folder, weights=False)
    drawn: list[Any] = load_model(spec, dtype="float32", device=CPU, load_format="dummy").model.layers
    table = drawn[0].ffn.gate.table_VK
    assert table.unique().tolist() == list(range(8))
