"""Scales of an 8-bit KV cache, measured: what a model writes into its cache while it reads some text.

A layer's scale is the largest magnitude of its keys (values) over the largest number of float8_e4m3fn. Keys are seen as
they are stored, turned by their positions. Any model whose cache holds keys and values of heads can be measured; other
regions it may have are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.attention.context import AttentionBackend, GroupTables
from common.errors import ConfigError
from common.kvcache.pool import KVPool
from common.kvcache.scales import LARGEST, KVScales
from common.models.spec import ModelSpec


class KVMeter:
    """A backend that remembers the largest magnitudes written per layer, and leaves the work to another one."""

    def __init__(self, spec: ModelSpec, backend: AttentionBackend, pool: KVPool) -> None:
        """ConfigError if the cache holds no keys and values of heads, or is an 8-bit one already."""
        regions = [r for r in spec.cache.regions if r.holds_kv]
        if not regions:
            raise ConfigError(f"{spec.model_type} has no keys and values of heads in its cache", param="model")
        if any(pool.scales(r.name) is not None for r in regions):
            raise ConfigError("scales are measured with a KV cache of the model's own dtype", param="kv_dtype")
        self.backend = backend
        self._layers = {
            pool.region(r.name)[:, index].data_ptr(): layer for r in regions for index, layer in enumerate(r.layers)
        }
        self._largest: dict[int, Tensor] = {layer: torch.zeros(2) for layer in self._layers.values()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def write(
        self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables, scales: KVScales | None = None
    ) -> None:
        """Store new keys and values, and measure them."""
        largest = self._largest[self._layers[cache.data_ptr()]]
        torch.maximum(largest, torch.stack([k_TUD.abs().amax(), v_TUD.abs().amax()]).float().cpu(), out=largest)
        self.backend.write(k_TUD, v_TUD, cache, tables, scales)

    def scales(self) -> Mapping[int, KVScales]:
        """By layer. A layer that wrote nothing but zeros gets 1; ConfigError for one that wrote what is no number."""
        found = {}
        for layer, (k, v) in ((layer, pair.tolist()) for layer, pair in self._largest.items()):
            try:
                found[layer] = KVScales(k=k / LARGEST or 1.0, v=v / LARGEST or 1.0)
            except ValueError as error:
                raise ConfigError(f"layer {layer} cannot be measured: {error}", param="model") from None
        return found
