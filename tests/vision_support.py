"""Prompts with images for tests: what transformers makes of them, its own vision tower included."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models_support import Picture
from torch import Tensor
from transformers import AutoModelForImageTextToText

Grid = tuple[int, int, int]
Layout = tuple[int | Grid, ...]
"""A prompt's parts: that many text tokens, or an image of so many patches by time, height and width."""


@dataclass(frozen=True)
class Illustrated:
    """A prompt with images. `pixels_PC` and `patches_G3` are what transformers takes, `kinds_T` its token types."""

    tokens: list[int]
    pictures: list[Picture]
    pixels_PC: Tensor
    patches_G3: Tensor
    kinds_T: Tensor

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """What `model` of transformers takes."""
        inputs = {"input_ids": torch.tensor([self.tokens])}
        if self.pictures:
            inputs |= {"pixel_values": self.pixels_PC, "image_grid_thw": self.patches_G3}
            if model.config.model_type != "kimi_k25":
                inputs["mm_token_type_ids"] = self.kinds_T[None]
        return inputs


@functools.cache
def oracle_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def illustrated(folder: Path, layout: Layout, seed: int) -> Illustrated:
    """Random text and random pixels; the embeddings are those of the checkpoint's own vision tower."""
    model = oracle_model(folder)
    config, vision = model.config, model.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    merge = getattr(vision, "spatial_merge_size", 2)
    patches = [part for part in layout if not isinstance(part, int)]
    pixels_PC = torch.randn(sum(t * h * w for t, h, w in patches), *_patch_shape(vision), generator=generator)
    patches_G3 = torch.tensor(patches, dtype=torch.int64).view(-1, 3)
    tokens: list[int] = []
    places: list[tuple[int, Grid]] = []
    for part in layout:
        if isinstance(part, int):
            tokens += torch.randint(3, 500, (part,), generator=generator).tolist()
        else:
            grid = (part[0], part[1] // merge, part[2] // merge)
            places.append((len(tokens) + 1, grid))
            count = grid[0] * grid[1] * grid[2]
            tokens += [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
    pictures = []
    if patches:
        seen = model.model.get_image_features(pixels_PC, patches_G3)
        depths = [seen.pooler_output, *getattr(seen, "deepstack_features", ())]
        rows = [torch.cat(parts, 1) for parts in zip(*depths, strict=True)]
        pictures = [Picture(p, g, rows_NW) for (p, g), rows_NW in zip(places, rows, strict=True)]
    kinds_T = (torch.tensor(tokens) == config.image_token_id).int()
    return Illustrated(tokens, pictures, pixels_PC, patches_G3, kinds_T)


def _patch_shape(vision: Any) -> tuple[int, ...]:
    """Qwen's patches are flat, of two frames; Kimi's are one small image."""
    if vision.model_type == "kimi_k25_vision":
        return (3, vision.patch_size, vision.patch_size)
    return (vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,)


@torch.inference_mode()
def oracle_logits(folder: Path, prompt: Illustrated) -> Tensor:
    """fp32 [T, V] at every position."""
    model = oracle_model(folder)
    model.model.rope_deltas = None
    return model(**prompt.inputs(model)).logits[0]


@torch.inference_mode()
def oracle_tokens(folder: Path, prompt: Illustrated, count: int) -> list[int]:
    """Greedy."""
    model = oracle_model(folder)
    model.model.rope_deltas = None
    inputs = prompt.inputs(model)
    out = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt.tokens) :].tolist()


def pieces(length: int, size: int) -> list[tuple[int, int]]:
    """[0, length) in pieces of `size`."""
    return list(itertools.pairwise([*range(0, length, size), length]))
