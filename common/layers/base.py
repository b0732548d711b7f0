"""What every layer of a model shares: how its tensors are made, and which checkpoint tensors fill them.

    Build -> layers allocate their packed tensors -> `slots()` lists the checkpoint tensor behind each part
    -> `common.models.weights` copies (or draws) them -> `derive()` makes what follows from them -> calls, under
    inference mode

The path of attributes is the checkpoint name: `model.layers.3.mlp.down_proj.weight` fills
`root.model.layers[3].mlp.down_proj`. Layers are plain objects, not `nn.Module`s: a decode step of a small
model makes hundreds of calls, and a plain attribute and a plain call are the cheapest ones Python has.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def share_size(num_units: int, ranks: int) -> int:
    """Units of one of `ranks` ranks (`TensorParallel.share`). ValueError where it does not divide."""
    if num_units % ranks == 0:
        return num_units // ranks
    if ranks % num_units:
        raise ValueError(f"{num_units} units do not divide over {ranks} ranks")
    return 1


@dataclass(frozen=True)
class TensorParallel:
    """The place of a rank, and the sum over ranks (in place, returned) that partial products go through.

    `all_gather` gives every rank's tensor: [ranks, *shape].
    """

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] | None = None
    all_gather: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in 0..{self.size - 1}")
        if self.size > 1 and self.all_reduce is None:
            raise ValueError(f"{self.size} ranks need an all_reduce")

    def share(self, num_units: int) -> tuple[int, int]:
        """(first unit, number of units) of this rank; with more ranks than units neighbours hold the same one.

        The same rule as `common.kvcache.layout`'s SPLIT and GROUPED. ValueError where it does not divide.
        """
        count = share_size(num_units, self.size)
        return (self.rank * count if num_units % self.size == 0 else self.rank * num_units // self.size), count

    def reduce(self, partial: Tensor) -> Tensor:
        return partial if self.all_reduce is None else self.all_reduce(partial)


@dataclass(frozen=True)
class Build:
    """How the tensors of a model are made.

    `fp8_linears`, `fp8_experts`: these weights stay in FP8 where their sizes allow it (`common.layers.fp8_weight`).
    `exact`: the layer reads its weights itself, in `dtype`. `fixed`: a token's bits do not depend on the others of a
    step, on a GPU too.
    """

    dtype: torch.dtype
    device: torch.device
    tp: TensorParallel = TensorParallel()
    fp8_linears: bool = False
    fp8_experts: bool = False
    exact: bool = False
    fixed: bool = False

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Init(enum.Enum):
    """Dummy values of a tensor."""

    NORMAL = "normal"
    ONES = "ones"
    ZEROS = "zeros"
    INDEX = "index"  # whole numbers below the slot's `num_values`


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor and where this rank's part of it goes.

    The checkpoint holds `shape`; `target` (a view into a layer's tensor) takes `target.shape[dim]` entries of
    dimension `dim` from `start` on, and all of the other dimensions. A `twin` is a redundant copy of what another
    slot has filled: it may be absent, and if it is there it must be equal. `scales`: of a target in FP8, those of its
    blocks.

    A layer may offer its tensors in several `form`s; a checkpoint holds one of them, whole, for each layer (`owner`,
    filled in by `Layer.slots`). Slots of one form may share a name: each takes its part. `num_values` above 0: whole
    numbers from 0 to below it. `holder`: of a weight of linear layers, who holds it.
    """

    name: str
    target: Tensor
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    init: Init = Init.NORMAL
    twin: bool = False
    form: str = ""
    owner: str = ""
    num_values: int = 0
    scales: Tensor | None = None
    holder: Holder | None = None


class Layer:
    """Public attributes that are layers, or lists of layers, are its children."""

    transparent = False  # True: stands for its parts; its own attribute name is in no checkpoint

    def own_slots(self) -> Iterable[Slot]:
        """Checkpoint tensors of this layer itself, names relative to it."""
        return ()

    def derive_own(self) -> None:
        """Make this layer's tensors that follow from loaded ones; called once, when all are in place."""

    def derive(self) -> None:
        """`derive_own` of all layers from here on."""
        self.derive_own()
        for name, child in vars(self).items():
            if not name.startswith("_"):
                for layer in child if isinstance(child, list) else (child,):
                    if isinstance(layer, Layer):
                        layer.derive()

    def slots(self, prefix: str = "") -> Iterator[Slot]:
        """All checkpoint tensors under this layer, with full names."""
        for slot in self.own_slots():
            yield replace(slot, name=prefix + slot.name, owner=prefix + slot.owner if slot.form else "")
        for name, child in vars(self).items():
            if name.startswith("_"):
                continue
            if isinstance(child, Layer):
                yield from child.slots(prefix if child.transparent else f"{prefix}{name}.")
            elif isinstance(child, list):
                for i, item in enumerate(child):
                    yield from item.slots(f"{prefix}{name}.{i}.")


class Holder(Layer):
    """A layer of matrices that may stay in FP8.

    `is_exact`: it never does. `wants_fp8`: `Build` asks for it. `in_fp8`: it is so, for its parts begin on blocks.
    """

    is_exact: bool
    wants_fp8: bool
    in_fp8: bool

    def fits(self, ranks: int) -> bool:
        """Do all parts, and a rank's share of each, begin on blocks? ValueError where they do not divide."""
        raise NotImplementedError

    def hold_floats(self, dtype: torch.dtype) -> None:
        """Exchange weights in FP8, which are not filled yet, for ones of `dtype`; slots from before are void."""
        raise NotImplementedError
