"""An independent quantiser: float checkpoints become block-FP8, FP4 or packed INT4 ones, and the floats they stand for.

Written from the formats' descriptions, element by element where it can be, and with nothing of the loader's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
Quantised = tuple[dict[str, Tensor], Tensor]
"""Tensors by the end of their name (after the module's), and the fp32 values that they stand for."""


def fp8_block(w: Tensor, block: tuple[int, int], scale_dtype: torch.dtype, names: tuple[str, str]) -> Quantised:
    """E4M3 with one scale per block; of [E, N, K] each matrix for itself."""
    if w.dim() == 3:
        parts = [fp8_block(m, block, scale_dtype, names) for m in w]
        fused = {
            n: torch.stack([p[0][n].view(torch.uint8) if n == names[0] else p[0][n] for p in parts]) for n in names
        }
        fused[names[0]] = fused[names[0]].view(torch.float8_e4m3fn)
        return fused, torch.stack([p[1] for p in parts])
    rows, columns = w.shape
    scales = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes, values = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(w.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            box = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale = w[box].abs().max() / 448
            if scale_dtype == torch.float8_e8m0fnu:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scale = scale.to(scale_dtype).float()
            scales[i, j] = scale
            codes[box] = (w[box] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            values[box] = codes[box].float() * scale
    return {names[0]: codes, names[1]: scales.to(scale_dtype)}, values


def fp4_rows(w: Tensor, names: tuple[str, str]) -> Quantised:
    """E2M1, two to a byte, the even column low; a power of two for 32 columns."""
    rows, columns = w.shape
    x = w.numpy()
    groups = math.ceil(columns / 32)
    scales = np.empty((rows, groups), dtype=np.float32)
    codes = np.zeros((rows, columns), dtype=np.uint8)
    values = np.empty_like(x)
    for r in range(rows):
        for g in range(groups):
            some = slice(32 * g, 32 * g + 32)
            scales[r, g] = 2.0 ** math.ceil(math.log2(np.abs(x[r, some]).max() / 6))
            codes[r, some] = np.abs(x[r, some][:, None] / scales[r, g] - E2M1).argmin(1)
            values[r, some] = E2M1[codes[r, some]] * scales[r, g]
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    e8m0 = torch.from_numpy(scales).to(torch.float8_e8m0fnu)
    return {names[0]: torch.from_numpy(packed.view(np.int8)), names[1]: e8m0}, torch.from_numpy(values)


def int4_groups(w: Tensor, group: int, scale_dtype: torch.dtype) -> Quantised:
    """compressed-tensors' pack-quantized, symmetric: q + 8 in a nibble, the first column lowest."""
    rows, columns = w.shape
    words = np.zeros((rows, math.ceil(columns / 8)), dtype=np.uint32)
    scales = torch.empty(rows, math.ceil(columns / group))
    values = torch.empty(w.shape)
    for g in range(scales.shape[1]):
        some = slice(g * group, min((g + 1) * group, columns))
        scale = (w[:, some].abs().amax(1) / 7.5).to(scale_dtype).float()
        scales[:, g] = scale
        q = (w[:, some] / scale[:, None]).round().clamp(-8, 7)
        values[:, some] = q * scale[:, None]
        for column in range(some.start, some.stop):
            nibble = (q[:, column - some.start] + 8).numpy().astype(np.uint32)
            words[:, column // 8] |= nibble << np.uint32(4 * (column % 8))
    tensors = {
        "weight_packed": torch.from_numpy(words.view(np.int32)),
        "weight_scale": scales.to(scale_dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    return tensors, values


def fp8_config(block: tuple[int, int], **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        **fields,
    }


def int4_config(group: int, ignore: list[str]) -> dict[str, Any]:
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    scheme = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": scheme},
        "format": "pack-quantized",
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def quantise(
    folder: Path, plain: Path, config: dict[str, Any], choose: Callable[[str, Tensor], Quantised | None]
) -> None:
    """`folder`'s checkpoint quantised in place, in two shards; in `plain` the floats that it then stands for.

    `choose`: the quantised tensor of a name, or None for one that stays as it is.
    """
    stored: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for name, w in load_file(folder / WEIGHTS).items():
        quantised = choose(name, w)
        if quantised is None:
            stored[name] = floats[name] = w
            continue
        module = name.removesuffix("weight") if name.endswith(".weight") else ""
        stored |= {module + end: t.contiguous() for end, t in quantised[0].items()}
        floats[name] = quantised[1].contiguous()
    plain.mkdir()
    save_file(floats, plain / WEIGHTS)
    values = json.loads((folder / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    save_shards(folder, stored)


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Scales and shapes apart from what they belong to, as the ends of big files may have it."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    small = {n for n in tensors if not n.endswith(("weight", "weight_packed", "_proj"))}
    shards = {"model-00001-of-00002.safetensors": tensors.keys() - small, "model-00002-of-00002.safetensors": small}
    for file, names in shards.items():
        save_file({n: tensors[n] for n in names}, folder / file)
    placed = {n: file for file, names in shards.items() for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def load_shards(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("model-*.safetensors") for n, t in load_file(file).items()}
