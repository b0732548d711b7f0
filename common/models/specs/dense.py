"""Readers of Llama (`llama`) and Qwen3 dense (`qwen3`). No torch."""

from __future__ import annotations

from dataclasses import replace

from common.models.cache_spec import attention_cache
from common.models.config_reader import ConfigReader
from common.models.rope_config import refuse_partial
from common.models.spec import ModelSpec, SpecSource, base_spec

_WINDOW = 4096  # where a config that slides names none


def read_llama(source: SpecSource) -> ModelSpec:
    refuse_partial(source.config)
    spec = base_spec(source)
    return replace(spec, cache=attention_cache((0,) * spec.num_layers, spec.num_kv_heads, spec.head_dim))


def read_qwen3(source: SpecSource) -> ModelSpec:
    """Llama's, and the config may make layers look at a sliding window only."""
    refuse_partial(source.config)
    spec = base_spec(source)
    windows = read_windows(source.config, spec.num_layers)
    return replace(spec, cache=attention_cache(windows, spec.num_kv_heads, spec.head_dim))


def read_windows(config: ConfigReader, num_layers: int, first: int | None = None) -> tuple[int, ...]:
    """Sliding windows by layer: an explicit `layer_types`, or the layers from `first` on; 0 is none.

    `first`: None is the config's `max_window_layers`.
    """
    slides = config.flag("use_sliding_window") and config.values.get("sliding_window", _WINDOW) is not None
    window = config.integer("sliding_window", _WINDOW) if slides else 0
    layer_types = config.layer_types(num_layers, ("full_attention", "sliding_attention"))
    if layer_types is None:
        start = config.integer("max_window_layers", 28, least=0) if first is None else first
        return tuple(window if i >= start else 0 for i in range(num_layers))
    if "sliding_attention" in layer_types and not window:
        raise config.error("layer_types", "has sliding layers, but use_sliding_window is not set")
    return tuple(window if t == "sliding_attention" else 0 for t in layer_types)
