"""A checkpoint's config.json, read once into one frozen dataclass; and the KV cache that follows from it.

No torch. Anything in the config that this build would compute wrongly is a ConfigError here, before a byte of
weights is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.layers.rope_spec import RopeSpec, yarn_mscale
from common.models.checkpoint import DTYPE_NAMES, TensorInfo, content_hash, read_index, read_json
from common.models.registry import family

_NOT_HASHED = {"transformers_version", "_name_or_path", "use_cache", "torch_dtype", "dtype"}
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """`windows[i]`: tokens that a query of layer i sees, itself included; 0 is all.

    `dtype`: the checkpoint's own. `model_hash`: 16 bytes, see `common.models.checkpoint.content_hash`.
    """

    folder: Path
    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    windows: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    model_hash: bytes

    @classmethod
    def from_folder(cls, path: str | Path, *, weights: bool = True) -> ModelSpec:
        """Read a Hugging Face folder. `weights=False` needs no weight files (load_format dummy).

        ConfigError names the file and the field at fault.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"model folder {folder} does not exist", param="model")
        config = _Config(folder / "config.json", read_json(folder / "config.json"))
        tensors = read_index(folder) if weights else {}
        return _spec(folder, config, tensors)


class _Config:
    """config.json with errors that name the file and the field."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def error(self, field: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {field} {why}", param=field)

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.values.get(field)
        if value is None:
            value = default
        if value is None:
            raise self.error(field, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, f"must be a positive integer, got {value!r}")
        return value

    def number(self, field: str, default: float) -> float:
        value = self.values.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(field, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.values.get(field, False)
        if not isinstance(value, bool):
            raise self.error(field, f"must be true or false, got {value!r}")
        return value


def _spec(folder: Path, config: _Config, tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str):
        raise config.error("model_type", "is missing")
    has_windows = family(model_type).has_windows
    _refuse_unknown(config)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads")
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers")
    head_dim = config.integer("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise config.error("head_dim", f"must be even, got {head_dim}")
    hashed = {k: v for k, v in config.values.items() if k not in _NOT_HASHED}
    return ModelSpec(
        folder=folder,
        model_type=model_type,
        architecture=next(iter(config.values.get("architectures") or ()), model_type),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_rope(config),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
        windows=_windows(config, num_layers) if has_windows else (0,) * num_layers,
        eos_token_ids=_eos(folder, config),
        bos_token_id=config.values.get("bos_token_id"),
        dtype=_dtype(config, tensors),
        model_hash=content_hash(hashed, tensors),
    )


def _refuse_unknown(config: _Config) -> None:
    """Features that change the numbers and that no family here has."""
    act = config.values.get("hidden_act", "silu")
    if act != "silu":
        raise config.error("hidden_act", f"{act!r} is not supported; supported is: silu")
    if config.values.get("quantization_config"):
        raise config.error("quantization_config", "is set: quantized checkpoints are not supported")
    if config.values.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise config.error("partial_rotary_factor", "other than 1 is not supported")


def _windows(config: _Config, num_layers: int) -> tuple[int, ...]:
    """Sliding windows by layer: an explicit `layer_types`, or the layers from `max_window_layers` on."""
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window") else 0
    layer_types = config.values.get("layer_types")
    if layer_types is None:
        first = config.values.get("max_window_layers", 28)
        return tuple(window if window and i >= first else 0 for i in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise config.error("layer_types", f"must list {num_layers} layers")
    unknown = sorted({str(t) for t in layer_types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise config.error("layer_types", f"{unknown} is not supported; full_attention and sliding_attention are")
    if "sliding_attention" in layer_types and not window:
        raise config.error("layer_types", "has sliding layers, but use_sliding_window is not set")
    return tuple(window if t == "sliding_attention" else 0 for t in layer_types)


def _rope(config: _Config) -> RopeSpec:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    field = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    values = config.values.get(field) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise config.error(field, "must be one flat set of parameters for all layers")
    rope = _Config(config.path, {"rope_theta": config.values.get("rope_theta", 10000.0), **values})
    rope_type = values.get("rope_type", values.get("type", "default"))
    positions = config.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", positions)
    theta = rope.number("rope_theta", 10000.0)
    if rope.values.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise config.error(f"{field}.partial_rotary_factor", "other than 1 is not supported")
    if rope_type == "default":
        return RopeSpec(theta=theta)
    if rope_type == "yarn" and values.get("factor") is None:
        rope.values["factor"] = positions / original
    if rope_type not in ("linear", "llama3", "yarn"):
        raise config.error(field, f"rope type {rope_type!r} is not supported; default, linear, llama3 and yarn are")
    for name in ("factor", *(("low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ())):
        if name not in rope.values:
            raise config.error(f"{field}.{name}", "is missing")
    factor = rope.number("factor", 1.0)
    if rope_type == "linear":
        return RopeSpec("linear", theta, factor)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
        return RopeSpec("llama3", theta, factor, original, low, high)
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        attention_factor=_yarn_attention(values, factor),
        truncate=bool(values.get("truncate", True)),
    )


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor)


def _eos(folder: Path, config: _Config) -> tuple[int, ...]:
    """Every id that ends a text, by config.json or generation_config.json."""
    path = folder / "generation_config.json"
    found: set[int] = set()
    for values in (config.values, read_json(path) if path.is_file() else {}):
        ids = values.get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise config.error("eos_token_id", f"must be an integer or a list of them, got {ids!r}")
            found.add(token_id)
    return tuple(sorted(found))


def _dtype(config: _Config, tensors: Mapping[str, TensorInfo]) -> str:
    """The config's word, else the type that most of the weights have."""
    named = config.values.get("dtype") or config.values.get("torch_dtype")
    if named is None:
        count: Counter[str] = Counter()
        for t in tensors.values():
            count[DTYPE_NAMES.get(t.dtype, t.dtype)] += t.nbytes
        named = count.most_common(1)[0][0] if count else "float32"
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise config.error("dtype", f"{name} is not supported; supported are: {', '.join(_DTYPES)}")
    return name
