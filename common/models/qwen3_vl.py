"""Text towers of Qwen3-VL and Qwen3-VL-MoE (Qwen Team 2025): Qwen3 whose heads turn by time, height and width, in
interleaved sections (`common.layers.rope`), and whose first layers each add features of one more depth of the vision
tower to the rows of image tokens (DeepStack, Meng et al. 2024).
"""

from __future__ import annotations

from typing import ClassVar

from common.layers.base import Build
from common.layers.residual import ResidualStream
from common.layers.step import Step
from common.models.decoder import DecoderModel
from common.models.llama import LlamaLayer
from common.models.qwen3 import Qwen3Layer
from common.models.qwen3_moe import Qwen3MoeLayer
from common.models.spec import ModelSpec


class DeepstackLayer(LlamaLayer):
    """Mixed into a layer of Qwen3. Checkpoint names under `model.language_model.layers.N.`."""

    def __init__(self, spec: ModelSpec, build: Build, layer_idx: int) -> None:
        super().__init__(spec, build, layer_idx)
        self._layer_idx = layer_idx

    def __call__(self, stream: ResidualStream, step: Step) -> None:
        super().__call__(stream, step)
        if step.media is not None:
            step.media.add_features(stream, self._layer_idx)


class Qwen3VLLayer(DeepstackLayer, Qwen3Layer):
    pass


class Qwen3VLMoeLayer(DeepstackLayer, Qwen3MoeLayer):
    """Its experts are fused, and transposed in the releases (`common.layers.moe`)."""


class Qwen3VLForConditionalGeneration(DecoderModel):
    prefixes: ClassVar = {"model.": "model.language_model."}
    ignored = (*DecoderModel.ignored, r"model\.visual\..+")

    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> DeepstackLayer:
        return Qwen3VLLayer(spec, build, layer_idx)


class Qwen3VLMoeForConditionalGeneration(Qwen3VLForConditionalGeneration):
    def make_layer(self, spec: ModelSpec, build: Build, layer_idx: int) -> DeepstackLayer:
        return Qwen3VLMoeLayer(spec, build, layer_idx)
