"""Which weights stay in FP8, of those that a model would keep so; the rest are held in the model's type.

    auto   those that the checkpoint has in FP8; what it has in another type stays in that, rounded to the model's
    fp8    all, but those that `quantization_config` names as not converted

Matrices packed into one are all in FP8 or none is. A layer whose parts, or a rank's share of them, do not begin on
blocks of 128 is not, whatever the checkpoint has. What a user would not expect is said in the log, once, by rank 0.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
import torch

from common.layers.base import Holder, Slot
from common.layers.fp8_weight import BLOCK_SHAPE
from common.layers.quant_spec import WHOLE, QuantSpec
from common.models.stored import Scaled, Stored, modules_of

WHOLE_SHAPE = (WHOLE, WHOLE)

_MAX_LISTED = 12
_NOT_CONVERTED = "not converted, by the checkpoint"
_READ_OTHERWISE = "stored in FP8, and used by their layers in another type"
_log = structlog.stdlib.get_logger(__name__)


@dataclass
class Left:
    """Layers left in the model's type for one `reason`; `names` of their weights, `nbytes` that they take now."""

    reason: str
    holders: list[Holder] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    nbytes: int = 0

    def add(self, holder: Holder | None, slots: Sequence[Slot], dtype: torch.dtype) -> None:
        if holder is not None:
            self.holders.append(holder)
        self.names += dict.fromkeys(s.name for s in slots if s.name not in self.names[-len(slots) :])
        self.nbytes += sum(s.target.numel() for s in slots) * dtype.itemsize


def stays_as_stored(stored: Stored) -> bool:
    """Is it in FP8 with scales of a kind that layers multiply by?"""
    if not isinstance(stored, Scaled) or stored.values.dtype != "F8_E4M3":
        return False
    return stored.block in (BLOCK_SHAPE, WHOLE_SHAPE)


@dataclass(frozen=True)
class FP8Choice:
    """`requantise`: as --quantization fp8 does, else as auto. `dtype`: of what is not in FP8."""

    quant: QuantSpec | None
    requantise: bool
    dtype: torch.dtype
    rank: int = 0
    ranks: int = 1

    def say_turned(self, in_fp8: bool) -> None:
        """Of a quantised checkpoint, what is turned into `dtype` whatever the sizes. `in_fp8`: the rest is not."""
        quant = self.quant
        if quant is None or self.rank or (in_fp8 and not quant.fp4_experts):
            return
        which = "experts in fp4" if in_fp8 else f"{quant.method} in blocks of {_size(quant.block)}"
        _log.info("quantised weights are held in floats", weights=which, held_in=_name(self.dtype))

    def settle(self, slots: Iterable[Slot], stored: Mapping[str, Stored] | None) -> bool:
        """Let layers that must not be in FP8 hold `dtype` instead: True if any did, and `slots` are void.

        `slots`: each layer's in one form. `stored`: what the checkpoint has, None where weights are drawn.
        """
        left = self.sort_out(slots, stored)
        changed = [holder for one in left for holder in one.holders if holder.in_fp8]
        for holder in changed:
            holder.hold_floats(self.dtype)
        if self.rank == 0:
            self._say(left)
        return bool(changed)

    def sort_out(self, slots: Iterable[Slot], stored: Mapping[str, Stored] | None) -> list[Left]:
        """By reason the layers that a model would keep in FP8 and cannot, and what else of the checkpoint is in FP8."""
        by_holder: dict[int, tuple[Holder, list[Slot]]] = {}
        others: list[Slot] = []
        for slot in slots:
            if slot.holder is not None and slot.holder.wants_fp8:
                by_holder.setdefault(id(slot.holder), (slot.holder, []))[1].append(slot)
            elif stored is not None and slot.name in stored and stays_as_stored(stored[slot.name]):
                others.append(slot)
        left: dict[str, Left] = {}
        for slot in others if by_holder else ():
            left.setdefault(_READ_OTHERWISE, Left(_READ_OTHERWISE)).add(None, [slot], slot.target.dtype)
        for holder, some in by_holder.values():
            if reason := self._why_not(holder, [self._is_wanted(slot, stored) for slot in some]):
                left.setdefault(reason, Left(reason)).add(holder, some, self.dtype)
        return list(left.values())

    def _is_wanted(self, slot: Slot, stored: Mapping[str, Stored] | None) -> bool:
        """May that weight be in FP8?"""
        quant = self.quant
        if stored is None:
            return quant is None or not quant.is_ignored(slot.name.removesuffix(".weight"))
        here = stored[slot.name]
        if stays_as_stored(here):
            return True
        return self.requantise and (quant is None or not quant.is_ignored(*modules_of(here.parts[0])))

    def _why_not(self, holder: Holder, wanted: list[bool]) -> str:
        if all(wanted):
            return "" if holder.in_fp8 else _misfit(holder, self.ranks)
        if any(wanted):
            return "packed with a weight that is not in FP8"
        return _NOT_CONVERTED

    def _say(self, left: Iterable[Left]) -> None:
        """With the tensor parallel degrees below this one at which all layers of a kind would fit."""
        for one in left:
            more: dict[str, object] = {}
            if self.ranks > 1 and not _fit(one.holders, self.ranks):
                more["degrees_that_fit"] = [n for n in range(1, self.ranks) if _fit(one.holders, n)]
            _log.log(
                logging.INFO if one.reason in (_NOT_CONVERTED, _READ_OTHERWISE) else logging.WARNING,
                "layers not in FP8",
                reason=one.reason,
                held_in=_name(self.dtype),
                layers=len(one.holders) or len(one.names),
                bytes=one.nbytes,
                weights=_listed(one.names),
                **more,
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(block: tuple[int, int]) -> str:
    return " x ".join("all" if size == WHOLE else str(size) for size in block)


def _misfit(holder: Holder, ranks: int) -> str:
    if not holder.fits(1):
        return f"sizes that are no multiples of {BLOCK_SHAPE[0]}"
    return f"shares of {ranks} ranks that do not begin on blocks of {BLOCK_SHAPE[0]}"


def _fit(holders: Iterable[Holder], ranks: int) -> bool:
    try:
        return all(h.fits(ranks) for h in holders)
    except ValueError:  # units that do not divide
        return False


def _listed(names: Iterable[str]) -> list[str]:
    """Names with a star for each number, and how many each stands for."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    out = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    return [*out[:_MAX_LISTED], f"and {len(out) - _MAX_LISTED} more"] if len(out) > _MAX_LISTED else out
