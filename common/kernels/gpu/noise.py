"""The noise and the race of `common.kernels.sampling` in Triton: what one tile of a row's vocabulary gives.

Noise in float64 takes two logarithms a token. So each token first has an upper bound of it in fp32, as on the CPU
(csrc/cpu/sampling.inl), and only tokens that may still win have it exactly: most often one of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels import sampling as definition

_C1 = tl.constexpr(definition.C1)
_M1 = tl.constexpr(definition.M1)
_M2 = tl.constexpr(definition.M2)
_MINUS_LN2 = tl.constexpr(-0.6931471805599453)
_UNIT = tl.constexpr(2.0**-32)
_32_LN2 = tl.constexpr(22.18070977791825)
_MARGIN = tl.constexpr(1e-3)  # more than the error of noise and of distances in fp32
_STEEPEST = tl.constexpr(1e30)
LAST_ID = tl.constexpr(2147483647)


if triton.knobs.runtime.interpret:

    @triton.jit
    def _log2(x):
        return tl.log2(x)

else:

    @triton.jit
    def _log2(x):
        """Right within 2^-22 where it matters: one instruction instead of a function with branches."""
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _words(key, ids):
    """The high halves of the words of some tokens: uint32."""
    z = key + (ids.to(tl.uint32).to(tl.uint64) + 1) * _C1
    z = (z ^ (z >> 30)) * _M1
    z = (z ^ (z >> 27)) * _M2
    return ((z ^ (z >> 31)) >> 32).to(tl.uint32)


@triton.jit
def gumbel(key, ids):
    """Noise as it is defined: float64."""
    u = (_words(key, ids).to(tl.float64) + 0.5) * _UNIT
    return -tl.log(-tl.log(u))


@triton.jit
def _most_gumbel(key, ids):
    """At least the noise, in fp32: g <= -ln(1 - u), since -ln(u) >= 1 - u. Equal near u = 1, where winners are."""
    rest = ~_words(key, ids).to(tl.int32, bitcast=True)
    return _log2(rest.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * _MINUS_LN2 + _32_LN2


@triton.jit
def load_f64(place):
    """A float64 that lies among int64."""
    return tl.load(place).to(tl.float64, bitcast=True)


@triton.jit
def race(logits_row, draw, x, ids, best):
    """The id among `ids` with the largest score, -1 if all of `x` are -inf. `x`: their logits; `draw`: the row's draw.

    Scores are relative to `best`, which is finite and at least the largest of `x`. Of tokens with less than min_p times
    the weight of `best` none wins.
    """
    key = tl.load(draw).to(tl.uint64, bitcast=True)
    temperature, min_p = load_f64(draw + 1), load_f64(draw + 3)
    z = (x - best) * tl.minimum(1.0 / temperature, _STEEPEST).to(tl.float32)
    if min_p > 0:
        least = tl.log(min_p).to(tl.float32)
        z = tl.where(z < least - 1e-3 + least * 1e-5, float("-inf"), z)
    most = z + _most_gumbel(key, ids)
    top = tl.max(most, 0)
    chosen = tl.full((), -1, tl.int32)
    leader = tl.full((), float("-inf"), tl.float64)
    while top > leader.to(tl.float32) - _MARGIN:
        i = tl.min(tl.where(most == top, ids, LAST_ID), 0)
        distance = (tl.load(logits_row + i).to(tl.float64) - best.to(tl.float64)) / temperature
        score = distance + gumbel(key, i)
        wins = (score > leader) | ((score == leader) & (i < chosen))
        wins = wins & ((min_p <= 0) | (tl.exp(distance) >= min_p))
        chosen = tl.where(wins, i, chosen)
        leader = tl.where(wins, score, leader)
        most = tl.where(ids == i, float("-inf"), most)
        top = tl.max(most, 0)
    return chosen
