"""Attention over keys and values that lie one after the other, each head with its own: FlashInfer's `fa3`, for prompts
of latent attention, whose keys are wider than its values.

Its plan is made on the host, once for each step and number of heads, and copied from pinned memory; two sets of
workspaces take turns, and one is written again when its copy has been made.

Shape letters: N new tokens, P positions, G heads, D width of a key, V of a value, S sequences.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from common.attention import flashinfer_modules
from common.attention.latent import Part
from common.kvcache.packing import RowPacking

WIDTHS = ((192, 128), (128, 128), (256, 256), (64, 64))  # of keys and values
_DTYPES = (torch.bfloat16, torch.float16)
_CAUSAL, _NHD = 1, 0  # FlashInfer's MaskMode and QKVLayout
_INTS_NBYTES = 8 << 20


@functools.cache
def missing() -> str:
    """Why it cannot be used here, empty if it can."""
    if why := flashinfer_modules.missing():
        return why
    return "" if torch.cuda.get_device_capability()[0] == 9 else "it needs a Hopper GPU"


@dataclass(frozen=True)
class Module:
    """FlashInfer's own module for these types, as `common.attention.flashinfer_modules` compiles and finds it."""

    dtype: torch.dtype
    key_dim: int
    value_dim: int

    @property
    def name(self) -> str:
        from flashinfer.jit.attention.modules import get_batch_prefill_uri

        return str(get_batch_prefill_uri(*self._types))

    @property
    def path(self) -> Path | None:
        """Its library, None if it was not built."""
        return flashinfer_modules.find(self.name)

    def sources(self) -> Any:
        """What is to be compiled: writes the sources, returns FlashInfer's JitSpec."""
        from flashinfer.jit.attention.modules import gen_batch_prefill_module

        return gen_batch_prefill_module(*self._types)

    def load(self) -> Any:
        """The module, compiled now if it was not before."""
        return _load(self)

    @property
    def _types(self) -> tuple[Any, ...]:
        """No rotation, window or cap, and scores in fp32."""
        return ("fa3", *3 * (self.dtype,), torch.int32, self.key_dim, self.value_dim, 0, False, False, False)


@functools.cache
def _load(module: Module) -> Any:
    return flashinfer_modules.load_library(module)


@dataclass(frozen=True)
class _Workspace:
    """`floats` is not used by this kernel. `copied` is recorded behind the copy of a plan."""

    floats: Tensor
    ints: Tensor
    pinned: Tensor
    copied: torch.cuda.Event

    @classmethod
    def on(cls, device: torch.device) -> _Workspace:
        ints = torch.empty(_INTS_NBYTES, dtype=torch.uint8, device=device)
        pinned = torch.empty(_INTS_NBYTES, dtype=torch.uint8, pin_memory=True)
        return cls(torch.empty(1 << 20, dtype=torch.uint8, device=device), ints, pinned, torch.cuda.Event())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Plan:
    info: Any
    workspace: _Workspace
    query_starts_S1: Tensor
    key_starts_S1: Tensor


class RaggedAttention:
    """One for each device, since its workspaces are."""

    def __init__(self) -> None:
        self._workspaces: dict[int, list[_Workspace]] = {}

    @staticmethod
    def able(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
        return not missing() and dtype in _DTYPES and (key_dim, value_dim) in WIDTHS

    def attend(self, q_NGD: Tensor, k_PGD: Tensor, v_PGV: Tensor, part: Part, scale: float, out_NGV: Tensor) -> None:
        """Causal attention of a part's new tokens over its positions, as `Part.ragged` lines them up.

        Last dimensions are contiguous, other strides are free.
        """
        module = Module(q_NGD.dtype, q_NGD.shape[2], v_PGV.shape[2])
        heads = q_NGD.shape[1]
        key = (RaggedAttention, module, heads)
        plan: _Plan | None = part.ctx.scratch.get(key)
        if plan is None:
            plan = part.ctx.scratch[key] = self._plan(module, heads, part)
        module.load().ragged_run(
            plan.workspace.floats,
            plan.workspace.ints,
            plan.info,
            q_NGD,
            k_PGD,
            v_PGV,
            plan.query_starts_S1,
            plan.key_starts_S1,
            out_NGV,
            None,  # logarithms of sums
            _CAUSAL,
            _NHD,
            -1,  # no window
            False,
            *(None, None, None, None),
            *(0.0, scale, 1.0, 0),  # no cap of scores; the values' scale
        )

    def _plan(self, module: Module, heads: int, part: Part) -> _Plan:
        lined_up, device = part.ragged, part.tables.slots_T.device
        workspace = self._next(heads, device)
        workspace.copied.synchronize()
        query_starts_S1 = torch.from_numpy(lined_up.query_starts_S1)
        key_starts_S1 = torch.from_numpy(lined_up.key_starts_S1)
        info = module.load().plan(
            workspace.floats,
            workspace.ints,
            workspace.pinned,
            query_starts_S1,
            key_starts_S1,
            torch.from_numpy(np.diff(lined_up.key_starts_S1)),
            int(lined_up.query_starts_S1[-1]),
            len(lined_up.query_starts_S1) - 1,
            heads,
            heads,
            1,  # tokens of a page
            False,
            module.key_dim,
            module.value_dim,
            True,
            -1,
        )
        workspace.copied.record()
        return _Plan(info, workspace, part.ctx.query_starts_S1, lined_up.starts_S1)

    def _next(self, heads: int, device: torch.device) -> _Workspace:
        """A step uses the same one for all of its calls with so many heads."""
        turn = self._workspaces.setdefault(heads, [])
        if len(turn) < 2:
            turn.append(_Workspace.on(device))
            return turn[-1]
        turn.append(turn.pop(0))
        return turn[-1]


@runtime_checkable
class RaggedBackend(Protocol):
    """A backend of latent attention that has it."""

    ragged: RaggedAttention

    def gather_rows(self, cache: Tensor, part: Part, dtype: torch.dtype, packing: RowPacking | None = None) -> Tensor:
        """Rows of all positions of a part, as `Part.ragged` lines them up: a new [P, W] of `dtype`."""
