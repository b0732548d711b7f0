"""Readers of models that take images: their text towers (`qwen3_vl`, `qwen3_vl_moe`, `kimi_k25`). The
vision side is another worker's. No torch.
"""

from __future__ import annotations

from dataclasses import replace

from common.layers.media_spec import MediaSpec
from common.models.cache_spec import attention_cache
from common.models.config_reader import ConfigReader
from common.models.rope_config import read_sections, refuse_partial
from common.models.spec import ModelSpec, SpecSource, base_spec
from common.models.specs.latent import read_deepseek_v3
from common.models.specs.moe import read_qwen_experts

_QWEN3_VL_SECTIONS = (24, 20, 20)  # where a config names none


def read_qwen3_vl(source: SpecSource) -> ModelSpec:
    """Qwen3 dense with rotation by sections; features of several depths of the vision tower (deepstack)."""
    return _qwen3_vl(source, source.config.nested("text_config"))


def read_qwen3_vl_moe(source: SpecSource) -> ModelSpec:
    """The same over Qwen3-MoE, whose experts' weights are always divided by their sum."""
    text = source.config.nested("text_config")
    spec = _qwen3_vl(source, text)
    moe = read_qwen_experts(text, spec.num_layers, norm_topk_prob=True)
    if not moe.norm_topk_prob or moe.shared_gate:
        field = "shared_expert_intermediate_size" if moe.shared_gate else "norm_topk_prob"
        raise text.error(field, "is not what this family computes")
    return replace(spec, moe=moe)


def _qwen3_vl(source: SpecSource, text: ConfigReader) -> ModelSpec:
    refuse_partial(text)
    spec = base_spec(source, text)
    vision = source.config.nested("vision_config")
    depths = vision.values.get("deepstack_visual_indexes", [])
    if not isinstance(depths, list) or len(depths) > spec.num_layers:
        raise vision.error("deepstack_visual_indexes", f"must list {spec.num_layers} layers at most, got {depths!r}")
    return replace(
        spec,
        rope=replace(spec.rope, sections=read_sections(text, spec.head_dim, _QWEN3_VL_SECTIONS)),
        cache=attention_cache((0,) * spec.num_layers, spec.num_kv_heads, spec.head_dim),
        media=MediaSpec(read_placeholders(source.config), num_deepstack=len(depths), takes_grid=True),
    )


def read_kimi_k25(source: SpecSource) -> ModelSpec:
    """Kimi-K2, whose tokens images replace and nothing else."""
    text = source.config.nested("text_config")
    text.choice("model_type", "kimi_k2", ("kimi_k2", "deepseek_v3"))
    return replace(read_deepseek_v3(source, text), media=MediaSpec(read_placeholders(source.config)))


def read_placeholders(config: ConfigReader) -> tuple[int, ...]:
    """Ids of the tokens that stand for rows of images and of video frames, under any of their names."""
    names = ("image_token_id", "video_token_id", "media_placeholder_token_id")
    found = tuple(config.integer(name, least=0) for name in names if config.values.get(name) is not None)
    if not found:
        raise config.error(names[0], "is missing")
    return found
