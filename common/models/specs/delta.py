"""Readers of models with gated delta-net layers: Qwen3-Next (`qwen3_next`) and Qwen3.5, dense and mixture of experts
(`qwen3_5`, `qwen3_5_moe`, and their text towers alone, `..._text`). No torch.
"""

from __future__ import annotations

from dataclasses import replace

from common.kvcache.layout import FULL_GROUP, Retention
from common.layers.delta_spec import CONV_REGION, RECURRENT_REGION, DeltaSpec
from common.layers.media_spec import MediaSpec
from common.models.cache_spec import KV_REGION, STATE_GROUP, CacheGroup, CacheRegion, CacheSpec
from common.models.config_reader import ConfigReader
from common.models.rope_config import read_partial, read_sections
from common.models.spec import ModelSpec, SpecSource, base_spec
from common.models.specs.moe import read_qwen_experts
from common.models.specs.vision import read_placeholders

_TURNING = 0.25  # of a head, where a config does not say
_INTERVAL = 4  # every which layer attends
_SECTIONS = (11, 11, 10)  # where a config names none


def read_qwen3_next(source: SpecSource) -> ModelSpec:
    """Every layer is a mixture of experts, but for those that the config calls dense."""
    spec = _hybrid(source, source.config)
    return replace(spec, moe=read_qwen_experts(source.config, spec.num_layers, norm_topk_prob=True))


def read_qwen3_5(source: SpecSource) -> ModelSpec:
    """A text config: dense, or a mixture of experts in every layer."""
    return _qwen3_5(source, source.config)


def read_qwen3_5_vl(source: SpecSource) -> ModelSpec:
    """The text tower of a multimodal config. Its heads turn by sections, which in text are all alike."""
    text = source.config.nested("text_config")
    spec = _qwen3_5(source, text)
    return replace(
        spec,
        rope=replace(spec.rope, sections=read_sections(text, spec.rope.rotary_dim, _SECTIONS)),
        media=MediaSpec(read_placeholders(source.config), takes_grid=True),
    )


def _qwen3_5(source: SpecSource, text: ConfigReader) -> ModelSpec:
    spec = _hybrid(source, text)
    if "num_experts" not in text.values:
        return spec
    moe = read_qwen_experts(text, spec.num_layers)
    return replace(spec, moe=replace(moe, norm_topk_prob=True, is_moe_layer=(True,) * spec.num_layers))


def _hybrid(source: SpecSource, config: ConfigReader) -> ModelSpec:
    spec = base_spec(source, config)
    delta = read_delta(config, spec.num_layers)
    return replace(
        spec,
        rope=replace(spec.rope, rotary_dim=read_partial(config, spec.head_dim, _TURNING)),
        zero_centred_norm=True,
        delta=delta,
        mtp_layers=_mtp_layers(source, config),
        cache=hybrid_cache(delta, spec.num_kv_heads, spec.head_dim),
    )


def _mtp_layers(source: SpecSource, config: ConfigReader) -> int:
    """Those that the checkpoint has, whatever its config calls them: many that were converted have lost them.

    One with an embedding of its own is left unread.
    """
    if config.flag("mtp_use_dedicated_embeddings"):
        return 0
    named = max(config.integer(field, 0, least=0) for field in ("mtp_num_hidden_layers", "num_nextn_predict_layers"))
    if not source.tensors:
        return named
    return max(named, 1) if any(name.startswith("mtp.") for name in source.tensors) else 0


def read_delta(config: ConfigReader, num_layers: int) -> DeltaSpec:
    """`layer_types`, or every `full_attention_interval`th layer attends; and the delta net's sizes."""
    kinds = config.layer_types(num_layers, ("linear_attention", "full_attention"))
    if kinds is None:
        interval = config.integer("full_attention_interval", _INTERVAL)
        is_delta = tuple((i + 1) % interval != 0 for i in range(num_layers))
    else:
        is_delta = tuple(kind == "linear_attention" for kind in kinds)
    if len(set(is_delta)) != 2:
        raise config.error("layer_types", "must have layers of both kinds, linear_attention and full_attention")
    try:
        return DeltaSpec(
            is_delta_layer=is_delta,
            num_key_heads=config.integer("linear_num_key_heads", 16),
            num_value_heads=config.integer("linear_num_value_heads", 32),
            key_dim=config.integer("linear_key_head_dim", 128),
            value_dim=config.integer("linear_value_head_dim", 128),
            conv_width=config.integer("linear_conv_kernel_dim", 4),
        )
    except ValueError as e:
        raise config.error("linear_num_value_heads", f"and the like do not fit: {e}") from None


def hybrid_cache(delta: DeltaSpec, num_kv_heads: int, head_dim: int) -> CacheSpec:
    """Keys and values of the layers that attend; the two states of the others (`common.layers.gated_delta`)."""
    attend = tuple(i for i, is_delta in enumerate(delta.is_delta_layer) if not is_delta)
    recur = tuple(i for i, is_delta in enumerate(delta.is_delta_layer) if is_delta)
    return CacheSpec(
        (CacheGroup(FULL_GROUP), CacheGroup(STATE_GROUP, Retention.SNAPSHOT)),
        (
            CacheRegion(KV_REGION, FULL_GROUP, attend, head_dim, 2, num_kv_heads, per_head=True),
            CacheRegion(
                CONV_REGION,
                STATE_GROUP,
                recur,
                delta.unit_width,
                delta.conv_width - 1,
                delta.num_key_heads,
                dtype="model",
                per_head=True,
            ),
            CacheRegion(
                RECURRENT_REGION,
                STATE_GROUP,
                recur,
                delta.key_dim * delta.value_dim,
                num_units=delta.num_value_heads,
                dtype="float32",
                per_head=True,
            ),
        ),
    )
