"""Qwen3.5, dense and mixture of experts (Qwen Team 2026): Qwen3-Next with the delta net's projections apart.

The multimodal checkpoints hold the same text tower under another name, and a vision tower that is another worker's.
"""

from __future__ import annotations

from typing import ClassVar

from common.layers.base import Build
from common.models.qwen3_next import Qwen3NextForCausalLM, Qwen3NextLayer
from common.models.spec import ModelSpec


class Qwen3_5Layer(Qwen3NextLayer):  # noqa: N801 - the family's name
    """Checkpoint names under `model.layers.N.`; computed like Qwen3-Next's."""

    fused_projection = False


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):  # noqa: N801
    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> Qwen3_5Layer:
        return Qwen3_5Layer(spec, build, layer_idx)


class Qwen3_5ForConditionalGeneration(Qwen3_5ForCausalLM):  # noqa: N801
    """Checkpoint names under `model.language_model.`."""

    prefixes: ClassVar = {"model.": "model.language_model."}
    ignored = (*Qwen3_5ForCausalLM.ignored, r"model\.visual\..+")
