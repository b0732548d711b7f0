"""Programmatic dependent launch (Hopper on): a kernel is started while the one before it still runs.

A kernel launched with `launch_pdl=pdl(device)` finds what earlier kernels wrote only behind `wait`, and writes nothing
that they may still read before it. What is constant in a step, weights above all, may be read earlier: that, and the
launch itself, is what is gained. `wait` stands in every such kernel, on every path that does more than read constants:
the kernel after it relies on that.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def pdl(device: torch.device) -> bool:
    """Are kernels on `device` launched this way?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The kernel behind this one may be launched from here on, as far as this program goes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all earlier kernels are done, and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def bring_to_l2(pointers, nbytes: tl.constexpr):
    """Start to bring `nbytes`, a multiple of 16, from each of these places to the L2 cache; nobody waits for it."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers.to(tl.int64), tl.full(pointers.shape, nbytes, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
