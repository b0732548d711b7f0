"""Is a checkpoint an embedding model, by the files that sentence-transformers reads? No torch.

    modules.json: its modules, in order -> 1_Pooling/config.json: which rows -> Normalize: to length 1, or not

Of a decoder the last token has seen all others, so its hidden row is the text's vector. A checkpoint that pools
otherwise, or goes on with further layers, is a ConfigError: its vectors would be other ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.models.checkpoint import read_json
from common.models.config_reader import ConfigReader

MODULES_FILE = "modules.json"
LAST_TOKEN = "lasttoken"
_MODE_FLAG = "pooling_mode_"


@dataclass(frozen=True)
class PoolingSpec:
    """Vectors of `size` elements: the final norm's row of the last token; `normalizes`: scaled to length 1."""

    size: int
    normalizes: bool


def find_pooling(folder: Path, runner: str, hidden_size: int) -> PoolingSpec | None:
    """None for a model that generates. `runner`: auto goes by the folder, pooling makes any model an embedding model
    (by vLLM's rule, the last token and normalised, where the folder does not say how), generate makes it none.

    ConfigError names what of the folder's modules is not supported.
    """
    if runner == "generate":
        return None
    path = folder / MODULES_FILE
    if not path.is_file() and runner == "auto":
        return None
    _check_causal(folder / "config.json")
    if not path.is_file():
        return PoolingSpec(hidden_size, normalizes=True)
    normalizes = pools = False
    for kind, module_path in _modules(path):
        if kind == "Pooling":
            pools = True
            _check_pooling(folder / module_path / "config.json", hidden_size)
        elif kind == "Normalize":
            normalizes = True
        elif kind != "Transformer":
            raise ConfigError(f"{path}: module {kind} is not supported; there are Transformer, Pooling and Normalize")
    if not pools:
        raise ConfigError(f"{path} has no module Pooling: which row is the vector is not known")
    return PoolingSpec(hidden_size, normalizes)


def _check_causal(path: Path) -> None:
    """Some embedding models are decoders whose tokens see those behind them, too."""
    config = ConfigReader(path, read_json(path))
    for field, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        if config.values.get(field) not in (None, causal):
            raise config.error(field, f"is {config.values[field]}: attention to later tokens is not supported")


def _modules(path: Path) -> list[tuple[str, str]]:
    """(class, folder) of each module."""
    try:
        found: Any = json.loads(path.read_bytes())
        modules = [(str(one["type"]).rsplit(".", 1)[-1], str(one["path"])) for one in found]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    outside = next((place for _, place in modules if place and Path(place).name != place), None)
    if outside is not None:
        raise ConfigError(f"{path} names a folder outside of its own: {outside!r}")
    return modules


def _check_pooling(path: Path, hidden_size: int) -> None:
    config = ConfigReader(path, read_json(path))
    named = config.values.get("pooling_mode")  # newer files have one name, older ones a flag for each mode
    flags = [key.removeprefix(_MODE_FLAG) for key, on in config.values.items() if key.startswith(_MODE_FLAG) and on]
    modes = flags if named is None else [named]
    if modes != [LAST_TOKEN]:
        shown = ", ".join(map(str, modes)) or "no mode"
        raise config.error("pooling_mode", f"is {shown}; supported is {LAST_TOKEN}: the last token's row")
    width = config.integer("word_embedding_dimension", config.values.get("embedding_dimension", hidden_size))
    if width != hidden_size:
        raise config.error("word_embedding_dimension", f"is {width}, the model's hidden size is {hidden_size}")
