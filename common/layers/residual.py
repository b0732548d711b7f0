"""The residual stream of pre-norm layers: what a block gave is added when the next block's norm reads the stream.

    stream.add(self.self_attn(stream.normed(self.input_layernorm), step))
    stream.add(self.mlp(stream.normed(self.post_attention_layernorm)))

A sum and the norm behind it are one operation over the same rows, across layers too, and the numbers are those of a
sum made at once.
"""

from __future__ import annotations

from torch import Tensor

from common.layers.rms_norm import RMSNorm


class ResidualStream:
    """`rows`, [T, D] or what a family works on, belong to it: they are added to in place."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._delta: Tensor | None = None

    @property
    def width(self) -> int:
        return self._rows.shape[-1]

    @property
    def rows(self) -> Tensor:
        """With all that was added so far."""
        if self._delta is not None:
            self._rows += self._delta
            self._delta = None
        return self._rows

    def add(self, delta_TD: Tensor) -> None:
        """`delta_TD` must stay as it is until the stream is read."""
        if self._delta is not None:
            self._rows += self._delta
        self._delta = delta_TD

    def normed(self, norm: RMSNorm) -> Tensor:
        """A new [T, D]: the norm of all that was added so far."""
        if self._delta is None:
            return norm(self._rows)
        delta_TD, self._delta = self._delta, None
        return norm.of_sum(self._rows, delta_TD)
