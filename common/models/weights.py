"""Fill a model's tensors: all of them, with nothing left over, or not at all.

    names and shapes checked against the headers -> copied tensor by tensor, straight into the packed place

A wrong checkpoint is one ConfigError that lists everything wrong with it, raised before any weight is read.
Files are mapped and read in their own order; beside the model itself only pages of the one tensor in hand
are touched.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.attention.context import DTYPES
from common.errors import ConfigError
from common.layers.base import Build, Init, Slot, TensorParallel
from common.models.checkpoint import DTYPE_NAMES, TensorInfo, read_index
from common.models.decoder import DecoderModel
from common.models.registry import model_class
from common.models.spec import ModelSpec

Progress = Callable[[str, int, int], None]
"""(tensor name, bytes done, bytes in all), after each tensor."""

_DUMMY_STD = 0.02
_MAX_LISTED = 40


def load_model(
    spec: ModelSpec,
    *,
    dtype: str,
    device: torch.device,
    max_positions: int = 0,
    tp: TensorParallel | None = None,
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> DecoderModel:
    """The model with its weights in place, ready for `forward` under inference mode.

    `max_positions`: 0 takes the checkpoint's. `load_format`: auto reads the folder's safetensors, dummy draws
    weights from `seed`. ConfigError lists all that is wrong with the checkpoint.
    """
    build = Build(DTYPES[dtype], device, tp or TensorParallel())
    try:
        model = model_class(spec.model_type)(spec, build, max_positions or spec.max_position_embeddings)
    except ValueError as e:
        raise ConfigError(f"{spec.model_type} cannot be split over {build.tp.size} ranks: {e}") from None
    if load_format == "dummy":
        draw_weights(model, seed)
    else:
        load_weights(model, read_index(spec.folder), progress)
    return model


@torch.inference_mode()
def load_weights(model: DecoderModel, tensors: Mapping[str, TensorInfo], progress: Progress | None = None) -> None:
    """Copy every tensor of `tensors` into its slots. ConfigError if names, shapes or dtypes do not match exactly."""
    slots = list(model.slots())
    _check(slots, tensors, model.ignored)
    todo = sorted((s for s in slots if s.name in tensors), key=lambda s: _place(tensors[s.name], s))
    total = sum(tensors[s.name].nbytes for s in todo)
    done = 0
    files: dict[Path, Any] = {}
    for slot in todo:
        info = tensors[slot.name]
        if info.file not in files:
            files.clear()
            files[info.file] = safe_open(info.file, framework="pt", device="cpu")
        _fill(slot, files[info.file])
        done += info.nbytes
        if progress is not None:
            progress(slot.name, done, total)


@torch.inference_mode()
def draw_weights(model: DecoderModel, seed: int) -> None:
    """Random weights that depend on seed, tensor name and shape alone: ranks draw the same and keep their part."""
    for slot in model.slots():
        if slot.twin:
            continue
        if slot.init is not Init.NORMAL:
            slot.target.fill_(1.0 if slot.init is Init.ONES else 0.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {slot.name}".encode()))
        whole = torch.empty(slot.shape, dtype=torch.float32).normal_(0.0, _DUMMY_STD, generator=generator)
        slot.target.copy_(whole.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))


def _place(info: TensorInfo, slot: Slot) -> tuple[bool, str, int]:
    """Order of reading: twins after what they repeat, else as the bytes lie."""
    return slot.twin, str(info.file), info.offset


def _fill(slot: Slot, file: Any) -> None:
    length = slot.target.shape[slot.dim]
    if length == slot.shape[slot.dim]:
        part = file.get_tensor(slot.name)
    else:
        rows = slice(slot.start, slot.start + length)
        part = file.get_slice(slot.name)[(slice(None),) * slot.dim + (rows,)]
    if not slot.twin:
        slot.target.copy_(part)
    elif not torch.equal(slot.target, part.to(slot.target.device, slot.target.dtype)):
        raise ConfigError(f"{slot.name} differs from the embedding that config.json says it is tied to")


def _check(slots: list[Slot], tensors: Mapping[str, TensorInfo], ignored: tuple[str, ...]) -> None:
    wrong: list[str] = []
    wanted = {s.name: s for s in slots}
    assert len(wanted) == len(slots), "two slots of one name"
    for slot in slots:
        info = tensors.get(slot.name)
        if info is None:
            if not slot.twin:
                wrong.append(f"missing: {slot.name} {list(slot.shape)}")
        elif info.shape != slot.shape:
            wrong.append(f"misshapen: {slot.name} is {list(info.shape)}, the config wants {list(slot.shape)}")
        elif info.dtype not in DTYPE_NAMES:
            wrong.append(f"of the wrong type: {slot.name} is {info.dtype}")
    skip = re.compile("|".join(ignored)) if ignored else None
    for name in tensors:
        if name not in wanted and not (skip and skip.fullmatch(name)):
            wrong.append(f"unknown: {name} {list(tensors[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        raise ConfigError("checkpoint does not match its config.json: " + "; ".join(wrong[:_MAX_LISTED]) + more)
