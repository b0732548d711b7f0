"""The order of a row's tokens, their weights, and what kernels of truncation hand to each other.

The order (higher logit, then lower id) is one whole number for each token, so that nothing needs to know of equal
logits. Masses are whole numbers as well, exp((logit - best) / T) in units that leave room for the sum of a row: they
add up the same in any order, to within 1e-8 of the best one's weight for a row of 2^18 tokens.

A row's state is 8 int64: low and high bound of the edge's logit (bits of float32), number and mass above the high one,
mass of the row, how the edge is looked for, whether it lies in the list that the bounds stand for. Bounds leave out the
low one and take in the high one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels import draws

MAX_VOCAB = 1 << 20
COLUMNS = tl.constexpr(draws.COLUMNS)
TRUNCATED = tl.constexpr(int(draws.DrawKind.TRUNCATED))
ID_SPAN = tl.constexpr(MAX_VOCAB)
STATE = tl.constexpr(8)
BY_COUNT = tl.constexpr(0)
BY_MASS = tl.constexpr(1)
ALL = tl.constexpr(2)  # neither top_k nor top_p leaves out a token


@triton.jit
def place_of(x, ids):
    """A token's place in the order, the first the highest: int64."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(x == 0, 0, tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
    return key * ID_SPAN + (ID_SPAN - 1 - ids)


@triton.jit
def mass_of(x, best, temperature, SHIFT: tl.constexpr):
    """Weights in units of 2^-SHIFT: int64."""
    UNITS: tl.constexpr = 2.0**SHIFT
    z = (x.to(tl.float64) - best.to(tl.float64)) * tl.minimum(1.0 / temperature, 1e300)
    return (tl.exp(tl.maximum(z, -708.0)) * UNITS + 0.5).to(tl.int64)


@triton.jit
def load_f32(place):
    """A float32 in an int64."""
    return tl.load(place).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def row_extreme(row, TILES: tl.constexpr, TILES_2: tl.constexpr, BEST: tl.constexpr):
    tile = tl.arange(0, TILES_2)
    if BEST:
        return tl.max(tl.load(row + tile, mask=tile < TILES, other=float("-inf")), 0)
    return tl.min(tl.load(row + tile, mask=tile < TILES, other=float("inf")), 0)
