"""Numbers of DeepSeek-V4's attention and of its residual streams, as plain data (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.layers.rope_spec import RopeSpec

LayerKind = Literal["window", "sparse", "heavy"]

WINDOW_ROWS = "v4_window"
SPARSE_ENTRIES, SPARSE_KEYS, SPARSE_INPUT = "v4_csa", "v4_csa_index_key", "v4_csa_input"
HEAVY_ENTRIES, HEAVY_INPUT = "v4_hca", "v4_hca_input"
"""Regions of the cache: rows per token in a window, compressed entries, and what compressors still need of tokens."""


@dataclass(frozen=True)
class CompressSpec:
    """Attention over a window and over compressed entries (DeepSeek-V4, section 2.3).

    Every layer sees the last `window` tokens. A `sparse` one (CSA) has an entry per `sparse_ratio` tokens, pooled from
    twice as many, of which a query sees the `index_topk` best; a `heavy` one (HCA) an entry per `heavy_ratio` tokens,
    all seen; `kinds` is by layer. An entry exists from its last token on.

    The last `rope_dim` elements of a head turn: by the model's rotation in window layers, by `rope` in the others.
    Queries come from a latent of `q_rank`; heads go out through `out_groups` groups, each `out_rank` wide.
    """

    kinds: tuple[LayerKind, ...]
    window: int
    sparse_ratio: int
    heavy_ratio: int
    rope_dim: int
    rope: RopeSpec
    q_rank: int
    out_groups: int
    out_rank: int
    index_heads: int
    index_dim: int
    index_topk: int

    def ratio(self, layer_idx: int) -> int:
        """Tokens of an entry, 0 without entries."""
        return {"window": 0, "sparse": self.sparse_ratio, "heavy": self.heavy_ratio}[self.kinds[layer_idx]]


@dataclass(frozen=True)
class StreamSpec:
    """Manifold-constrained hyper-connections (DeepSeek-V4, section 2.2): `count` residual streams.

    `steps` of Sinkhorn and Knopp, with `eps` in them.
    """

    count: int
    steps: int
    eps: float


def row_width(entry_width: int, ratio: int) -> int:
    """Elements per token of a region of entries: the rows of `ratio` tokens hold one entry, and maybe some padding.

    A multiple of 8, so that rows are whole words in every type.
    """
    return math.ceil(entry_width / ratio / 8) * 8
