"""Numbers of gated delta-net layers, as plain data (no torch, so that a model's spec needs none)."""

from __future__ import annotations

from dataclasses import dataclass

CONV_REGION = "gdn_conv"
RECURRENT_REGION = "gdn_recurrent"


@dataclass(frozen=True)
class DeltaSpec:
    """`is_delta_layer`: one flag per layer; the others attend. Heads are counted over all ranks.

    A key head serves `values_per_key` value heads in a row, and the channels of these are what cannot be split: the
    *unit* of the convolution's state. `conv_width`: tokens that its kernel sees, the newest included.
    """

    is_delta_layer: tuple[bool, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    def __post_init__(self) -> None:
        """ValueError for numbers that do not fit each other."""
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(f"{self.num_key_heads} key heads do not divide {self.num_value_heads} value heads")
        if self.conv_width < 2:
            raise ValueError(f"a convolution over {self.conv_width} tokens keeps no state")

    @property
    def values_per_key(self) -> int:
        return self.num_value_heads // self.num_key_heads

    @property
    def unit_width(self) -> int:
        """Channels of a key head that the convolution goes over: its query, its key, its values."""
        return 2 * self.key_dim + self.values_per_key * self.value_dim
