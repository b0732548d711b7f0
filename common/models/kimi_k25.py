"""Text tower of Kimi-K2.5 (Moonshot AI 2026): Kimi-K2, with the rows of images in place of their tokens' embeddings.
Images change nothing else: tokens turn by their index.
"""

from __future__ import annotations

from typing import ClassVar

from common.layers.base import Build
from common.models.deepseek_v3 import DeepseekV3ForCausalLM
from common.models.spec import ModelSpec


class KimiK25ForConditionalGeneration(DeepseekV3ForCausalLM):
    """Checkpoint names under `language_model.`."""

    prefixes: ClassVar = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}

    def __init__(self, spec: ModelSpec, build: Build, max_positions: int) -> None:
        super().__init__(spec, build, max_positions)
        tower = (rf"language_model\.{pattern}" for pattern in self.ignored)
        self.ignored = (*tower, r"(model\.)?(vision_tower|mm_projector)\..+")
