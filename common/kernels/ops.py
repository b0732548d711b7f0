"""Operations of layers that have kernels of their own on CPU and on GPUs, with torch's as the fallback.

The CPU kernels add in fixed orders: a row's result is bitwise the same whatever else is in the batch and however
many threads there are. Which instruction set runs is the library's choice; tests force one by `isa`.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels import cpu, gpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # nd::Dtype
CACHE_DTYPES = DTYPES | {torch.float8_e4m3fn: 3, torch.uint8: 4}

_LINEAR = struct.Struct("@10q3i4x")  # nd::LinearCall
_NORM = struct.Struct("@10qf2i4x")  # nd::NormCall
_LINEAR_BATCH = struct.Struct("@10q3i4x4q")  # nd::LinearBatchCall
_ROPE = struct.Struct("@12q3i4x")  # nd::RopeCall
_GATE = struct.Struct("@5qif")  # nd::GateCall
_SIGMOID = struct.Struct("@8q2i")  # nd::SigmoidCall


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    fixed: bool = False,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """Matrix product x @ weight^T + bias, summed in fp32 and rounded once: [T, N] of `out_dtype` (x's if None).

    Rows of `x_TK` and `weight_NK` must be contiguous for the kernel; what it cannot do goes to torch. `fixed`: on a GPU
    too a row's bits do not depend on the other rows.
    """
    lib = cpu.library()
    out_dtype = out_dtype or x_TK.dtype
    if fixed and gpu.enabled(x_TK):
        return gpu.fixed.linear(x_TK, weight_NK, bias_N, out_dtype)
    if gpu.enabled(x_TK) and gpu.linear.fits(x_TK, weight_NK):
        return gpu.linear.linear(x_TK, weight_NK, bias_N, out_dtype)
    if lib is None or not _fits(x_TK, weight_NK, bias_N):
        x_TK = x_TK.to(weight_NK.dtype)
        if x_TK.is_cuda and x_TK.dim() == 2 and out_dtype == torch.float32 != x_TK.dtype and bias_N is None:
            return torch.mm(x_TK, weight_NK.T, out_dtype=torch.float32)
        return functional.linear(x_TK, weight_NK, bias_N).to(out_dtype)
    m, k = x_TK.shape
    n = weight_NK.shape[0]
    out_TN = torch.empty(m, n, dtype=out_dtype)
    call = _LINEAR.pack(
        x_TK.data_ptr(),
        weight_NK.data_ptr(),
        0 if bias_N is None else bias_N.data_ptr(),
        out_TN.data_ptr(),
        x_TK.stride(0),
        weight_NK.stride(0),
        n,
        m,
        n,
        k,
        DTYPES[x_TK.dtype],
        DTYPES[weight_NK.dtype],
        DTYPES[out_dtype],
    )
    lib.nd_linear(isa, torch.get_num_threads(), call)
    return out_TN


def linear_silu_mul(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, limit: float, *, fixed: bool = False
) -> Tensor:
    """`silu_mul` of `linear`, whose rows are [gate | up]: a new contiguous [T, N / 2]."""
    if not fixed and gpu.enabled(x_TK) and gpu.linear.fits(x_TK, weight_NK):
        return gpu.linear.linear_silu_mul(x_TK, weight_NK, bias_N, limit)
    return silu_mul(linear(x_TK, weight_NK, bias_N, fixed=fixed), limit)


def linear_heads(
    x_THK: Tensor,
    weight_HNK: Tensor,
    out_THN: Tensor | None = None,
    *,
    fixed: bool = False,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """For each head a product of its own, x[:, h] @ weight[h]^T, as `linear` computes it: [T, H, N] of x's type.

    Only last dimensions need to be contiguous. `out_THN`, if given, takes the result and is returned.
    """
    tokens, heads, k = x_THK.shape
    n = weight_HNK.shape[1]
    if out_THN is None:
        out_THN = x_THK.new_empty(tokens, heads, n)
    lib = cpu.library()
    rows = (x_THK.stride(2), weight_HNK.stride(2), out_THN.stride(2))
    if fixed and gpu.enabled(x_THK) and rows == (1, 1, 1):
        gpu.fixed.linear_heads(x_THK, weight_HNK, out_THN)
        return out_THN
    if x_THK.is_cuda:
        torch.bmm(x_THK.transpose(0, 1), weight_HNK.transpose(1, 2), out=out_THN.transpose(0, 1))
        return out_THN
    if lib is None or x_THK.device.type != "cpu" or rows != (1, 1, 1):
        out_THN.copy_(torch.matmul(x_THK.transpose(0, 1), weight_HNK.transpose(1, 2)).transpose(0, 1))
        return out_THN
    call = _LINEAR_BATCH.pack(
        x_THK.data_ptr(),
        weight_HNK.data_ptr(),
        0,
        out_THN.data_ptr(),
        x_THK.stride(0),
        weight_HNK.stride(1),
        out_THN.stride(0),
        tokens,
        n,
        k,
        DTYPES[x_THK.dtype],
        DTYPES[weight_HNK.dtype],
        DTYPES[out_THN.dtype],
        heads,
        x_THK.stride(1),
        weight_HNK.stride(0),
        out_THN.stride(1),
    )
    lib.nd_linear_batch(isa, torch.get_num_threads(), call)
    return out_THN


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, split: int = 0, isa: cpu.Isa = cpu.Isa.BEST) -> Tensor:
    """Root mean square norm of the last dimension, in fp32 inside: a new contiguous tensor of x's shape and type.

    `x` is [T, D] or [T, H, D]. `weight` is [D], or [2, D]: the first `split` heads take its first row, the others
    the second.
    """
    if gpu.enabled(x) and x.stride(-1) == 1:
        return gpu.norms.rms_norm(x, weight, eps, split)
    lib = cpu.library()
    if lib is None or x.device.type != "cpu" or x.stride(-1) != 1:
        if weight.dim() == 1:
            return functional.rms_norm(x, weight.shape, weight, eps)
        kind_H = (torch.arange(x.shape[1], device=x.device) >= split).long()
        return functional.rms_norm(x, weight.shape[1:], None, eps).mul_(weight[kind_H])
    heads, head_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
    out = torch.empty(x.shape, dtype=x.dtype)
    call = _NORM.pack(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        heads,
        x.shape[-1],
        heads if weight.dim() == 1 else split,
        x.stride(0),
        head_stride,
        weight.stride(0),
        eps,
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
    )
    lib.nd_rms_norm(isa, torch.get_num_threads(), call)
    return out


def add_rms_norm(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Add to the residual stream, in place and rounded to its type, and norm it: `rms_norm` of the sum."""
    if gpu.enabled(residual_TD) and residual_TD.stride(1) == delta_TD.stride(1) == 1:
        return gpu.norms.add_rms_norm(residual_TD, delta_TD, weight_D, eps)
    residual_TD += delta_TD
    return rms_norm(residual_TD, weight_D, eps)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Norm of the last dimension to mean 0 and variance 1: a new contiguous [T, D]."""
    if gpu.enabled(x_TD) and x_TD.dim() == 2 and x_TD.stride(1) == 1:
        return gpu.norms.layer_norm(x_TD, weight_D, bias_D, eps)
    return functional.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)


def rope(
    x_THD: Tensor,
    cos_T1D: Tensor,
    sin_T1D: Tensor,
    *,
    interleaved: bool = False,
    out_THD: Tensor | None = None,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """Turn element i of each head with element i + D / 2: x * cos + (x, halves exchanged) * sin.

    `sin_T1D` holds the sign for the half that it is applied to. `interleaved`: element 2i of `x_THD` turns with
    2i + 1, and they come out as elements i and i + D / 2. The result is a new contiguous [T, H, D], or `out_THD`,
    which may be `x_THD` itself.
    """
    lib = cpu.library()
    tokens, heads, width = x_THD.shape
    x_stride, table_stride = x_THD.stride(), cos_T1D.stride()
    out_stride = (heads * width, width, 1) if out_THD is None else out_THD.stride()
    fits = cos_T1D.shape == sin_T1D.shape == (tokens, 1, width) and table_stride == sin_T1D.stride()
    if gpu.enabled(x_THD) and fits and x_stride[2] == out_stride[2] == table_stride[2] == 1:
        return gpu.rope.rope(x_THD, cos_T1D, sin_T1D, interleaved, out_THD)
    if lib is None or not fits or x_THD.device.type != "cpu" or x_stride[2] != 1 or out_stride[2] != 1:
        low, high = (x_THD[..., 0::2], x_THD[..., 1::2]) if interleaved else x_THD.chunk(2, dim=-1)
        straight, exchanged = torch.cat((low, high), dim=-1), torch.cat((high, low), dim=-1)
        turned = straight.mul_(cos_T1D).addcmul_(exchanged, sin_T1D)
        return turned if out_THD is None else out_THD.copy_(turned)
    if out_THD is None:
        out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype)
    call = _ROPE.pack(
        x_THD.data_ptr(),
        cos_T1D.data_ptr(),
        sin_T1D.data_ptr(),
        out_THD.data_ptr(),
        tokens,
        heads,
        width,
        x_stride[0],
        x_stride[1],
        out_stride[0],
        out_stride[1],
        table_stride[0],
        DTYPES[x_THD.dtype],
        DTYPES[cos_T1D.dtype],
        interleaved,
    )
    lib.nd_rope(isa, torch.get_num_threads(), call)
    return out_THD


def silu_mul(gate_up_TI: Tensor, limit: float = 0.0, *, isa: cpu.Isa = cpu.Isa.BEST) -> Tensor:
    """silu(gate) * up of packed rows [gate | up]: a new contiguous [T, I / 2].

    With a `limit` above 0 the gate is cut off above it, and up beyond plus and minus it, before anything else.
    """
    if gpu.enabled(gate_up_TI) and gate_up_TI.stride(1) == 1:
        return gpu.pointwise.silu_mul(gate_up_TI, limit)
    lib = cpu.library()
    if lib is None or gate_up_TI.device.type != "cpu" or gate_up_TI.stride(1) != 1:
        gate, up = gate_up_TI.chunk(2, dim=-1)
        if limit > 0:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return functional.silu(gate).mul_(up)
    tokens, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up_TI.dtype)
    dtype = DTYPES[gate_up_TI.dtype]
    call = _GATE.pack(gate_up_TI.data_ptr(), out.data_ptr(), tokens, width, gate_up_TI.stride(0), dtype, limit)
    lib.nd_silu_mul(isa, torch.get_num_threads(), call)
    return out


def sigmoid_mul(x_TD: Tensor, gate_TG: Tensor, *, isa: cpu.Isa = cpu.Isa.BEST) -> Tensor:
    """Rows times sigmoid(gate): a new contiguous [T, D] of x's type. The gate is [T, D], or [T, 1] for whole rows."""
    if gpu.enabled(x_TD) and x_TD.stride(1) == gate_TG.stride(1) == 1:
        return gpu.pointwise.sigmoid_mul(x_TD, gate_TG)
    lib = cpu.library()
    is_cpu = x_TD.device.type == "cpu" and gate_TG.device.type == "cpu"
    if lib is None or not is_cpu or x_TD.stride(1) != 1 or gate_TG.stride(1) != 1:
        return x_TD * gate_TG.sigmoid().to(x_TD.dtype)
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    call = _SIGMOID.pack(
        x_TD.data_ptr(),
        gate_TG.data_ptr(),
        out.data_ptr(),
        *x_TD.shape,
        gate_TG.shape[1],
        x_TD.stride(0),
        gate_TG.stride(0),
        DTYPES[x_TD.dtype],
        DTYPES[gate_TG.dtype],
    )
    lib.nd_sigmoid_mul(isa, torch.get_num_threads(), call)
    return out


def _fits(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    return (
        x_TK.device.type == "cpu"
        and x_TK.dim() == 2
        and x_TK.dtype in DTYPES
        and weight_NK.dtype in DTYPES
        and x_TK.stride(1) == 1
        and weight_NK.stride(1) == 1
        and (bias_N is None or (bias_N.dtype == weight_NK.dtype and bias_N.stride(0) == 1))
    )
