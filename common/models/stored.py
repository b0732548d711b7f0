"""The tensors of a model as a checkpoint stores them: as they are, or quantised with scales beside them.

    headers -> `assemble`: one `Stored` per tensor of the model, or what is wrong with its parts -> `read` by the loader

A quantised tensor is read a few rows at a time: values times scales in fp32, rounded once, to the type of the target.
So a whole one in floats is never in memory beside the model.

    fp8    X.weight E4M3 [N, K] or [E, N, K]; X.weight_scale_inv, X.weight_scale or X.scale
           [ceil(N / rows), ceil(K / columns)], for a whole tensor one number; X.input_scale, which is not read
    fp4    X.weight bytes [N, K / 2]; the same scales' names [N, K / 32]
    int4   X.weight_packed int32 [N, ceil(K / 8)]; X.weight_scale [N, ceil(K / columns)]; X.weight_shape (N, K)
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ConfigError
from common.layers.quant_spec import WHOLE, QuantSpec
from common.models.checkpoint import DTYPE_NAMES, INDEX_DTYPES, TensorInfo

Part = tuple[slice, ...]
"""A box of a tensor, in whole numbers, one slice per dimension."""

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_BYTES = ("I8", "U8")
_PIECE = 2**15  # elements dequantised at once: they stay in the cache, and torch does not wake threads for so few
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Files:
    """Mapped safetensors files. The two last used stay open: a tensor and its scales may lie in two."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor in the mapped file: pages are read when they are touched. ConfigError if it cannot be had."""
        file = self._open.pop(info.file, None)
        while len(self._open) > 1:
            del self._open[next(iter(self._open))]
        try:
            self._open[info.file] = file or safe_open(info.file, framework="pt", device="cpu")
            tensor: Tensor = self._open[info.file].get_tensor(info.name_in_file)
        except (OSError, SafetensorError) as e:  # a type that safetensors does not know, a file that has gone
            raise ConfigError(f"{info.file}: tensor {info.name_in_file} cannot be read: {e}") from None
        return tensor


class Stored(Protocol):
    """`shape` is the model's. `parts`: what it takes from the files, the first of which says when to read it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> tuple[TensorInfo, ...]: ...

    def is_of(self, *, whole_numbers: bool) -> bool:
        """Whether it holds numbers of that kind."""

    def read(self, files: Files, part: Part) -> Iterator[tuple[Part, Tensor]]:
        """The values of a part, in pieces: where in the part each lies, and its numbers."""


@dataclass(frozen=True)
class Plain:
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    def is_of(self, *, whole_numbers: bool) -> bool:
        return self.info.dtype in (INDEX_DTYPES if whole_numbers else DTYPE_NAMES)

    def read(self, files: Files, part: Part) -> Iterator[tuple[Part, Tensor]]:
        yield (slice(None),) * len(part), files.view(self.info)[part]


@dataclass(frozen=True)
class Scaled:
    """Values of a few bits, `per_word` to a stored element along the last dimension, and a scale per `block`."""

    values: TensorInfo
    scales: TensorInfo
    shape: tuple[int, ...]
    block: tuple[int, int]
    per_word: int = 1
    others: tuple[TensorInfo, ...] = ()

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.values, self.scales, *self.others)

    def is_of(self, *, whole_numbers: bool) -> bool:
        return not whole_numbers

    def read_scales(self, files: Files) -> Tensor:
        return files.view(self.scales).view(_grid(self.shape, self.block))

    def read(self, files: Files, part: Part) -> Iterator[tuple[Part, Tensor]]:
        values, scales = files.view(self.values), self.read_scales(files)
        *lead, rows, columns = part
        step = max(1, _PIECE // max(1, columns.stop - columns.start))
        for place in itertools.product(*(range(s.start, s.stop) for s in lead)):
            here = tuple(slice(i - s.start, i - s.start + 1) for i, s in zip(place, lead, strict=True))
            for first in range(rows.start, rows.stop, step):
                some = slice(first, min(rows.stop, first + step))
                got = _unpacked(values[place][some], columns, self.per_word)
                got = got * _spread(scales[place], (some, columns), self.block)
                piece = (*here, slice(some.start - rows.start, some.stop - rows.start), slice(None))
                yield piece, got[(None,) * len(lead)]


def _unpacked(words: Tensor, columns: slice, per_word: int) -> Tensor:
    """fp32 values of some columns of stored rows, by tables of all that a byte can mean (torch's casts are slow)."""
    first = columns.start // per_word
    some = words[:, first : -(-columns.stop // per_word)].contiguous().view(torch.uint8)
    table = _tables()[per_word]
    values = table.index_select(0, some.flatten().int()).view(torch.float32).view(words.shape[0], -1)
    return values[:, columns.start - first * per_word : columns.stop - first * per_word]


@functools.cache
def _tables() -> dict[int, Tensor]:
    """By values per stored element, [256]: a float32, or a pair of them, first the low half's, as one float64."""
    codes = torch.arange(256, dtype=torch.uint8)
    halves = torch.stack((codes & 15, codes >> 4), 1).int()
    e2m1 = torch.tensor((*_E2M1, *(-value for value in _E2M1)))
    pairs = {2: e2m1[halves], 8: (halves - 8).float()}
    return {1: codes.view(torch.float8_e4m3fn).float()} | {n: p.view(torch.float64)[:, 0] for n, p in pairs.items()}


def _spread(scales: Tensor, part: tuple[slice, slice], block: tuple[int, int]) -> Tensor:
    """fp32 scales of each element of a part of the tensor."""
    for dim, (some, size) in enumerate(zip(part, block, strict=True)):
        first = some.start // size
        scales = scales.narrow(dim, first, -(-some.stop // size) - first).float()
        if size > 1:
            scales = scales.repeat_interleave(min(size, some.stop - first * size), dim)
        scales = scales.narrow(dim, some.start - first * size, some.stop - some.start)
    return scales


@dataclass
class Assembled:
    """The model's tensors by name; those that are `broken`, by name, and what is wrong with them."""

    stored: dict[str, Stored]
    broken: dict[str, str]


def assemble(tensors: Mapping[str, TensorInfo], quant: QuantSpec | None) -> Assembled:
    """Put quantised tensors and their scales together; everything else is what it is."""
    out = Assembled({}, {})
    if quant is None:
        found: Iterable[_Found] = ()
    else:
        found = _int4(tensors, quant) if quant.method == "int4" else _fp8(tensors, quant)
    taken: set[str] = set()
    for name, parts, scaled in found:
        taken.update(part.name for part in parts)
        if isinstance(scaled, Scaled):
            out.stored[name] = scaled
        else:
            out.broken[name] = scaled
    out.stored |= {name: Plain(info) for name, info in tensors.items() if name not in taken}
    return out


_Found = tuple[str, Sequence[TensorInfo], Scaled | str]
"""The model's name of a tensor, what of the files belongs to it, and the tensor or what is wrong with it."""


def _fp8(tensors: Mapping[str, TensorInfo], quant: QuantSpec) -> Iterator[_Found]:
    for name, info in tensors.items():
        is_fp4 = quant.fp4_experts and info.dtype in _BYTES and ".experts." in name
        if len(info.shape) < 2 or not (is_fp4 or info.dtype == "F8_E4M3"):
            continue
        per_word, block = (2, quant.block_fp4) if is_fp4 else (1, quant.block)
        shape = (*info.shape[:-1], info.shape[-1] * per_word)
        module = name.removesuffix(".weight")
        names = [f"{name}_scale_inv", f"{name}_scale", f"{module}.scale"]
        scales = next((tensors[n] for n in names if n in tensors), None)
        if scales is None:
            yield name, (info,), f"missing: {names[0]} {list(_grid(shape, block))}"
        else:
            others = tuple(tensors[n] for n in (f"{module}.input_scale",) if n in tensors)
            wrong = _excluded(info, quant) or _misfit(scales, shape, block)
            yield name, (info, scales, *others), wrong or Scaled(info, scales, shape, block, per_word, others)


def _int4(tensors: Mapping[str, TensorInfo], quant: QuantSpec) -> Iterator[_Found]:
    packed = {n.removesuffix("_packed"): info for n, info in tensors.items() if n.endswith(".weight_packed")}
    shapes = _read_shapes(tensors[n] for n in (f"{name}_shape" for name in packed) if n in tensors)
    for name, info in packed.items():
        parts = [tensors[n] for n in (info.name, f"{name}_scale", f"{name}_shape") if n in tensors]
        shape = shapes.get(f"{name}_shape")
        missing = [n for n in (f"{name}_scale", f"{name}_shape") if n not in tensors]
        if missing:
            yield name, parts, f"missing: {' and '.join(missing)}"
        elif shape is None:
            yield name, parts, f"of the wrong type: {name}_shape is not two whole numbers"
        elif info.dtype != "I32":
            yield name, parts, f"of the wrong type: {info.name} is {info.dtype}"
        elif info.shape != (shape[0], -(-shape[1] // 8)):
            yield name, parts, f"misshapen: {info.name} is {list(info.shape)}, {name}_shape says {list(shape)}"
        elif name in tensors:
            yield name, (*parts, tensors[name]), f"twice: {name} and {info.name}"
        else:
            wrong = _excluded(info, quant) or _misfit(parts[1], shape, quant.block)
            yield name, parts, wrong or Scaled(info, parts[1], shape, quant.block, 8, (parts[2],))


def modules_of(info: TensorInfo) -> tuple[str, str]:
    """The module that a weight belongs to, by its names here and in the checkpoint."""
    ours, theirs = (re.sub(r"\.weight(_packed)?$", "", name) for name in (info.name, info.name_in_file))
    return ours, theirs


def _excluded(info: TensorInfo, quant: QuantSpec) -> str:
    """What is wrong with a quantised tensor whose module is not to be, or nothing."""
    if not quant.is_ignored(*modules_of(info)):
        return ""
    return f"quantised: {info.name}, which quantization_config.{quant.ignored_by} excludes"


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _misfit(scales: TensorInfo, shape: tuple[int, ...], block: tuple[int, int]) -> str:
    """What is wrong with the scales of a tensor, or nothing."""
    want = _grid(shape, block)
    of_rows = want[:-1] if block[1] == WHOLE else want
    short = of_rows[:-1] if block[0] == WHOLE else of_rows
    if scales.shape not in (want, of_rows, short):
        blocks = f"blocks of {block[0]} x {block[1]} want {list(want)}"
        return f"misshapen: {scales.name} is {list(scales.shape)}, {blocks}"
    return "" if scales.dtype in _SCALE_DTYPES else f"of the wrong type: {scales.name} is {scales.dtype}"


def _read_shapes(infos: Iterable[TensorInfo]) -> dict[str, tuple[int, int]]:
    """The two numbers in each of these small tensors; those of another type or shape are left out."""
    out: dict[str, tuple[int, int]] = {}
    fits = [i for i in infos if i.shape == (2,) and i.dtype in INDEX_DTYPES]
    for path, some in itertools.groupby(sorted(fits, key=lambda i: (str(i.file), i.offset)), key=lambda i: i.file):
        with path.open("rb") as file:
            for info in some:
                raw = os.pread(file.fileno(), info.nbytes, info.offset)
                half = info.nbytes // 2
                out[info.name] = (
                    int.from_bytes(raw[:half], "little", signed=True),
                    int.from_bytes(raw[half:], "little", signed=True),
                )
    return out


def box(shape: Sequence[int], dim: int, start: int, length: int) -> Part:
    """All of a tensor but in dimension `dim`: `length` from `start` on."""
    return tuple(slice(start, start + length) if i == dim else slice(0, n) for i, n in enumerate(shape))
