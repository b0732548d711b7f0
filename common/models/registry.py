"""Which model families there are. A family is imported when it is asked for, so the table costs no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from common.errors import ConfigError

if TYPE_CHECKING:
    from common.layers.base import Build
    from common.models.decoder import DecoderModel
    from common.models.spec import ModelSpec, SpecSource


@dataclass(frozen=True)
class Family:
    """`reader` is the function of `common.models.specs.<spec_module>` that reads its config.json."""

    model_type: str
    module: str
    class_name: str
    spec_module: str
    reader: str


_FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "llama", "LlamaForCausalLM", "dense", "read_llama"),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", "dense", "read_qwen3"),
        Family("qwen3_vl", "qwen3_vl", "Qwen3VLForConditionalGeneration", "vision", "read_qwen3_vl"),
        Family("qwen3_vl_moe", "qwen3_vl", "Qwen3VLMoeForConditionalGeneration", "vision", "read_qwen3_vl_moe"),
        Family("deepseek_v3", "deepseek_v3", "DeepseekV3ForCausalLM", "latent", "read_deepseek_v3"),
        Family("kimi_k2", "deepseek_v3", "DeepseekV3ForCausalLM", "latent", "read_deepseek_v3"),
        Family("deepseek_v32", "deepseek_v32", "DeepseekV32ForCausalLM", "latent", "read_deepseek_v32"),
        Family("glm_moe_dsa", "deepseek_v32", "DeepseekV32ForCausalLM", "latent", "read_glm_moe_dsa"),
        Family("kimi_k25", "kimi_k25", "KimiK25ForConditionalGeneration", "vision", "read_kimi_k25"),
        *(
            Family(name, "qwen3_5", "Qwen3_5ForConditionalGeneration", "delta", "read_qwen3_5_vl")
            for name in ("qwen3_5", "qwen3_5_moe")
        ),
        *(
            Family(name, "qwen3_5", "Qwen3_5ForCausalLM", "delta", "read_qwen3_5")
            for name in ("qwen3_5_text", "qwen3_5_moe_text")
        ),
        Family("qwen3_next", "qwen3_next", "Qwen3NextForCausalLM", "delta", "read_qwen3_next"),
        Family("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", "moe", "read_qwen3_moe"),
        Family("deepseek_v4", "deepseek_v4", "DeepseekV4ForCausalLM", "deepseek_v4", "read_deepseek_v4"),
    )
}


class ModelClass(Protocol):
    def __call__(self, spec: ModelSpec, build: Build, max_positions: int) -> DecoderModel: ...


class SpecReader(Protocol):
    def __call__(self, source: SpecSource, /) -> ModelSpec: ...


def supported() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family(model_type: str) -> Family:
    """The family of a checkpoint's `model_type`. ConfigError, with all that is supported, for any other."""
    found = _FAMILIES.get(model_type)
    if found is None:
        have = ", ".join(supported())
        raise ConfigError(f"model_type {model_type!r} is not supported; supported are: {have}", param="model_type")
    return found


def model_class(model_type: str) -> ModelClass:
    """The class that computes the family."""
    entry = family(model_type)
    return cast(ModelClass, getattr(importlib.import_module(f"common.models.{entry.module}"), entry.class_name))


def spec_reader(model_type: str) -> SpecReader:
    """The function that reads the family's config.json."""
    entry = family(model_type)
    return cast(SpecReader, getattr(importlib.import_module(f"common.models.specs.{entry.spec_module}"), entry.reader))
