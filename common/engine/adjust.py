"""What requests change of their logits before the draw, of all rows of a step at once.

    rows -> flat arrays of places in [rows x vocabulary] and numbers -> one copy to the device -> a few operations

In the order of `common.engine.sampler`: bias, bans, grammar mask, repetition penalty, presence and frequency penalties.
Ids outside the vocabulary (media placeholders past its end) have no logit and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.batch import RowMasks, SampleRow
from common.engine.inputs import Arrays
from common.kernels.masks import forbid

_Part = tuple[NDArray[np.int64], "NDArray[np.float32] | float"]


def edits_of(rows: Sequence[SampleRow], vocab_size: int) -> Arrays:
    """Flat places and what happens there; only kinds that some row has.

    `bias_at`, `bias`: added. `banned_at`: -inf. `seen_at`, `repetition`: divided by it where positive, else
    multiplied; a place may come twice, with the same number. `used_at`, `cost`: subtracted.
    """
    bias: list[_Part] = []
    banned: list[_Part] = []
    seen: list[_Part] = []
    used: list[_Part] = []
    for r, row in enumerate(rows):
        p, first = row.params, r * vocab_size
        if p.logit_bias:
            values = {t: value for t, value in p.logit_bias if 0 <= t < vocab_size}
            bias.append((_known(values, vocab_size) + first, np.array(list(values.values()), np.float32)))
        if row.output_index < p.min_tokens:
            banned.append((_known(row.stop_ids, vocab_size) + first, 0.0))
        if p.repetition_penalty != 1.0:
            for ids in (row.prompt_ids, row.output_ids):
                seen.append((_known(ids, vocab_size) + first, p.repetition_penalty))
        if p.presence_penalty or p.frequency_penalty:
            unique, counts = np.unique(_known(row.output_ids, vocab_size), return_counts=True)
            cost = p.presence_penalty + p.frequency_penalty * counts
            used.append((unique + first, cost.astype(np.float32)))
    out: Arrays = {}
    for parts, at, name in (
        (bias, "bias_at", "bias"),
        (banned, "banned_at", ""),
        (seen, "seen_at", "repetition"),
        (used, "used_at", "cost"),
    ):
        if parts:
            out[at] = np.concatenate([ids for ids, _ in parts])
            if name:
                out[name] = np.concatenate(
                    [np.full(len(ids), v, np.float32) if isinstance(v, float) else v for ids, v in parts]
                )
    return out


def mask_arrays(masks: RowMasks | None, rows: int, vocab_size: int) -> Arrays:
    """Grammar masks as `apply_edits` takes them; ValueError if they do not fit `rows` rows of logits."""
    if masks is None or not len(masks.rows_G):
        return {}
    num_words = -(-vocab_size // 32)
    if masks.words_GW.dtype != np.int32 or masks.words_GW.shape != (len(masks.rows_G), num_words):
        found = f"{masks.words_GW.dtype} {list(masks.words_GW.shape)}"
        raise ValueError(f"masks must be int32 {[len(masks.rows_G), num_words]}, got {found}")
    if masks.rows_G.min() < 0 or masks.rows_G.max() >= rows:
        raise ValueError(f"masks are for rows {masks.rows_G.tolist()}; there are {rows}")
    return {"mask_rows": masks.rows_G, "mask_words": masks.words_GW}


def apply_edits(logits_RV: Tensor, edits: Mapping[str, Tensor]) -> None:
    """Change `logits_RV` (contiguous) in place. `edits`: arrays of `edits_of` and `mask_arrays`, on its device."""
    flat = logits_RV.view(-1)
    if "bias_at" in edits:
        flat.index_add_(0, edits["bias_at"], edits["bias"])
    if "banned_at" in edits:
        flat.index_fill_(0, edits["banned_at"], -torch.inf)
    if "mask_rows" in edits:
        forbid(logits_RV, edits["mask_rows"], edits["mask_words"])
    if "seen_at" in edits:
        x_K, penalty_K = flat[edits["seen_at"]], edits["repetition"]
        flat.index_copy_(0, edits["seen_at"], torch.where(x_K > 0, x_K / penalty_K, x_K * penalty_K))
    if "used_at" in edits:
        flat.index_add_(0, edits["used_at"], edits["cost"], alpha=-1)


def _known(ids: Iterable[int], vocab_size: int) -> NDArray[np.int64]:
    array = np.asarray(ids if isinstance(ids, Sequence) else list(ids), dtype=np.int64)
    return array[(array >= 0) & (array < vocab_size)]
