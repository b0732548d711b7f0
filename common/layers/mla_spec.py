"""Numbers of multi-head latent attention and of the lightning indexer, as plain data (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from common.kvcache.packing import RowPacking


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, section 2.1). Widths are of one head.

    A token's cached row is its latent (`kv_lora_rank`, normed) and one key of `rope_dim` that all heads share. A
    head's key is `nope_dim` expanded from the latent and that shared part, its value `v_dim` expanded from the latent.
    `q_lora_rank`: queries go through a latent of their own; 0 is a plain projection. `scale`: of scores, Yarn's factor
    included. `interleaved`: neighbouring elements turn together, not halves. `norm_eps` is that of the latents' norms,
    whatever the layers use.
    """

    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    interleaved: bool = True
    bias: bool = False  # on the projections from and to the hidden state
    norm_eps: float = 1e-6

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Width of a token's cached row."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def packing(self) -> RowPacking:
        """The form of rows in an 8-bit cache."""
        return RowPacking(self.kv_lora_rank, self.rope_dim)


@dataclass(frozen=True)
class IndexerSpec:
    """The lightning indexer of sparse attention (DeepSeek-V3.2, section 2.1): a query sees its `top_k` positions.

    Its first `rope_dim` elements turn, `interleaved` or in halves. `owners[i]`: layer i has an indexer of its own; the
    others take the choice of the last one before them that has (GLM-5), so layer 0 is an owner. Sequences of up to
    `top_k` tokens see everything; so do all if `dense`, and then there are no indexers at all.
    """

    num_heads: int
    head_dim: int
    top_k: int
    rope_dim: int
    interleaved: bool
    owners: tuple[bool, ...]
    dense: bool = False
    norm_eps: float = 1e-6

    @property
    def packing(self) -> RowPacking:
        """The form of keys in an 8-bit cache."""
        return RowPacking(self.head_dim)

    def __post_init__(self) -> None:
        if not self.owners[:1] == (True,):
            raise ValueError("the first layer has no earlier indexer to share")
