"""Reading config.json: what it becomes, and what is refused, by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_llama, make_qwen3

from common.errors import ConfigError
from common.layers.rope_spec import RopeSpec
from common.models.cache_spec import attention_cache
from common.models.decoder import DecoderModel
from common.models.registry import family, model_class, spec_reader, supported
from common.models.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32, "num_hidden_layers": 4}


def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSpec.from_folder(folder, weights=False)


def test_llama(tmp_path: Path) -> None:
    spec = read(tmp_path, LLAMA)
    assert (spec.model_type, spec.architecture) == ("llama", "LlamaForCausalLM")
    assert (spec.head_dim, spec.num_kv_heads, spec.num_layers) == (16, 2, 2)
    assert spec.rope == RopeSpec(theta=10000.0)
    assert spec.cache == attention_cache((0, 0), 2, 16)
    assert (spec.eos_token_ids, spec.bos_token_id, spec.dtype) == ((2,), None, "float32")
    assert not spec.tie_word_embeddings
    assert len(spec.model_hash) == 16


def test_absent_fields_take_the_family_defaults(tmp_path: Path) -> None:
    short = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps", "architectures")}
    spec = read(tmp_path, short | {"head_dim": None})
    assert (spec.num_kv_heads, spec.rms_norm_eps, spec.architecture, spec.head_dim) == (4, 1e-6, "llama", 16)


def test_eos_is_the_union_with_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read(tmp_path, LLAMA | {"eos_token_id": [5]}).eos_token_ids == (2, 5, 7)
    assert read(tmp_path, LLAMA | {"eos_token_id": None}).eos_token_ids == (2, 7)


@pytest.mark.parametrize("named", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_the_tokenizers_eos_ends_a_text_too(tmp_path: Path, named: object) -> None:
    """A ChatML fine-tune of a base model whose config.json still has the base model's."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert read(tmp_path, LLAMA).eos_token_ids == (2,), "no tokenizer, no id"
    added = [{"id": 2, "content": "</s>"}, {"id": 31, "content": "<|im_end|>"}, {"id": 32, "content": "<|im_start|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert read(tmp_path, LLAMA).eos_token_ids == (2, 31)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert read(tmp_path, LLAMA).eos_token_ids == (2,)
    for odd in ([], {"added_tokens": 5}, {"added_tokens": [5, {"content": "<|im_end|>", "id": "x"}]}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        (tmp_path / "tokenizer.json").write_text(json.dumps(odd if isinstance(odd, dict) else {}))
        assert read(tmp_path, LLAMA).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (0, 0, 0, 0)),
        ({"sliding_window": 64, "use_sliding_window": False}, (0, 0, 0, 0)),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 64, 64)),
        ({"sliding_window": 64, "use_sliding_window": True}, (0, 0, 0, 0)),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (0, 0, 0, 0)),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, 0, 8, 0),
        ),
    ],
)
def test_windows(tmp_path: Path, fields: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert read(tmp_path, QWEN3 | fields).cache == attention_cache(windows, 2, 32)


def test_a_window_of_qwen3_moe_is_every_layers(tmp_path: Path) -> None:
    moe = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    spec = read(tmp_path, moe | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4})
    assert spec.cache == attention_cache((64,) * 4, 2, 32)


def test_llama_has_no_windows(tmp_path: Path) -> None:
    spec = read(tmp_path, LLAMA | {"sliding_window": 8, "use_sliding_window": True})
    assert not spec.cache.has_windows


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeSpec(theta=1e6)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec("linear", 1e4, 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeSpec("llama3", 5e5, 8.0, 64, 1.0, 4.0),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeSpec("llama3", 5e5, 8.0, 64, 1.0, 4.0),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": None}},
            RopeSpec("yarn", 1e4, 4.0, 64, attention_factor=1.138629436111989),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "attention_factor": 0.5,
                    "beta_fast": 16,
                    "beta_slow": 2,
                    "truncate": False,
                }
            },
            RopeSpec("yarn", 1e4, 2.0, 256, beta_fast=16.0, beta_slow=2.0, attention_factor=0.5, truncate=False),
        ),
        (
            {"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeSpec("llama3", 1e4, 8.0, 32, 1.0, 4.0),
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            RopeSpec("linear", 5e5, 2.0),
        ),
    ],
)
def test_rope(tmp_path: Path, fields: dict[str, Any], rope: RopeSpec) -> None:
    assert read(tmp_path, LLAMA | fields).rope == rope


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt_oss"}, "'gpt_oss' is not supported; supported are: "),
        ({"model_type": None}, "model_type is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 4"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"eos_token_id": ["x"]}, "eos_token_id must be an integer"),
        ({"torch_dtype": "int8"}, "dtype int8 is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_parameters rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "must be one flat set"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rope_scaling": {"rope_type": "yarn", "factor": 4},
            },
            "rope_scaling.rope_type is 'yarn', and rope_parameters says 'default'",
        ),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, LLAMA | fields)
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must list 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "['linear_attention'] is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is not set"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be a positive integer"),
    ],
)
def test_window_refusals(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, QWEN3 | fields)
    assert words in raised.value.message


def test_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelSpec.from_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        ModelSpec.from_folder(tmp_path)


def test_model_hash_tells_checkpoints_apart(tmp_path: Path) -> None:
    made = [
        make_llama(tmp_path / "a"),
        make_llama(tmp_path / "b", seed=1),
        make_llama(tmp_path / "c", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        make_qwen3(tmp_path / "d"),
    ]
    hashes = [ModelSpec.from_folder(f).model_hash for f in made]
    assert len(set(hashes)) == len(hashes)
    again = make_llama(tmp_path / "e")
    config = json.loads((again / "config.json").read_text()) | {"transformers_version": "9"}
    (again / "config.json").write_text(json.dumps(config, indent=7))
    assert ModelSpec.from_folder(again).model_hash == hashes[0]
    sharded = make_llama(tmp_path / "f", max_shard_size="40KB")
    assert ModelSpec.from_folder(sharded).model_hash == hashes[0], "the same model, cut otherwise"


def test_spec_costs_no_torch() -> None:
    code = "import sys, common.models.spec, common.models.kv; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_registry() -> None:
    assert {"llama", "qwen3"} < set(supported())
    for name in supported():
        assert family(name).model_type == name
        assert issubclass(model_class(name), DecoderModel)  # type: ignore[arg-type]
        assert callable(spec_reader(name))
    with pytest.raises(ConfigError, match=r"supported are: .*llama, .*qwen3"):
        model_class("mamba")
