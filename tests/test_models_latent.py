"""Families with latent attention: what their config says, strict loading, and what `test_models_logits.py` leaves out.

That file runs every configuration on the reference backend; here the CPU kernels compute the plain ones.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import Solo, greedy
from models_support import PagedModel, Sum
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, make_deepseek_v3, make_deepseek_v32, make_glm_moe_dsa
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.attention.cpu import CpuBackend
from common.config import EngineConfig
from common.engine.sizing import size_engine
from common.errors import ConfigError
from common.kvcache.layout import Sharding
from common.kvcache.packing import RowPacking
from common.layers.mla_spec import IndexerSpec, MLASpec
from common.layers.rope_spec import yarn_mscale
from common.models.cache_spec import latent_cache
from common.models.spec import ModelSpec
from common.types import Role

TOLERANCE = 1e-4
ROW, KEY = RowPacking(512, 64), RowPacking(128)
WEIGHTS = "model.safetensors"
MAKERS: dict[str, Callable[..., Path]] = {
    "deepseek_v3": make_deepseek_v3,
    "deepseek_v32": make_deepseek_v32,
    "glm_moe_dsa": make_glm_moe_dsa,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
R1: dict[str, Any] = {  # as the release has it, in the fields that are read
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
V32 = R1 | {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
GLM = V32 | {"model_type": "glm_moe_dsa", "num_hidden_layers": 6, "n_group": 1, "topk_group": 1, "rope_scaling": None}


def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSpec.from_folder(folder, weights=False)


def fresh_prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def oracle(folder: Path, tokens: list[int]) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]


def check(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_a_release_of_deepseek_v3(tmp_path: Path) -> None:
    spec = read(tmp_path, R1)
    scale = 192**-0.5 * yarn_mscale(40, 1.0) ** 2
    assert spec.mla == MLASpec(1536, 512, 128, 64, 128, pytest.approx(scale, rel=1e-12))
    assert spec.head_dim == 64
    assert spec.rope.attention_factor == 1.0
    assert spec.indexer is None
    assert spec.cache == latent_cache(61, ROW)
    assert spec.moe is not None
    assert spec.moe.is_moe_layer == (False,) * 3 + (True,) * 58
    kimi = read(tmp_path, R1 | {"model_type": "kimi_k2"})
    assert (kimi.model_type, kimi.mla, kimi.moe) == ("kimi_k2", spec.mla, spec.moe)


def test_latents_are_the_same_on_every_rank(tmp_path: Path) -> None:
    (region,) = read(tmp_path, R1).cache.regions
    assert not region.per_head
    assert (region.name, region.width, region.num_parts, region.num_units) == ("mla_latent", 576, 1, 1)


def test_queries_without_a_latent(tmp_path: Path) -> None:
    for value in (None, 0):
        spec = read(tmp_path, R1 | {"q_lora_rank": value, "rope_scaling": None})
        assert spec.mla == MLASpec(0, 512, 128, 64, 128, 192**-0.5)


def test_a_release_of_deepseek_v32(tmp_path: Path) -> None:
    spec = read(tmp_path, V32)
    assert spec.indexer == IndexerSpec(64, 128, 2048, 64, interleaved=False, owners=(True,) * 61)
    assert spec.cache == latent_cache(61, ROW, tuple(range(61)), KEY)
    dense = spec.with_dense_attention()
    assert dense.indexer is not None
    assert dense.indexer.dense
    assert dense.cache == latent_cache(61, ROW)
    assert read(tmp_path, R1).with_dense_attention() == read(tmp_path, R1)


@pytest.mark.parametrize(
    ("fields", "owners"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"index_topk_freq": 2}, (0, 1, 3, 5)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, (0, 4)),
        ({"index_topk_pattern": "FSSFSS"}, (0, 3)),
        ({"indexer_types": ["full", "shared", "full", "full", "shared", "shared"]}, (0, 2, 3)),
    ],
)
def test_layers_that_share_a_choice(tmp_path: Path, fields: dict[str, Any], owners: tuple[int, ...]) -> None:
    spec = read(tmp_path, GLM | fields)
    assert spec.indexer is not None
    assert spec.indexer.interleaved
    assert tuple(i for i, owner in enumerate(spec.indexer.owners) if owner) == owners
    assert spec.cache == latent_cache(6, ROW, owners, KEY)
    assert sorted(spec.cache.places(5)) == ["indexer_key", "mla_latent"][1 - (5 in owners) :]


@pytest.mark.parametrize(
    ("config", "field", "words"),
    [
        (R1 | {"kv_lora_rank": None}, "kv_lora_rank", "is missing"),
        (R1 | {"qk_nope_head_dim": 0}, "qk_nope_head_dim", "positive integer"),
        (R1 | {"qk_rope_head_dim": 63}, "qk_rope_head_dim", "must be even"),
        (R1 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "not supported"),
        (R1 | {"scoring_func": "softmax"}, "scoring_func", "'softmax' is not supported"),
        (V32 | {"q_lora_rank": None}, "q_lora_rank", "reads the queries' latent"),
        (V32 | {"index_topk": None}, "index_topk", "is missing"),
        (V32 | {"index_head_dim": 32}, "index_head_dim", "less than qk_rope_head_dim 64"),
        (V32 | {"rope_interleave": False}, "rope_interleave", "not supported in this family"),
        (V32 | {"layer_types": ["sliding_attention"] * 61}, "layer_types", "sliding_attention"),
        (GLM | {"indexer_types": ["full"]}, "indexer_types", "of 6 layers"),
        (GLM | {"index_topk_pattern": "FXFFFF"}, "index_topk_pattern", "full or shared"),
        (GLM | {"index_topk_pattern": "SFFFFF"}, "indexer_types", "no earlier indexer"),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        read(tmp_path, config)
    assert raised.value.param == field


@pytest.mark.parametrize("name", MAKERS)
def test_cpu_kernels_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path, seed=3)
    lengths = (150, 64, 3, 1)
    want = {n: oracle(folder, fresh_prompt(n)) for n in lengths}
    whole = PagedModel(folder, backend=CpuBackend())
    for got, n in zip(whole.step([(n, fresh_prompt(n)) for n in lengths]), lengths, strict=True):
        check(got, want[n])
    cut = PagedModel(folder, backend=CpuBackend(), block_size=32, seed=1)
    parts: list[Tensor] = []
    for first in range(0, 150, 7):
        work = [(0, fresh_prompt(150)[first : first + 7]), (first + 1, fresh_prompt(first + 3))]
        parts.append(cut.step(work if first < 20 else work[:1])[0])
    check(torch.cat(parts), want[150])


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_up_to_top_k_sparse_is_dense_and_past_it_is_not(name: str, tmp_path: Path) -> None:
    few, all_ = MAKERS[name](tmp_path / "few", seed=2), MAKERS[name](tmp_path / "all", seed=2, index_topk=400)
    tokens = fresh_prompt(60)
    run = {
        "sparse": torch.cat(_in_steps(PagedModel(few, backend=CpuBackend()), tokens)),
        "top-k over the context": torch.cat(_in_steps(PagedModel(all_, backend=CpuBackend()), tokens)),
        "dense": torch.cat(_in_steps(PagedModel(few, backend=CpuBackend(), dense=True), tokens)),
    }
    check(run["sparse"], oracle(few, tokens))
    check(run["dense"], oracle(all_, tokens))
    assert torch.equal(run["dense"], run["top-k over the context"])
    assert torch.equal(run["sparse"][:24], run["dense"][:24])
    assert (run["sparse"][30:] - run["dense"][30:]).abs().max() > 0.1


def _in_steps(paged: PagedModel, tokens: list[int]) -> list[Tensor]:
    return [paged.step([(0, tokens[a:b])])[0] for a, b in ((0, 20), (20, 24), (24, 40), (40, 41), (41, 60))]


def test_an_engine_can_be_told_to_attend_densely(tmp_path: Path) -> None:
    few = make_deepseek_v32(tmp_path / "few", seed=2)
    all_ = make_deepseek_v32(tmp_path / "all", seed=2, index_topk=400)
    prompt = tuple(fresh_prompt(40))

    def answer(folder: Path, **engine: Any) -> list[int]:
        solo = Solo(folder, **engine)
        request = solo.submit(prompt, greedy(20))
        solo.run()
        tokens: list[int] = request.tokens[0]
        return tokens

    dense, sparse = answer(few, sparse_attention=False), answer(few)
    assert dense == answer(all_)
    assert dense != sparse
    for on, regions in ((True, ["mla_latent", "indexer_key"]), (False, ["mla_latent"])):
        config = EngineConfig(model=str(few), sparse_attention=on, dtype="bfloat16", kv_cache_memory_bytes=1 << 24)
        layout = size_engine(config, ModelSpec.from_folder(few), Role.DECODE).layout
        assert [r.name for r in layout.regions][:-1] == regions
        assert {r.sharding for r in layout.regions} == {Sharding.REPLICATED}


def test_layers_behind_the_last_are_not_read(tmp_path: Path) -> None:
    folder = make_deepseek_v3(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    more = {"model.layers.3.eh_proj.weight": torch.zeros(64, 128), "model.layers.3.mlp.gate.weight": torch.zeros(8, 64)}
    save_file(tensors | more, folder / WEIGHTS)
    PagedModel(folder)
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"unknown: model.layers.4.eh_proj.weight"):
        PagedModel(folder)


def test_loading_is_strict(tmp_path: Path) -> None:
    folder = make_glm_moe_dsa(tmp_path, num_hidden_layers=4, indexer_types=["full", "shared", "full", "shared"])
    tensors = load_file(folder / WEIGHTS)
    indexers = sorted({int(name.split(".")[2]) for name in tensors if ".indexer." in name})
    assert indexers == [0, 2]
    layer = "model.layers.{}.self_attn.{}.weight".format
    del tensors[layer(0, "kv_b_proj")], tensors[layer(2, "indexer.wk")]
    tensors[layer(1, "indexer.wk")] = torch.zeros(16, 64)
    tensors[layer(3, "kv_a_proj_with_mqa")] = torch.zeros(32, 64)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError) as raised:
        PagedModel(folder)
    for words in (
        f"missing: {layer(0, 'kv_b_proj')} [176, 32]",
        f"missing: {layer(2, 'indexer.wk')} [16, 64]",
        f"misshapen: {layer(3, 'kv_a_proj_with_mqa')} is [32, 64], the config wants [40, 64]",
        f"unknown: {layer(1, 'indexer.wk')} [16, 64]",
    ):
        assert words in raised.value.message


@pytest.mark.parametrize("name", ["deepseek_v3", "glm_moe_dsa"])
def test_ranks_together_equal_one(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path)
    tokens = fresh_prompt(50)
    (expected,) = PagedModel(folder).step([(0, tokens)])
    total = Sum(2)
    got: dict[int, Tensor] = {}

    def rank(r: int) -> None:
        (got[r],) = PagedModel(folder, tp=total.of(r)).step([(0, tokens)])

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(got) == [0, 1]
    for logits in got.values():
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_is_close(name: str, tmp_path: Path) -> None:
    """The first 24 tokens: past them a rounding may select another position."""
    folder = MAKERS[name](tmp_path, initializer_range=0.1)
    tokens = fresh_prompt(60)
    (low,) = PagedModel(folder, dtype="bfloat16", backend=CpuBackend()).step([(0, tokens)])
    (full,) = PagedModel(folder, backend=CpuBackend()).step([(0, tokens)])
    assert low.isfinite().all()
    assert (low - full)[:24].square().mean().sqrt() < 0.1 * full.square().mean().sqrt()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_latents_may_be_kept_in_another_type(backend: str, tmp_path: Path) -> None:
    folder = make_deepseek_v3(tmp_path)
    tokens = fresh_prompt(100)
    made = CpuBackend() if backend == "cpu" else None
    paged = PagedModel(folder, kv_dtype="bfloat16", backend=made)
    got = torch.cat([paged.step([(0, part)])[0] for part in (tokens[:90], tokens[90:])])
    error, want = got - oracle(folder, tokens), oracle(folder, tokens)
    assert 1e-4 < error.square().mean().sqrt() < 0.03 * want.square().mean().sqrt()
