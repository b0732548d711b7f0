"""A checkpoint folder as an index: which tensor lies in which file. Headers are read, weights are not.

A safetensors file is: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, byte range
after the header), the bytes. A folder holds either `model.safetensors` or shards with an index file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDEX_DTYPES = ("I64", "I32")
BODY_PREFIX = "model."
BARE_NAME = "embed_tokens.weight"

_WIDTHS = {8: ("F64", "I64", "U64"), 4: ("F32", "I32", "U32"), 2: ("F16", "BF16", "I16", "U16")}
_BYTES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
_ITEM_NBYTES = {name: n for n, names in (*_WIDTHS.items(), (1, _BYTES)) for name in names}
_MAX_HEADER_NBYTES = 100 * 2**20
_MAX_SAMPLES = 1024
_SAMPLE_NBYTES = 256


@dataclass(frozen=True)
class TensorInfo:
    """`offset` and `nbytes` are byte positions in `file`. `dtype` is safetensors' word (BF16, F32 ...).

    `stored_as`: what the file calls it, where `name` is the model's word for it.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stored_as: str = ""

    @property
    def name_in_file(self) -> str:
        return self.stored_as or self.name


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. ConfigError if it is missing or malformed."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return value


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, by name.

    A model that was saved without its head, as embedding models are, has names without `model.`; they get it.
    ConfigError: no safetensors, a shard that is missing, truncated or malformed, a tensor in two shards, or an
    index that disagrees with its shards.
    """
    found = _read_files(folder)
    if BARE_NAME not in found or any(name.startswith(BODY_PREFIX) for name in found):
        return found
    renamed = ((name if name.startswith("lm_head.") else BODY_PREFIX + name, info) for name, info in found.items())
    return {name: replace(info, name=name, stored_as=info.name) for name, info in renamed}


def _read_files(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE_FILE).is_file():
        return _read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise ConfigError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    placed = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(f, str) for f in placed.values()):
        raise ConfigError(f"{folder / INDEX_FILE} has no weight_map of tensor names to file names")
    out: dict[str, TensorInfo] = {}
    for file_name in sorted(set(placed.values())):
        if Path(file_name).name != file_name:
            raise ConfigError(f"{folder / INDEX_FILE} names a file outside of its folder: {file_name!r}")
        for name, info in _read_header(folder / file_name).items():
            if name in out:
                raise ConfigError(f"tensor {name} is in both {out[name].file.name} and {file_name}")
            out[name] = info
    wrong = sorted(n for n in placed.keys() | out.keys() if n not in out or placed.get(n) != out[n].file.name)
    if wrong:
        raise ConfigError(f"{folder / INDEX_FILE} and its shards disagree about: {', '.join(wrong[:10])}")
    return out


def content_hash(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bytes:
    """16 bytes that tell models apart: config, tensor names, dtypes, shapes, and a few bytes of content.

    Two fine-tunes of one base agree in all but their values, and must not share KV, so 256 bytes from the middle
    of each tensor (of at most 1024 tensors, evenly spread) go in as well. Takes milliseconds.
    """
    h = hashlib.blake2b(digest_size=16)
    h.update(json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    names = sorted(tensors)
    for name in names:
        t = tensors[name]
        h.update(f"\n{name} {t.dtype} {t.shape} {t.nbytes}".encode())
    step = max(1, math.ceil(len(names) / _MAX_SAMPLES))
    handles: dict[Path, int] = {}
    try:
        for name in names[::step]:
            t = tensors[name]
            if t.file not in handles:
                handles[t.file] = os.open(t.file, os.O_RDONLY)
            length = min(_SAMPLE_NBYTES, t.nbytes)
            h.update(os.pread(handles[t.file], length, t.offset + (t.nbytes - length) // 2))
    finally:
        for fd in handles.values():
            os.close(fd)
    return h.digest()


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Whatever the library that maps the bytes later would not take is an error now."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            header_nbytes = int.from_bytes(f.read(8), "little")
            if size < 8 or not 0 < header_nbytes <= min(size - 8, _MAX_HEADER_NBYTES):
                raise ConfigError(f"{path} is not a safetensors file, or it is cut short")
            header = json.loads(f.read(header_nbytes).decode())
            json.dumps(header, ensure_ascii=False).encode()  # lone surrogates are no text
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConfigError(f"{path}: __metadata__ is not an object of texts")
    start = 8 + header_nbytes
    out = {name: _tensor_info(path, name, entry, start, size) for name, entry in header.items()}
    end = start
    for info in sorted(out.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            raise ConfigError(f"{path}: tensor {info.name} begins at byte {info.offset}, the one before ends at {end}")
        end = info.offset + info.nbytes
    if end != size:
        raise ConfigError(f"{path} goes on after its last tensor: {size - end} bytes")
    return out


def _tensor_info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """An entry of a header. `start`: of the tensors' bytes in the file; `size`: of the file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path}: malformed entry for tensor {name}: {e!r}") from None
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ConfigError(f"{path}: malformed entry for tensor {name}: {entry!r}")
    if not begin <= end or start + end > size:
        raise ConfigError(f"{path} is cut short: tensor {name} ends at byte {start + end} of {size}")
    if dtype in _ITEM_NBYTES and math.prod(shape) * _ITEM_NBYTES[dtype] != end - begin:
        raise ConfigError(f"{path}: tensor {name} has {end - begin} bytes, its shape needs another number")
    return TensorInfo(name, path, dtype, shape, start + begin, end - begin)
