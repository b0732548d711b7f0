"""Reader of DeepSeek-V4 (`deepseek_v4`). No torch.

transformers writes `layer_types`, `mlp_layer_types`, `compress_rates` and `rope_parameters` of two names; the release
has `compress_ratios`, `num_hash_layers`, `qk_rope_head_dim` and flat `rope_scaling` instead. Both are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.kvcache.layout import FULL_GROUP, Retention
from common.layers.compress_spec import (
    HEAVY_ENTRIES,
    HEAVY_INPUT,
    SPARSE_ENTRIES,
    SPARSE_INPUT,
    SPARSE_KEYS,
    WINDOW_ROWS,
    CompressSpec,
    LayerKind,
    StreamSpec,
    row_width,
)
from common.layers.moe_spec import MoESpec, Scoring
from common.layers.rope_spec import RopeSpec
from common.models.cache_spec import WINDOW_GROUP, CacheGroup, CacheRegion, CacheSpec
from common.models.config_reader import ConfigReader
from common.models.rope_config import rope_of
from common.models.spec import ModelSpec, SpecSource, base_spec
from common.models.specs.moe import make_moe
from common.types.prefix import UNIT

_SPARSE, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
_KINDS: dict[str, LayerKind] = {"sliding_attention": "window", _SPARSE: "sparse", _HEAVY: "heavy"}
_KIND_OF_RATIO: dict[int, LayerKind] = {0: "window", 4: "sparse", 128: "heavy"}
_SCORINGS: dict[str, Scoring] = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid", "softmax": "softmax"}
_MLP_KINDS = ("hash_moe", "moe")


def read_deepseek_v4(source: SpecSource) -> ModelSpec:
    config = source.config
    main, compress = _rope_parameters(config)
    size = config.integer("moe_intermediate_size")
    text = config.values | {"intermediate_size": size, "rope_parameters": main, "rope_scaling": None}
    spec = base_spec(source, ConfigReader(config.path, text))
    if spec.num_kv_heads != 1:
        raise config.error("num_key_value_heads", f"must be 1, got {spec.num_kv_heads}: all heads share keys")
    for field in ("attention_bias", "mlp_bias"):
        if config.flag(field):
            raise config.error(field, "is not supported")
    attention = _read_attention(config, spec, rope_of(config, "rope_parameters.compress", compress))
    return replace(
        spec,
        compress=attention,
        streams=StreamSpec(
            count=config.integer("hc_mult", 4),
            steps=config.integer("hc_sinkhorn_iters", 20),
            eps=config.number("hc_eps", 1e-6),
        ),
        moe=_read_experts(config, spec.num_layers),
        cache=cache_of(attention, spec.head_dim),
    )


def _read_attention(config: ConfigReader, spec: ModelSpec, rope: RopeSpec) -> CompressSpec:
    rates = config.nested("compress_rates") if "compress_rates" in config.values else config
    old = rates is config
    attention = CompressSpec(
        kinds=_read_kinds(config, spec.num_layers),
        window=config.integer("sliding_window", 128),
        sparse_ratio=rates.integer("compress_rate_csa" if old else _SPARSE, 4),
        heavy_ratio=rates.integer("compress_rate_hca" if old else _HEAVY, 128),
        rope_dim=_rope_dim(config, spec.head_dim),
        rope=rope,
        q_rank=config.integer("q_lora_rank"),
        out_groups=config.integer("o_groups"),
        out_rank=config.integer("o_lora_rank"),
        index_heads=config.integer("index_n_heads"),
        index_dim=config.integer("index_head_dim"),
        index_topk=config.integer("index_topk"),
    )
    if spec.num_heads % attention.out_groups:
        raise config.error("o_groups", f"{attention.out_groups} does not divide {spec.num_heads} attention heads")
    if attention.index_dim < attention.rope_dim:
        raise config.error("index_head_dim", f"must be {attention.rope_dim} or more, what turns of it")
    return attention


def _read_kinds(config: ConfigReader, num_layers: int) -> tuple[LayerKind, ...]:
    """`layer_types`, or `compress_ratios` (which may go on with those of multi-token-prediction layers)."""
    types = config.layer_types(num_layers, tuple(_KINDS))
    if types is not None:
        return tuple(_KINDS[t] for t in types)
    ratios = config.values.get("compress_ratios")
    if not isinstance(ratios, list) or len(ratios) < num_layers or not set(ratios) <= set(_KIND_OF_RATIO):
        raise config.error("layer_types", f"is missing, and compress_ratios is not a list of 0, 4 and 128: {ratios!r}")
    return tuple(_KIND_OF_RATIO[r] for r in ratios[:num_layers])


def _rope_dim(config: ConfigReader, head_dim: int) -> int:
    share = config.values.get("partial_rotary_factor")
    if share is None:
        width = config.integer("qk_rope_head_dim", 64)
    else:
        width = int(head_dim * min(config.number("partial_rotary_factor", 1.0), 2.0))
    if not 0 < width <= head_dim or width % 2:
        raise config.error("partial_rotary_factor", f"must make an even number of up to {head_dim}, got {width}")
    return width


def _rope_parameters(config: ConfigReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """(main, compressed layers'). Yarn, where it is set, is for compressed layers and scales nothing."""
    values = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise config.error("rope_parameters", "must be an object")
    if all(isinstance(values.get(name), dict) for name in ("main", "compress")):
        main, compress = dict(values["main"]), dict(values["compress"])
    else:
        main = {"rope_type": "default", "rope_theta": config.number("rope_theta", 10000.0)}
        compress = values | {"rope_theta": config.number("compress_rope_theta", 160000.0)}
    if compress.get("rope_type", compress.get("type")) == "yarn":
        compress.setdefault("attention_factor", 1.0)
    return main, compress


def _read_experts(config: ConfigReader, num_layers: int) -> MoESpec:
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        num_hash = config.integer("num_hash_layers", 3, least=0)
    elif isinstance(kinds, list) and len(kinds) == num_layers and set(kinds) <= set(_MLP_KINDS):
        num_hash = _leading(config, kinds)
    else:
        raise config.error("mlp_layer_types", f"must say hash_moe or moe of {num_layers} layers, got {kinds!r}")
    if config.integer("n_shared_experts", 1) != 1:
        raise config.error("n_shared_experts", "other than 1 is not supported")
    width = config.integer("moe_intermediate_size")
    return make_moe(
        config,
        num_experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=width,
        is_moe_layer=(True,) * num_layers,
        scoring=_SCORINGS[config.choice("scoring_func", "sqrtsoftplus", tuple(_SCORINGS))],
        routed_scaling_factor=config.number("routed_scaling_factor", 1.5),
        correction_bias=True,
        shared_intermediate_size=width,
        swiglu_limit=config.number("swiglu_limit", 10.0),
        num_hash_layers=min(num_hash, num_layers),
    )


def _leading(config: ConfigReader, kinds: Sequence[str]) -> int:
    count = kinds.count("hash_moe")
    if "moe" in kinds[:count]:
        raise config.error("mlp_layer_types", "has a hash_moe layer after a moe one, which is not supported")
    return count


def cache_of(attention: CompressSpec, head_dim: int) -> CacheSpec:
    """Everything by position: rows in windows, entries in whole blocks, so that any position can be gone back to.

    A compressor's input is kept for as many tokens as an entry is pooled from, its values and gates side by side; a
    sparse layer's holds those of its indexer as well.
    """
    layers = {kind: tuple(i for i, k in enumerate(attention.kinds) if k == kind) for kind in set(attention.kinds)}
    sparse, heavy = layers.get("sparse", ()), layers.get("heavy", ())
    windows = {WINDOW_GROUP: attention.window}
    regions = [CacheRegion(WINDOW_ROWS, WINDOW_GROUP, tuple(range(len(attention.kinds))), head_dim)]
    if sparse:
        ratio, index_dim = attention.sparse_ratio, attention.index_dim
        group = f"{WINDOW_GROUP}_csa"
        windows[group] = 2 * ratio
        regions += [
            CacheRegion(SPARSE_ENTRIES, FULL_GROUP, sparse, row_width(head_dim, ratio)),
            CacheRegion(SPARSE_KEYS, FULL_GROUP, sparse, row_width(index_dim, ratio), dtype="model"),
            CacheRegion(SPARSE_INPUT, group, sparse, 4 * (head_dim + index_dim), dtype="model"),
        ]
    if heavy:
        ratio = attention.heavy_ratio
        group = WINDOW_GROUP if ratio == attention.window else f"{WINDOW_GROUP}_hca"
        windows[group] = ratio
        regions += [
            CacheRegion(HEAVY_ENTRIES, FULL_GROUP, heavy, row_width(head_dim, ratio)),
            CacheRegion(HEAVY_INPUT, group, heavy, 2 * head_dim, dtype="model"),
        ]
    groups = [CacheGroup(name, Retention.WINDOW, window) for name, window in windows.items()]
    if sparse or heavy:
        ratios = [*([attention.sparse_ratio] if sparse else []), *([attention.heavy_ratio] if heavy else [])]
        groups.insert(0, CacheGroup(FULL_GROUP, block_multiple=math.lcm(UNIT, *ratios)))
    return CacheSpec(tuple(groups), tuple(regions))
