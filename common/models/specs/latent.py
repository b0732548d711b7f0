"""Readers of the families with multi-head latent attention. No torch.

`deepseek_v3` (DeepSeek-V3, R1, Moonlight) and `kimi_k2`; with the lightning indexer `deepseek_v32` and `glm_moe_dsa`
(GLM-5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.layers.mla_spec import IndexerSpec, MLASpec
from common.layers.rope_spec import yarn_mscale
from common.models.cache_spec import latent_cache
from common.models.config_reader import ConfigReader
from common.models.rope_config import refuse_partial, rope_values
from common.models.spec import ModelSpec, SpecSource, base_spec
from common.models.specs.moe import read_deepseek_experts

_SPARSE_TYPES = ("indexed_attention", "deepseek_sparse_attention")  # of transformers 5.23 and 5.17


def read_deepseek_v3(source: SpecSource, text: ConfigReader | None = None) -> ModelSpec:
    """`text`: the nested config of a multimodal model's text tower."""
    config = text or source.config
    spec = _read_latent(source, config, interleaved=config.flag("rope_interleave", True))
    assert spec.mla is not None
    return replace(spec, cache=latent_cache(spec.num_layers, spec.mla.packing))


def read_deepseek_v32(source: SpecSource) -> ModelSpec:
    """DeepSeek-V3's, and every layer has an indexer, whose keys turn in halves."""
    spec = _read_latent(source, source.config, interleaved=True)
    return _with_indexer(source.config, spec, (True,) * spec.num_layers, interleaved=False)


def read_glm_moe_dsa(source: SpecSource) -> ModelSpec:
    """DeepSeek-V3.2's, but indexers turn neighbours, and layers may share the choice of an earlier one."""
    config = source.config
    spec = _read_latent(source, config, interleaved=True)
    return _with_indexer(config, spec, _owners(config, spec.num_layers), interleaved=True)


def _read_latent(source: SpecSource, config: ConfigReader, *, interleaved: bool) -> ModelSpec:
    refuse_partial(config)
    if not config.flag("rope_interleave", interleaved) == interleaved:
        raise config.error("rope_interleave", "false is not supported in this family")
    rope_dim = config.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise config.error("qk_rope_head_dim", f"must be even, got {rope_dim}")
    # what `head_dim` of a config.json is differs between writers; the width that turns is meant
    turning = ConfigReader(config.path, config.values | {"head_dim": rope_dim})
    spec = base_spec(source, turning)
    return replace(
        spec,
        mla=read_mla(config, spec),
        moe=read_deepseek_experts(config, spec.num_layers),
        mtp_layers=_mtp_layers(source, config, spec.num_layers),
    )


def _mtp_layers(source: SpecSource, config: ConfigReader, num_layers: int) -> int:
    """Those that the config names, if the checkpoint has them: many that were converted have lost them."""
    count = config.integer("num_nextn_predict_layers", 0, least=0)
    first = f"layers.{num_layers}.eh_proj.weight"
    return count if not source.tensors or any(name.endswith(first) for name in source.tensors) else 0


def read_mla(config: ConfigReader, spec: ModelSpec) -> MLASpec:
    """Widths of the heads. The softmax scale holds the square of Yarn's `mscale_all_dim`: queries' and keys' share."""
    nope_dim = config.integer("qk_nope_head_dim")
    scale = float((nope_dim + spec.head_dim) ** -0.5)
    _, rope = rope_values(config)
    if spec.rope.rope_type != "default" and rope.get("mscale_all_dim"):
        mscale = ConfigReader(config.path, rope).number("mscale_all_dim", 1.0)
        scale *= yarn_mscale(spec.rope.factor, mscale) ** 2
    return MLASpec(
        q_lora_rank=config.integer("q_lora_rank", 0, least=0),
        kv_lora_rank=config.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=spec.head_dim,
        v_dim=config.integer("v_head_dim"),
        scale=scale,
        interleaved=config.flag("rope_interleave", True),
        bias=spec.attention_bias,
    )


def _with_indexer(config: ConfigReader, spec: ModelSpec, owners: tuple[bool, ...], *, interleaved: bool) -> ModelSpec:
    """Adds the indexer and the cache of its keys."""
    assert spec.mla is not None
    if not spec.mla.q_lora_rank:
        raise config.error("q_lora_rank", "must be positive: the indexer reads the queries' latent")
    config.layer_types(spec.num_layers, _SPARSE_TYPES)
    head_dim = config.integer("index_head_dim", 128)
    if head_dim < spec.mla.rope_dim:
        raise config.error("index_head_dim", f"{head_dim} is less than qk_rope_head_dim {spec.mla.rope_dim}")
    try:
        indexer = IndexerSpec(
            num_heads=config.integer("index_n_heads"),
            head_dim=head_dim,
            top_k=config.integer("index_topk"),
            rope_dim=spec.mla.rope_dim,
            interleaved=config.flag("indexer_rope_interleave", interleaved),
            owners=owners,
        )
    except ValueError as e:
        raise config.error("indexer_types", f"is not supported: {e}") from None
    layers = tuple(i for i, owner in enumerate(owners) if owner)
    return replace(
        spec, indexer=indexer, cache=latent_cache(spec.num_layers, spec.mla.packing, layers, indexer.packing)
    )


def _owners(config: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Layers with an indexer of their own, by the first of three fields that is there.

    `indexer_types` lists full or shared; `index_topk_pattern` is that in letters, F or S; `index_topk_freq` n makes
    every nth layer full, from `index_skip_topk_offset` on, and those before it too.
    """
    kinds: Any = config.values.get("indexer_types")
    field = "indexer_types"
    if kinds is None and config.values.get("index_topk_pattern") is not None:
        field = "index_topk_pattern"
        kinds = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in config.values[field]]
    if kinds is None:
        every = config.integer("index_topk_freq", 1)
        offset = config.integer("index_skip_topk_offset", 2, least=0)
        return tuple(max(i - offset + 1, 0) % every == 0 for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"full", "shared"}:
        raise config.error(field, f"must say full or shared of {num_layers} layers, got {config.values[field]!r}")
    return tuple(kind == "full" for kind in kinds)
