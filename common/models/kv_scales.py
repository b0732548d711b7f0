"""Scales of an 8-bit cache: a checkpoint's own tensors, or a file that a calibration wrote. No torch.

Checkpoints spell them in several ways, one number each:

    model.layers.N.self_attn.attn.k_scale, .v_scale      vLLM
    model.layers.N.self_attn.k_scale, .v_scale           compressed-tensors
    model.layers.N.self_attn.k_proj.k_scale, v_proj.v_scale      ModelOpt
    model.layers.N.self_attn.k_proj.output_scale, v_proj.output_scale   llm-compressor's first releases
    model.layers.N.self_attn.kv_scale (or attn.kv_scale)         one for both

A file is JSON: `kv_dtype`, `model_hash` (scales of one fine-tune are not those of another), and `layers`, by index the
scales `k` and `v`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.kvcache.scales import KVScales
from common.models.checkpoint import DTYPE_NAMES, TensorInfo, read_index, read_json
from common.models.spec import ModelSpec

FILE_NAME = "kv_cache_scales.json"
FLOAT8 = "float8_e4m3fn"

_LAYER = r"model\.(?:language_model\.)?layers\.(?P<layer>\d+)\.self_attn\."
_SPELLINGS = tuple(
    re.compile(_LAYER + rest)
    for rest in (
        r"(?:attn\.)?(?P<part>[kv])_scale",
        r"(?P<part>[kv])_proj\.(?P=part)_scale",
        r"(?P<part>[kv])_proj\.output_scale",
        r"(?:attn\.)?(?P<part>kv)_scale",
    )
)


def is_scale(name: str) -> bool:
    """Is a tensor of this name a scale of the cache?"""
    return any(s.fullmatch(name) for s in _SPELLINGS)


def find_scales(spec: ModelSpec, path: str = "") -> dict[int, KVScales]:
    """By layer: those of the file `path`, else the checkpoint's, else those of `FILE_NAME` in its folder.

    ConfigError where there are none, or they are not this model's.
    """
    if path:
        return read_scales(Path(path), spec)
    if found := checkpoint_scales(read_index(spec.folder)):
        return found
    if (spec.folder / FILE_NAME).is_file():
        return read_scales(spec.folder / FILE_NAME, spec)
    raise ConfigError(
        f"an 8-bit KV cache needs a scale of each layer, and {spec.folder} has none: make them once with "
        f"`nanodeploy calibrate-kv {spec.folder}`",
        param="kv_dtype",
    )


def checkpoint_scales(tensors: Mapping[str, TensorInfo]) -> dict[int, KVScales]:
    """Those that are among a checkpoint's tensors, by layer; empty without any. ConfigError for half of a pair."""
    found: dict[int, dict[str, float]] = {}
    for name, layer, part in _named(tensors):
        value = _read_number(tensors[name])
        if not value > 0:
            raise ConfigError(f"{tensors[name].file}: {name} is {value}; a scale must be positive")
        found.setdefault(layer, {}).update(dict.fromkeys(part, value))
    for layer, parts in found.items():
        if len(parts) < 2:
            raise ConfigError(f"layer {layer} has a {next(iter(parts))} scale and no other: both or none are needed")
    return {layer: KVScales(**found[layer]) for layer in sorted(found)}


def read_scales(path: Path, spec: ModelSpec) -> dict[int, KVScales]:
    """Of a calibration's file. ConfigError if it is malformed, or was made for another model."""
    content = read_json(path)
    if content.get("kv_dtype") != FLOAT8:
        raise ConfigError(
            f"{path} has scales for kv_dtype {content.get('kv_dtype')!r}, not {FLOAT8}", param="kv_scales"
        )
    wanted = ModelSpec.from_folder(spec.folder).model_hash.hex()
    if content.get("model_hash") != wanted:
        raise ConfigError(
            f"{path} was made for another model ({content.get('model_hash')}, this is {wanted}): run "
            f"`nanodeploy calibrate-kv {spec.folder}` again",
            param="kv_scales",
        )
    try:
        return {int(layer): KVScales(k=s["k"], v=s["v"]) for layer, s in content["layers"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: malformed scales: {error!r}", param="kv_scales") from None


def write_scales(path: Path, spec: ModelSpec, scales: Mapping[int, KVScales], **about: Any) -> None:
    """`about`: what else the file says, for people. Raises OSError."""
    layers = {str(layer): {"k": s.k, "v": s.v} for layer, s in sorted(scales.items())}
    content = {"kv_dtype": FLOAT8, "model_hash": spec.model_hash.hex(), **about, "layers": layers}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _named(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int, str]]:
    for name in tensors:
        for spelling in _SPELLINGS:
            if match := spelling.fullmatch(name):
                yield name, int(match["layer"]), match["part"]


def _read_number(info: TensorInfo) -> float:
    """The one element of a float tensor."""
    if info.shape not in ((), (1,)) or info.dtype not in DTYPE_NAMES:
        raise ConfigError(f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}; a scale is one float")
    with info.file.open("rb") as file:
        file.seek(info.offset)
        raw = file.read(info.nbytes)
    if info.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack({"F64": "<d", "F32": "<f", "F16": "<e"}[info.dtype], raw)[0])
