"""Scales of an 8-bit KV cache, measured: what a model writes into its cache, and asks of it, while it reads some text.

A layer's scale is at least its largest key (value) over the largest number of float8_e4m3fn, so that none is cut off.
Of the scales up to twice that, which all hold the same range, the best is taken: numbers of a key that hardly differ
from token to token are rounded alike every time, and well or badly as the scale has it. `STEPS` candidates are judged
by the square of what rounding adds to a score, q . (stored * scale - k), summed over the queries and keys of a layer,
less what it adds for all keys alike, which changes no weight; values by the square of their error. Measured on SmolLM2,
whose perplexity suffers by 1.6 to 2.6 % with the least scales and by -0.2 to 1.5 % with the best ones, by machine.

Keys are seen as they are stored, turned by their positions. Any model whose cache holds keys and values of heads can be
measured; other regions it may have are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext, GroupTables
from common.errors import ConfigError
from common.kvcache.pool import KVPool
from common.kvcache.scales import LARGEST, KVScales
from common.models.spec import ModelSpec

STEPS = 32  # candidates between a scale and its double


@dataclass
class _Measured:
    """Of keys or of values of one layer. `errors`: of each candidate, a power of two times 2 ** (index / STEPS)."""

    largest: float = 0.0
    errors: Tensor = field(default_factory=lambda: torch.zeros(STEPS, dtype=torch.float64))

    def scale(self) -> float:
        """ValueError where something measured was no number."""
        if not math.isfinite(self.largest):
            raise ValueError(f"the largest number is {self.largest}")
        least = self.largest / LARGEST
        return _fit(int(self.errors.argmin()), least) if least else 1.0


class KVMeter:
    """A backend that measures the keys and values of each layer, and leaves the work to another one."""

    plain_writes = False

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
        self._measured = {layer: (_Measured(), _Measured()) for layer in self._layers.values()}
        self._keys: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def write(
        self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables, scales: KVScales | None = None
    ) -> None:
        """Store new keys and values, and measure the values."""
        layer = self._layers.get(cache.data_ptr())
        if layer is not None:
            keys, values = self._measured[layer]
            for measured, rows in ((keys, k_TUD), (values, v_TUD)):
                largest = rows.abs().amax().item()
                measured.largest = max(measured.largest, math.inf if math.isnan(largest) else largest)
            values.errors += _errors(v_TUD.float(), lambda off_TUD: off_TUD.square().sum())
            self._keys[layer] = k_TUD.float()
        self.backend.write(k_TUD, v_TUD, cache, tables, scales)

    def attend(
        self,
        q_THD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        scales: KVScales | None = None,
    ) -> Tensor:
        """Attend, and measure the keys that this step wrote by its queries."""
        layer = self._layers.get(cache.data_ptr())
        if layer is not None:
            k_TUD = self._keys.pop(layer)
            num_tokens, units, width = k_TUD.shape
            q_UND = q_THD.float().view(num_tokens, units, -1, width).transpose(0, 1).reshape(units, -1, width)
            of_queries_UDD = q_UND.mT @ q_UND

            def judge(off_TUD: Tensor) -> Tensor:
                off_UTD = (off_TUD - off_TUD.mean(0)).transpose(0, 1)
                return (of_queries_UDD * (off_UTD.mT @ off_UTD)).sum()

            self._measured[layer][0].errors += _errors(k_TUD, judge)
        return self.backend.attend(q_THD, cache, tables, ctx, scale, scales)

    def scales(self) -> Mapping[int, KVScales]:
        """By layer. One that wrote nothing but zeros gets 1; ConfigError for one that wrote what is no number."""
        found = {}
        for layer, (keys, values) in self._measured.items():
            try:
                found[layer] = KVScales(k=keys.scale(), v=values.scale())
            except ValueError as error:
                raise ConfigError(f"layer {layer} cannot be measured: {error}", param="model") from None
        return found


def _fit(index: int, least: float) -> float:
    """The candidate's smallest scale that is at least `least`."""
    step = math.exp2(index / STEPS)
    scale = math.ldexp(step, math.ceil(math.log2(least / step)))
    return scale if scale >= least else 2 * scale


def _errors(x_TUD: Tensor, judge: Callable[[Tensor], Tensor]) -> Tensor:
    """What `judge` says of the errors that each candidate makes: float64 [STEPS]."""
    least = x_TUD.abs().amax().item() / LARGEST
    out = torch.zeros(STEPS, dtype=torch.float64)
    if least and math.isfinite(least):
        for index in range(STEPS):
            scale = _fit(index, least)
            stored_TUD = (x_TUD / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            out[index] = judge(stored_TUD.float().mul_(scale).sub_(x_TUD))
    return out
