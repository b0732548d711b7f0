"""Every family of models that the tests know: how to make tiny checkpoints of it, and who judges them.

A new family is one `Family` here. Its configurations go through `test_models_logits.py` (our model against
transformers, no engine), `test_families.py` (engine modes, a part of them) and `test_families_exact.py` (all modes,
which writes the table in docs/models.md). The first configuration is the plain one: it goes through every mode.

Checkpoints allow 1024 positions, so that prompts of 700 tokens and their answers fit. Where the best two logits of
a reference's answer are nearly equal, the tests say so: give that configuration another `seed`.

Where an indexer selects positions, two scores at the edge of the selection may be equal to a rounding, and then the
reference itself is undecided: its cached and uncached passes, or its fp32 and fp64, differ by units of logit. The seeds
of `deepseek_v32` and `glm_moe_dsa` are the first for which transformers alone has more than 5e-6 between the last score
taken and the first left out, over the prompts of `test_models_logits.py` and of both matrices with its own answers.
Our results take no part in that choice; whoever changes lengths or prompts there has to look for seeds again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_models import (
    make_deepseek_v3,
    make_deepseek_v4,
    make_deepseek_v32,
    make_glm_moe_dsa,
    make_kimi_k25,
    make_llama,
    make_qwen3,
    make_qwen3_5,
    make_qwen3_moe,
    make_qwen3_next,
    make_qwen3_vl,
    make_qwen3_vl_moe,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

Maker = Callable[[Path], Path]
"""Writes a random fp32 checkpoint into a folder, the same one each time, and returns the folder."""


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """The reference: transformers in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load_image_text(folder: Path) -> PreTrainedModel:
    """The reference with its vision tower; here it is given text alone (images: `test_engine_media.py`)."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load_as_deepseek_v3(folder: Path) -> PreTrainedModel:
    """For a type that transformers does not know, and that is DeepSeek-V3."""
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    config = DeepseekV3Config(**values)
    return DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Family:
    """`name`: a row of the table. `reference`: how transformers reads a checkpoint of it.

    `quick`: configurations that `make test` runs; empty is all. `engine`: fields of `EngineConfig` that every engine
    of the family gets in these tests, where a default does not do.
    """

    name: str
    configurations: Mapping[str, Maker]
    quick: tuple[str, ...] = ()
    reference: Callable[[Path], PreTrainedModel] = load_causal_lm
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quick_configurations(self) -> tuple[str, ...]:
        return self.quick or tuple(self.configurations)


def all_configurations() -> Iterator[tuple[Family, str]]:
    for family in FAMILIES:
        for configuration in family.configurations:
            yield family, configuration


_deepseek_v4 = make_deepseek_v4
_llama = partial(make_llama, max_position_embeddings=1024)
_qwen3 = partial(make_qwen3, max_position_embeddings=1024)
_qwen3_moe = partial(make_qwen3_moe, max_position_embeddings=1024)
_qwen3_next = partial(make_qwen3_next, max_position_embeddings=1024)
_qwen3_5 = partial(make_qwen3_5, max_position_embeddings=1024)
_qwen3_vl = partial(make_qwen3_vl, max_position_embeddings=1024)
_qwen3_vl_moe = partial(make_qwen3_vl_moe, max_position_embeddings=1024)
_kimi_k25 = partial(make_kimi_k25, max_position_embeddings=1024)
_deepseek_v3 = partial(make_deepseek_v3, max_position_embeddings=1024)
_kimi_k2 = partial(make_deepseek_v3, model_type="kimi_k2", max_position_embeddings=1024, n_group=1, topk_group=1)
_deepseek_v32 = partial(make_deepseek_v32, max_position_embeddings=1024)
_glm_moe_dsa = partial(make_glm_moe_dsa, max_position_embeddings=1024)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
YARN_MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16.0, "beta_slow": 1.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_NINE_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 72}
_ALTERNATING = {
    "sliding_window": 32,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_WIDE_DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 3,
}

RATES_16 = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        {
            "plain": _llama,
            "tied, 9 heads of 8": partial(_llama, tie_word_embeddings=True, **_NINE_HEADS),
            "bias": partial(_llama, attention_bias=True, mlp_bias=True),
            "llama3 rope, a key head a query head": partial(_llama, num_key_value_heads=4, rope_parameters=LLAMA3),
            "linear rope, one key head": partial(_llama, num_key_value_heads=1, rope_parameters=LINEAR),
        },
    ),
    Family(
        "qwen3",
        {
            "tied": partial(_qwen3, tie_word_embeddings=True),
            "YaRN, bias": partial(_qwen3, rope_parameters=YARN, attention_bias=True),
            "window of 24, 8 heads": partial(
                _qwen3, sliding_window=24, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2
            ),
            "window of 5 in every layer": partial(_qwen3, sliding_window=5, max_window_layers=0),
            "alternating windows of 32": partial(_qwen3, **_ALTERNATING),
        },
    ),
    Family(
        "qwen3_moe",
        {
            "bias": partial(_qwen3_moe, attention_bias=True),
            "one expert, not normalized": partial(_qwen3_moe, norm_topk_prob=False, num_experts_per_tok=1),
            "experts in every other layer, a window of 24": partial(
                _qwen3_moe, decoder_sparse_step=2, num_hidden_layers=4, use_sliding_window=True, sliding_window=24
            ),
            "40 experts, dense layers, tied": partial(
                _qwen3_moe, mlp_only_layers=[0, 2], num_experts=40, num_experts_per_tok=6, tie_word_embeddings=True
            ),
        },
    ),
    Family(
        "qwen3_vl",
        {
            "plain": _qwen3_vl,
            "tied, 6 heads, YaRN": partial(
                _qwen3_vl,
                tied=True,
                num_attention_heads=6,
                num_key_value_heads=3,
                rope_parameters=YARN | {"mrope_section": [4, 2, 2]},
            ),
        },
        reference=load_image_text,
    ),
    Family(
        "qwen3_vl_moe",
        {
            "plain": _qwen3_vl_moe,
            "24 experts, a dense layer": partial(
                _qwen3_vl_moe, mlp_only_layers=[1], num_experts=24, num_experts_per_tok=5
            ),
        },
        reference=load_image_text,
    ),
    Family(
        "deepseek_v4",
        {
            "all kinds of layers, HCA of 16": partial(_deepseek_v4, compress_rates=RATES_16, sliding_window=24),
            "all kinds of layers, HCA of 128, 2 hashed": partial(_deepseek_v4, num_hash=2),
            "window alone, none hashed": partial(_deepseek_v4, kinds="ww", num_hash=0, sliding_window=24),
            "CSA alone, top 8, 8 heads in 4 groups": partial(
                _deepseek_v4, kinds="cc", num_attention_heads=8, o_groups=4, index_n_heads=24
            ),
        },
    ),
    Family(
        "deepseek_v3",
        {
            "experts in groups": _deepseek_v3,
            "no query latent, one group, tied": partial(
                _deepseek_v3, q_lora_rank=None, n_group=1, topk_group=1, tie_word_embeddings=True
            ),
            "YaRN with mscale, bias, 9 heads": partial(
                _deepseek_v3, rope_parameters=YARN_MSCALE, attention_bias=True, num_attention_heads=9
            ),
            "rope in halves, no dense layer, 2 shared experts": partial(
                _deepseek_v3,
                rope_interleave=False,
                first_k_dense_replace=0,
                n_shared_experts=2,
                norm_topk_prob=False,
                routed_scaling_factor=1.0,
                num_attention_heads=2,
            ),
        },
    ),
    Family(
        "kimi_k2",
        {"YaRN with mscale": partial(_kimi_k2, rope_parameters=YARN_MSCALE), "plain rope": _kimi_k2},
        quick=("YaRN with mscale",),
        reference=load_as_deepseek_v3,
    ),
    Family(
        "deepseek_v32",
        {
            "24 positions of all": partial(_deepseek_v32, seed=7),
            "9 positions, 32 indexer heads, YaRN, bias": partial(
                _deepseek_v32, seed=4, index_topk=9, index_n_heads=32, rope_parameters=YARN_MSCALE, attention_bias=True
            ),
            "64 positions, one group, tied, 8 heads": partial(
                _deepseek_v32,
                seed=7,
                index_topk=64,
                n_group=1,
                topk_group=1,
                tie_word_embeddings=True,
                num_attention_heads=8,
            ),
        },
    ),
    Family(
        "glm_moe_dsa",
        {
            "every layer selects": partial(_glm_moe_dsa, seed=12),
            "layers share, by a pattern": partial(
                _glm_moe_dsa, seed=1, num_hidden_layers=4, indexer_types=["full", "shared", "full", "shared"]
            ),
            "layers share, every third selects": partial(
                _glm_moe_dsa, num_hidden_layers=5, index_topk_freq=3, index_topk=40, tie_word_embeddings=True
            ),
        },
    ),
    Family(
        "kimi_k25",
        {
            "plain": _kimi_k25,
            "YaRN, two groups": partial(_kimi_k25, seed=1, rope_parameters=YARN_MSCALE, n_group=2, topk_group=1),
        },
        reference=load_image_text,
    ),
    Family(
        "qwen3_next",
        {
            "plain": _qwen3_next,
            "dense layers, a value head a key head": partial(_qwen3_next, mlp_only_layers=[0, 2], **_WIDE_DELTA),
            "bias, 6 heads, YaRN, tied": partial(
                _qwen3_next,
                seed=1,
                attention_bias=True,
                num_attention_heads=6,
                num_key_value_heads=3,
                tie_word_embeddings=True,
                rope_parameters=YARN | {"partial_rotary_factor": 0.25},
            ),
        },
    ),
    Family(
        "qwen3_5",
        {
            "plain": _qwen3_5,
            "beside a vision tower, 4 value heads a key head": partial(
                _qwen3_5, vision=True, linear_num_key_heads=1, linear_num_value_heads=4
            ),
            "attention first, tied": partial(
                _qwen3_5, tied=True, layer_types=["full_attention", "linear_attention"], num_hidden_layers=2
            ),
        },
    ),
    Family(
        "qwen3_5_moe",
        {
            "plain": partial(_qwen3_5, moe=True),
            "beside a vision tower, 24 experts": partial(
                _qwen3_5, moe=True, vision=True, num_experts=24, num_experts_per_tok=5, **_WIDE_DELTA
            ),
        },
    ),
)
