"""What an attention backend declares about itself, and what an engine needs; plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """One model on one device. Types are names as in `common.attention.context.DTYPES`."""

    device: str  # torch's device type: cpu, cuda
    dtype: str
    kv_dtype: str
    head_dim: int
    group_size: int  # query heads per key head
    block_size: int
    has_windows: bool
    latent: bool = False  # one row per token that all query heads share; head_dim is its width, group_size 1
    expanded: tuple[int, int] = (0, 0)  # widths of the keys and values that a latent row is expanded into


@dataclass(frozen=True)
class Capability:
    """`head_dims`, `block_sizes`: empty is any. `unavailable`: why it cannot run on this machine, else empty."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] = ()
    max_group_size: int = 0  # 0: any
    mixed_dtypes: bool = True  # kv_dtype may differ from dtype
    windows: bool = True
    latent: bool = False  # rows of latent attention, with and without selected positions
    heads: bool = True  # keys and values of heads
    unavailable: str = ""

    def refusal(self, needs: Needs) -> str:
        """Why it cannot serve, empty if it can."""
        if self.unavailable:
            return self.unavailable
        for what, value, able in (
            ("device", needs.device, self.devices),
            ("dtype", needs.dtype, self.dtypes),
            ("kv dtype", needs.kv_dtype, self.kv_dtypes),
        ):
            if value not in able:
                return f"{what} {value}: it has {', '.join(able)}"
        if not self.mixed_dtypes and needs.dtype != needs.kv_dtype:
            return f"kv dtype {needs.kv_dtype} differs from dtype {needs.dtype}"
        if self.head_dims and needs.head_dim not in self.head_dims:
            return f"head_dim {needs.head_dim}: it has {', '.join(map(str, self.head_dims))}"
        if self.block_sizes and needs.block_size not in self.block_sizes:
            return f"block size {needs.block_size}: it has {', '.join(map(str, self.block_sizes))}"
        if self.max_group_size and needs.group_size > self.max_group_size:
            return f"{needs.group_size} query heads per key head: it has up to {self.max_group_size}"
        if needs.has_windows and not self.windows:
            return "sliding windows"
        if not needs.latent and not self.heads:
            return "keys and values of heads"
        if needs.latent and not self.latent:
            return "latent attention"
        return ""
