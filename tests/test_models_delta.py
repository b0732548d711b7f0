"""Checkpoints of models with delta-net layers: what is read of them, by whom, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CPU, PagedModel, Sum
from safetensors.torch import load_file, save_file
from tiny_models import make_qwen3_5, make_qwen3_next
from torch import Tensor

from common.errors import ConfigError
from common.kvcache.layout import Retention, Sharding
from common.layers.delta_spec import DeltaSpec
from common.models.kv import kv_layout
from common.models.spec import ModelSpec
from common.models.weights import load_model

WEIGHTS = "model.safetensors"
TOKENS = list(range(5, 85))
MAKERS: dict[str, Callable[..., Path]] = {
    "qwen3_next": make_qwen3_next,
    "qwen3_5": make_qwen3_5,
    "qwen3_5_moe": partial(make_qwen3_5, moe=True),
}


def rewritten(folder: Path, **fields: Any) -> Path:
    """The folder with fields of its config.json changed, None for gone."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_spec_of_a_saved_checkpoint(tmp_path: Path, name: str) -> None:
    spec = ModelSpec.from_folder(MAKERS[name](tmp_path))
    assert spec.delta == DeltaSpec((True, True, False, True), 2, 4, 16, 8, 4)
    assert spec.zero_centred_norm
    assert spec.rope.rotary_dim == (4 if name == "qwen3_next" else 8)
    assert spec.cache.has_states
    assert (spec.moe is None) == (name == "qwen3_5")
    if spec.moe is not None:
        assert (spec.moe.num_experts, spec.moe.top_k, spec.moe.shared_intermediate_size) == (8, 3, 24)
        assert spec.moe.norm_topk_prob
        assert spec.moe.shared_gate


def test_layers_follow_an_interval_where_the_config_lists_none(tmp_path: Path) -> None:
    folder = rewritten(make_qwen3_next(tmp_path), layer_types=None, num_hidden_layers=6)
    assert ModelSpec.from_folder(folder).delta == DeltaSpec((True, True, True, False, True, True), 2, 4, 16, 8, 4)
    rewritten(folder, full_attention_interval=2)
    spec = ModelSpec.from_folder(folder)
    assert spec.delta is not None
    assert spec.delta.is_delta_layer == (True, False) * 3


def test_layout_of_states(tmp_path: Path) -> None:
    """Both in the snapshot group, split by heads; the convolution's in the type of the model, the rule's in fp32."""
    spec = ModelSpec.from_folder(make_qwen3_5(tmp_path))
    blocks = {"full": 4, "state": 3, "tail": 2}
    sizes = {"kv_dtype": "bfloat16", "dtype": "bfloat16", "block_size": 16, "num_blocks": blocks}
    layout = kv_layout(spec, **sizes)  # type: ignore[arg-type]
    assert [(g.name, g.retention, g.num_blocks) for g in layout.groups] == [
        ("full", Retention.FULL, 4),
        ("state", Retention.SNAPSHOT, 3),
        ("tail", Retention.SNAPSHOT, 2),
    ]
    shapes = {r.name: (r.dtype, r.num_layers, r.num_parts, r.num_units, r.width) for r in layout.regions}
    assert shapes["kv"] == ("bfloat16", 1, 2, 2, 16)
    assert shapes["gdn_conv"] == ("bfloat16", 3, 3, 2, 2 * 16 + 2 * 8)
    assert shapes["gdn_recurrent"] == ("float32", 3, 1, 4, 16 * 8)
    second = kv_layout(spec, **sizes, tp_size=2, tp_rank=1)  # type: ignore[arg-type]
    assert all(r.sharding is Sharding.SPLIT for r in second.regions_of("state"))
    assert (second.place("gdn_conv").first_unit, second.place("gdn_conv").local_units) == (1, 1)
    assert (second.place("gdn_recurrent").first_unit, second.place("gdn_recurrent").local_units) == (2, 2)
    assert layout.fingerprint() != kv_layout(spec, **sizes | {"dtype": "float32"}).fingerprint()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MAKERS)
def test_ranks_together_equal_one(tmp_path: Path, name: str) -> None:
    """Logits, and the states that each rank keeps: its heads of the whole."""
    folder = MAKERS[name](tmp_path)
    alone, total = PagedModel(folder), Sum(2)
    parts = [alone.step([(0, TOKENS[:70])])[0], *(alone.step([(0, [t])])[0] for t in TOKENS[70:])]
    ranks: dict[int, PagedModel] = {}
    got: dict[int, list[Tensor]] = {}

    def rank(r: int) -> None:
        ranks[r] = PagedModel(folder, tp=total.of(r))
        got[r] = [ranks[r].step([(0, TOKENS[:70])])[0], *(ranks[r].step([(0, [t])])[0] for t in TOKENS[70:])]

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for r in range(2):
        assert (torch.cat(got[r]) - torch.cat(parts)).abs().max() < 1e-4
        for region in ("gdn_conv", "gdn_recurrent"):
            place = ranks[r].layout.place(region)
            units = slice(place.first_unit, place.first_unit + place.local_units)
            whole = alone.pool.region(region)[alone._states["state"][0]][:, :, units]
            mine = ranks[r].pool.region(region)[ranks[r]._states["state"][0]]
            assert (mine - whole).abs().max() < 1e-4


def test_ranks_that_do_not_divide_the_key_heads(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(make_qwen3_5(tmp_path))
    with pytest.raises(ConfigError, match="2 key heads do not divide over 4 ranks"):
        load_model(spec, dtype="float32", device=CPU, tp=Sum(4).of(0))


@pytest.mark.parametrize("moe", [False, True])
def test_a_text_tower_is_found_in_a_multimodal_checkpoint(tmp_path: Path, moe: bool) -> None:
    """The vision tower and what predicts further tokens are passed over; anything else is an error."""
    folder = make_qwen3_5(tmp_path, moe=moe, vision=True)
    tensors = load_file(folder / WEIGHTS)
    assert any(name.startswith("model.visual.") for name in tensors)
    (want,) = PagedModel(folder).step([(0, TOKENS)])
    extra = {"mtp.fc.weight": torch.zeros(64, 128), "mtp.layers.0.mlp.gate.weight": torch.zeros(8, 64)}
    save_file(tensors | extra, folder / WEIGHTS)
    (got,) = PagedModel(folder).step([(0, TOKENS)])
    assert torch.equal(got, want)
    save_file(tensors | {"model.layers.0.input_layernorm.weight": torch.zeros(64)}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"unknown: model\.layers\.0\.input_layernorm"):
        PagedModel(folder)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = make_qwen3_5(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    mixer = "model.layers.1.linear_attn"
    del tensors[f"{mixer}.in_proj_a.weight"], tensors[f"{mixer}.A_log"]
    tensors[f"{mixer}.conv1d.weight"] = torch.zeros(96, 1, 3)
    tensors[f"{mixer}.in_proj_qkv.weight"] = torch.zeros(90, 64)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError) as raised:
        PagedModel(folder)
    for words in (
        f"missing: {mixer}.in_proj_a.weight [4, 64]",
        f"missing: {mixer}.A_log [4]",
        f"misshapen: {mixer}.conv1d.weight is [96, 1, 3], the config wants [96, 1, 4]",
        f"misshapen: {mixer}.in_proj_qkv.weight is [90, 64], the config wants [96, 64]",
    ):
        assert words in raised.value.message
    assert raised.value.message.count(";") == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "layer_types must have layers of both kinds"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "layer_types .*sliding_attention"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads .* 2 key heads do not divide 5"),
        ({"linear_conv_kernel_dim": 1}, "keeps no state"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "partial_rotary_factor .* not pairs"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2}}, "partial_rotary_factor must be"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelSpec.from_folder(rewritten(make_qwen3_5(tmp_path), **fields))


@pytest.mark.parametrize("name", MAKERS)
def test_dummy_weights(tmp_path: Path, name: str) -> None:
    folder = MAKERS[name](tmp_path)
    (folder / WEIGHTS).unlink()
    spec = ModelSpec.from_folder(folder, weights=False)
    model = load_model(spec, dtype="bfloat16", device=CPU, load_format="dummy")
    assert all(s.target.isfinite().all() for s in model.slots())
