"""Which weights stay in FP8: not what a config excludes, nor what ranks cut off its blocks; and the log says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from quant_support import Quantised, fp8_block, fp8_config, load_shards, quantise, save_shards
from test_models_fp8 import LLAMA, MOE, NAMES, floats, in_fp8, load
from test_models_quant import compressed_fp8
from tiny_models import make_deepseek_v3, make_llama, make_qwen3_moe
from torch import Tensor

from common.errors import ConfigError
from common.layers.base import Slot, TensorParallel
from common.layers.quant_spec import QuantSpec
from common.models import weights
from common.models.spec import ModelSpec

LAYER = "model.layers.0"
LIST = [f"{LAYER}.self_attn", "model.layers.1.mlp.down_proj", "lm_head"]
SIZES: dict[str, Any] = dict(LLAMA)
LISTED = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(weights, "keeps_fp8", lambda *_: True)


def all_but(*excluded: str, names: tuple[str, str] = NAMES) -> Any:
    def choose(name: str, w: Tensor) -> Quantised | None:
        if not name.endswith(("_proj.weight", "_with_mqa.weight")) or any(part in name for part in excluded):
            return None
        return fp8_block(w, (128, 128), torch.float32, names)

    return choose


def checkpoint(root: Path, excluded: list[str], field: str = "modules_to_not_convert", make: Any = make_llama) -> Path:
    folder = root / "model"
    make(folder, **(MOE if make is make_qwen3_moe else LLAMA))
    quantise(folder, root / "plain", fp8_config((128, 128), **{field: excluded}), all_but(*excluded))
    return folder


def plain_of(folder: Path) -> dict[str, Slot]:
    return load(folder.parent / "plain", quantization="none")


def equals_plain(got: dict[str, Slot], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "keeps_fp8", lambda *_: False)
        want = plain_of(folder)
    assert got.keys() == want.keys()
    for name, slot in got.items():
        assert torch.equal(floats(slot), want[name].target), name


def said(logs: list[Any]) -> dict[str, Any]:
    """What was said of layers that are not in FP8, by reason."""
    found = [line for line in logs if line["event"] == "layers not in FP8"]
    assert len({line["reason"] for line in found}) == len(found)
    return {line["reason"]: line for line in found}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_what_is_not_converted_stays_as_it_is(tmp_path: Path, field: str) -> None:
    folder = checkpoint(tmp_path, LIST, field)
    with structlog.testing.capture_logs() as logs:
        got = load(folder)
    assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight") and not any(part in n for part in LIST)}
    equals_plain(got, folder)
    line = said(logs)["not converted, by the checkpoint"]
    names = {f"{LAYER}.self_attn.{name}.weight".replace(".0.", ".*.") for name in LISTED}
    assert set(line["weights"]) == names | {"model.layers.*.mlp.down_proj.weight"}
    assert (line["layers"], line["held_in"]) == (3, "float32")
    assert line["bytes"] == 4 * (4 * 256 * 256 + 256 * 512)


@pytest.mark.usefixtures("kept")
def test_a_packed_weight_is_in_fp8_as_a_whole_or_not(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, [f"{LAYER}.self_attn.k_proj"])
    with structlog.testing.capture_logs() as logs:
        got = load(folder)
    floating = {n for n in got if n.endswith("_proj.weight")} - in_fp8(got)
    assert floating == {f"{LAYER}.self_attn.{name}.weight" for name in LISTED[:3]}
    equals_plain(got, folder)
    line = said(logs)["packed with a weight that is not in FP8"]
    assert (line["layers"], line["bytes"], line["log_level"]) == (1, 4 * 3 * 256 * 256, "warning")


@pytest.mark.usefixtures("kept")
def test_experts_that_are_not_converted(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, ["model.layers.1.mlp.experts"], make=make_qwen3_moe)
    got = load(folder)
    assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight") and "layers.1.mlp.experts" not in n}
    assert any("layers.2.mlp.experts" in name for name in in_fp8(got))
    equals_plain(got, folder)


@pytest.mark.usefixtures("kept")
def test_quantising_at_load_leaves_what_the_config_excludes(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, LIST)
    got = load(folder, quantization="fp8")
    assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight") and not any(part in n for part in LIST)}
    equals_plain(got, folder)
    drawn = load(folder, quantization="fp8", load_format="dummy")
    assert in_fp8(drawn) == in_fp8(got)
    assert all(slot.target.float().isfinite().all() for slot in drawn.values())


@pytest.mark.usefixtures("kept")
def test_quantising_at_load_without_a_list_takes_all(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", **SIZES)
    got = load(tmp_path / "model", quantization="fp8")
    assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight")}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("rank", range(4))
def test_shares_off_the_blocks_are_floats_and_the_log_says_so(tmp_path: Path, rank: int) -> None:
    """o_proj's share of four ranks is 64 columns, q_proj's 64 rows; gate, up and down have 128."""
    folder = checkpoint(tmp_path, ["lm_head"])
    tp = TensorParallel(rank, 4, lambda partial: partial)
    with structlog.testing.capture_logs() as logs:
        got = load(folder, tp)
    assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight") and ".mlp." in n}
    whole = plain_of_rank(folder, tp)
    assert all(torch.equal(floats(slot), whole[name].target) for name, slot in got.items())
    lines = said(logs)
    if rank:
        assert not lines
        return
    line = lines["shares of 4 ranks that do not begin on blocks of 128"]
    layers = len({name.split(".")[2] for name in got if "layers" in name})
    assert line["layers"] == 2 * layers
    assert line["bytes"] == layers * 4 * 4 * 64 * 256
    assert line["degrees_that_fit"] == [1, 2]
    assert set(line["weights"]) == {f"model.layers.*.self_attn.{name}.weight ({layers})" for name in LISTED}


def plain_of_rank(folder: Path, tp: TensorParallel) -> dict[str, Slot]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "keeps_fp8", lambda *_: False)
        return load(folder.parent / "plain", tp)


@pytest.mark.usefixtures("kept")
def test_a_last_part_that_every_rank_has_may_end_anywhere(tmp_path: Path) -> None:
    """Latent attention's q_proj is split, and packed before kv_a_proj_with_mqa, 160 rows of which all ranks have."""
    sizes: dict[str, Any] = {"hidden_size": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32}
    folder = tmp_path / "model"
    make_deepseek_v3(folder, **sizes, q_lora_rank=None, num_attention_heads=4)
    quantise(folder, tmp_path / "plain", fp8_config((128, 128)), all_but())
    for rank in range(2):
        tp = TensorParallel(rank, 2, lambda partial: partial)
        with structlog.testing.capture_logs() as logs:
            got = load(folder, tp)
        want = plain_of_rank(folder, tp)
        a_proj = {f"{LAYER}.self_attn.{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa")}
        assert a_proj <= in_fp8(got)
        assert all(torch.equal(floats(got[name]), want[name].target) for name in a_proj)
        if rank == 0:  # which the layer reads itself
            line = said(logs)["stored in FP8, and used by their layers in another type"]
            assert [name.split(" ")[0] for name in line["weights"]] == ["model.layers.*.self_attn.kv_b_proj.weight"]
            assert line["bytes"] == line["layers"] * 4 * got[f"{LAYER}.self_attn.kv_b_proj.weight"].target.numel()


@pytest.mark.usefixtures("kept")
def test_sizes_off_the_blocks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_llama(folder, **SIZES | {"intermediate_size": 320})
    quantise(folder, tmp_path / "plain", fp8_config((128, 128)), all_but())
    with structlog.testing.capture_logs() as logs:
        got = load(folder)
    assert in_fp8(got) == {n for n in got if n.endswith("_proj.weight") and ".self_attn." in n}
    equals_plain(got, folder)
    line = said(logs)["sizes that are no multiples of 128"]
    assert "degrees_that_fit" not in line
    assert any("down_proj" in name for name in line["weights"])


Q, DOWN = f"{LAYER}.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_scales_that_contradict_the_config(tmp_path: Path, quantization: str) -> None:
    folder = checkpoint(tmp_path, [DOWN])
    tensors = load_shards(folder)
    plain = torch.ones_like(tensors[f"{Q}.weight"].float())
    del tensors[f"{Q}.weight_scale_inv"]
    scaled, _ = fp8_block(tensors[f"{DOWN}.weight"].float(), (128, 128), torch.float32, NAMES)
    save_shards(folder, tensors | {f"{Q}.weight": plain} | {f"{DOWN}.{name}": t for name, t in scaled.items()})
    with pytest.raises(ConfigError) as raised:
        load(folder, quantization=quantization)
    assert f"quantised: {DOWN}.weight, which quantization_config.modules_to_not_convert excludes" in str(raised.value)
    words = f"not quantised: {Q}.weight is F32 without scales, and quantization_config.modules_to_not_convert"
    assert words in str(raised.value)


def test_compressed_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_llama(folder, **SIZES)
    config = compressed_fp8("block", block_structure=[128, 128]) | {"ignore": [f"re:{re.escape(LAYER)}.*"]}
    names = ("weight", "weight_scale")
    quantise(folder, tmp_path / "plain", config, all_but(LAYER, names=names))
    equals_plain(load(folder), folder)
    change(folder, config | {"ignore": [f"re:{re.escape(LAYER)}.*", DOWN]})
    with pytest.raises(ConfigError, match=re.escape(f"quantised: {DOWN}.weight, which quantization_config.ignore")):
        load(folder)
    change(folder, config | {"ignore": []})
    with pytest.raises(ConfigError, match=re.escape(f"not quantised: {Q}.weight is F32 without scales")):
        load(folder)
    config["config_groups"]["group_0"]["targets"] = ["re:.*layers\\.[1-9].*"]
    change(folder, config | {"ignore": []})
    equals_plain(load(folder), folder)


def change(folder: Path, quantization: dict[str, Any]) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names, got 'lm_head'"),
        ({"ignored_layers": ["lm_head", 3]}, "ignored_layers must be a list of names"),
        ({"ignored_layers": [""]}, "ignored_layers must be a list of names"),
        ({"modules_to_not_convert": ["re:("]}, "modules_to_not_convert 're:(' is no regular expression"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    folder = make_llama(tmp_path / "model")
    change(folder, fp8_config((128, 128), **fields))
    with pytest.raises(ConfigError) as raised:
        ModelSpec.from_folder(folder)
    assert words in raised.value.message


def test_both_lists_count(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    change(folder, fp8_config((128, 128), modules_to_not_convert=["lm_head"], ignored_layers=["mlp.gate"]))
    quant = ModelSpec.from_folder(folder).quant
    assert quant is not None
    assert quant.ignored == ("lm_head", "mlp.gate")
    assert quant.ignored_by == "modules_to_not_convert and ignored_layers"


def test_parts_of_names() -> None:
    spec = QuantSpec("fp8", (128, 128), ignored=("lm_head", "mlp.gate", "model.layers.1", "re:.*conv"), by_parts=True)
    for module in ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.up_proj", "a.conv1d"):
        assert spec.is_ignored(module)
        assert spec.is_ignored("another.name", module)
        assert not spec.covers(module)
    for module in ("model.layers.0.mlp.gate_proj", "model.layers.10.mlp.up_proj", "model.layers.0.mlp"):
        assert not spec.is_ignored(module)
        assert spec.covers(module)
