"""The token of decision 13: logits in, one token per row out, by noise keyed by place.

Each row stands alone: what it draws depends on its logits and its `SampleRow` only, never on the batch. A
verify step of speculation passes one row for each position of a sequence. Order of operations, as users of
vLLM and of the OpenAI API expect:

    logprobs (log softmax of the raw logits) -> logit_bias -> min_tokens -> grammar mask -> repetition penalty
    (prompt and output) -> presence and frequency penalties (output) -> temperature -> top_k -> top_p -> min_p
    -> argmax of logit / temperature + noise (`common.kernels.sampling` defines the noise)

A row that has nothing left, or whose logits are not numbers, fails alone: its token is -1 and `failures` says
why. On a GPU nothing of this waits: parameters of all rows go there in one copy, and what was drawn is on its way back
when `sample` returns, so that a step can be sampled now and collected when others have been launched behind it.

Rows with penalties, and grammar masks, need the tokens before them on the host; all others need only their number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.adjust import apply_edits, edits_of, mask_arrays
from common.engine.batch import RowMasks, SampleRow
from common.engine.inputs import HostInputs, Inputs, PinnedInputs
from common.engine.logprobs import RawLogprobs
from common.engine.results import Fetched
from common.kernels.draws import any_truncated, draw_packed, noise_keys, pack_columns
from common.kernels.sampling import Draw, DrawStatus, draw_rows, noise_key
from common.types import TokenLogprobs

_PLACE_AND_PARAMS = struct.Struct("@3Q3dq")
_GREEDY = Draw(0, 0.0, 0, 1.0, 0.0)

NOT_FINITE: Final = "the model's logits are not finite numbers"
_REASONS = {
    DrawStatus.EMPTY: "no token is allowed: the grammar, bans and min_tokens leave nothing to draw",
    DrawStatus.NOT_A_NUMBER: NOT_FINITE,
}


@dataclass(frozen=True)
class SampleResult:
    """`token_ids_R`: int64 on the device of the logits, -1 for a failed row. The rest waits for the step when used."""

    token_ids_R: Tensor
    raw: RawLogprobs | None = field(repr=False)
    fetched: Fetched = field(repr=False)  # tokens, status, and the tensors of `raw`

    @classmethod
    def of(cls, token_ids_R: Tensor, status_R: Tensor, raw: RawLogprobs | None) -> SampleResult:
        tensors = [token_ids_R, status_R, *(raw.tensors() if raw is not None else ())]
        return cls(token_ids_R, raw, Fetched.start(tensors))

    @cached_property
    def tokens(self) -> list[int]:
        """`token_ids_R` on the host."""
        tokens: list[int] = self.fetched.get()[0].tolist()
        return tokens

    @cached_property
    def failures(self) -> dict[int, str]:
        """Rows without a token, and why."""
        status_R = self.fetched.get()[1]
        return {r: _REASONS[DrawStatus(status)] for r, status in enumerate(status_R.tolist()) if status}

    @cached_property
    def logprobs(self) -> list[TokenLogprobs | None]:
        """One entry per row; None where the request asked for none or the row failed."""
        if self.raw is None:
            return [None] * self.token_ids_R.shape[0]
        lines = self.raw.per_row(*self.fetched.get()[2:])
        return [None if r in self.failures else entry for r, entry in enumerate(lines)]


class Sampler:
    """One per engine."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._inputs: Inputs = HostInputs() if self.device.type == "cpu" else PinnedInputs(self.device)

    def sample(self, logits_RV: Tensor, rows: Sequence[SampleRow], masks: RowMasks | None = None) -> SampleResult:
        """Draw one token per row. `logits_RV`: float32 [rows, vocab], left as it is. `masks`: what grammars allow."""
        if logits_RV.shape != (len(rows), self.vocab_size) or logits_RV.dtype != torch.float32:
            raise ValueError(
                f"logits must be float32 {[len(rows), self.vocab_size]}, got {logits_RV.dtype} {list(logits_RV.shape)}"
            )
        logits_RV = logits_RV.contiguous()
        top_n = [row.params.logprobs for row in rows]
        arrays = edits_of(rows, self.vocab_size) | mask_arrays(masks, len(rows), self.vocab_size)
        is_edited = bool(arrays)
        draws_R6 = packed_draws(rows) if self.device.type != "cpu" else None
        if draws_R6 is not None:
            arrays["draws"] = draws_R6
        lines = [r for r, n in enumerate(top_n) if n is not None]
        if 0 < len(lines) < len(rows):
            arrays["lines"] = np.array(lines, np.int64)
        tensors = self._inputs.put(arrays) if arrays else {}
        adjusted_RV = logits_RV
        if is_edited:
            adjusted_RV = logits_RV.clone()
            apply_edits(adjusted_RV, tensors)
        if draws_R6 is None:
            token_ids_R, status_R = draw_rows(adjusted_RV, [_draw(row) for row in rows])
        else:
            truncated = any_truncated(draws_R6)
            token_ids_R, status_R = draw_packed(adjusted_RV, tensors["draws"], truncated=truncated)
        raw = RawLogprobs.of(logits_RV, token_ids_R, top_n, tensors.get("lines")) if lines else None
        return SampleResult.of(token_ids_R, status_R, raw)


def packed_draws(rows: Sequence[SampleRow]) -> NDArray[np.int64]:
    """How the rows are drawn, as `common.kernels.draws.draw_packed` takes it."""
    pack = _PLACE_AND_PARAMS.pack
    packed = [
        pack(row.seed, row.choice, row.output_index, (p := row.params).temperature, p.top_p, p.min_p, max(p.top_k, 0))
        for row in rows
    ]
    words_R7 = np.frombuffer(b"".join(packed), np.uint64).reshape(-1, 7)
    floats_R7, top_k_R = words_R7.view(np.float64), words_R7.view(np.int64)[:, 6]
    keys_R = noise_keys(words_R7[:, 0], words_R7[:, 1], words_R7[:, 2])
    return pack_columns(keys_R, floats_R7[:, 3], top_k_R, floats_R7[:, 4], floats_R7[:, 5])


def _draw(row: SampleRow) -> Draw:
    p = row.params
    if p.temperature == 0:
        return _GREEDY
    key = noise_key(row.seed, row.choice, row.output_index)
    return Draw(key, p.temperature, max(p.top_k, 0), p.top_p, p.min_p)
