"""Readers of mixture-of-experts fields, for the families that have them; and of Qwen3-MoE (`qwen3_moe`). No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.layers.moe_spec import MoESpec
from common.models.cache_spec import attention_cache
from common.models.config_reader import ConfigReader
from common.models.rope_config import refuse_partial
from common.models.spec import ModelSpec, SpecSource, base_spec
from common.models.specs.dense import read_windows


def read_qwen3_moe(source: SpecSource) -> ModelSpec:
    """Qwen3's; layers are mixtures of experts as `read_qwen_experts` says. One window is every layer's."""
    refuse_partial(source.config)
    spec = base_spec(source)
    windows = read_windows(source.config, spec.num_layers, first=0)
    return replace(
        spec,
        cache=attention_cache(windows, spec.num_kv_heads, spec.head_dim),
        moe=read_qwen_experts(source.config, spec.num_layers),
    )


def read_qwen_experts(config: ConfigReader, num_layers: int, *, norm_topk_prob: bool = False) -> MoESpec:
    """Softmax routing of the Qwen families, with the shared expert that the newer ones have.

    `decoder_sparse_step` n: every nth layer is a mixture, but for those in `mlp_only_layers`. `norm_topk_prob`: what
    it is where the config does not say.
    """
    step = config.integer("decoder_sparse_step", 1)
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise config.error("mlp_only_layers", f"must be a list of layer numbers, got {dense!r}")
    has_shared = bool(config.values.get("shared_expert_intermediate_size"))
    return make_moe(
        config,
        num_experts=config.integer("num_experts" if "num_experts" in config.values else "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        is_moe_layer=tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers)),
        norm_topk_prob=config.flag("norm_topk_prob", norm_topk_prob),
        shared_intermediate_size=config.integer("shared_expert_intermediate_size") if has_shared else 0,
        shared_gate=has_shared,
    )


def read_deepseek_experts(config: ConfigReader, num_layers: int) -> MoESpec:
    """Sigmoid routing with a correction bias and groups (DeepSeek-V3 and what came after it, Kimi-K2, GLM-5).

    `mlp_layer_types` says which layers are sparse; without it, those from `first_k_dense_replace` on.
    """
    config.choice("scoring_func", "sigmoid", ("sigmoid",))
    config.choice("topk_method", "noaux_tc", ("noaux_tc",))
    config.integer("moe_layer_freq", 1)
    if config.values.get("moe_layer_freq", 1) != 1:
        raise config.error("moe_layer_freq", "other than 1 is not supported")
    width = config.integer("moe_intermediate_size")
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        first = config.integer("first_k_dense_replace", 0, least=0)
        is_moe_layer = tuple(i >= first for i in range(num_layers))
    elif isinstance(kinds, list) and len(kinds) == num_layers and set(kinds) <= {"dense", "sparse"}:
        is_moe_layer = tuple(kind == "sparse" for kind in kinds)
    else:
        raise config.error("mlp_layer_types", f"must say dense or sparse of {num_layers} layers, got {kinds!r}")
    return make_moe(
        config,
        num_experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=width,
        is_moe_layer=is_moe_layer,
        scoring="sigmoid",
        norm_topk_prob=config.flag("norm_topk_prob", True),
        routed_scaling_factor=config.number("routed_scaling_factor", 2.5),
        num_groups=config.integer("n_group", 1),
        topk_groups=config.integer("topk_group", 1),
        correction_bias=True,
        router_fp32=True,
        shared_intermediate_size=config.integer("n_shared_experts", 0, least=0) * width,
    )


def make_moe(config: ConfigReader, **fields: Any) -> MoESpec:
    """`MoESpec(**fields)`; a ConfigError where the numbers do not fit each other."""
    try:
        return MoESpec(**fields)
    except ValueError as e:
        raise config.error("num_experts_per_tok", f"and the numbers of experts and groups do not fit: {e}") from None
