"""Bring tokens to their experts and the results back.

    route -> dispatch: rows in the order of the experts that are here -> experts -> combine: a row per token

A dispatcher owns both ways, so that one that moves tokens between ranks (all-to-all, DeepEP) can take the place of
the local one: what it knows about a step it keeps in its `Sent`.

Shape letters: T tokens, K experts of a token, P rows (pairs of token and expert), E experts that are here, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from common.kernels.moe_ops import combine, sort_by_expert


@dataclass(frozen=True)
class Sent:
    """What the experts of this rank compute on: expert e has `rows_PD` from `starts_E1[e]` to `starts_E1[e + 1]`."""

    rows_PD: Tensor
    starts_E1: Tensor


SentT = TypeVar("SentT", bound=Sent)


class Dispatcher(Protocol[SentT]):
    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> SentT:
        """Rows for the experts; `ids_TK` int64, `weights_TK` fp32."""

    def combine(self, y_PD: Tensor, sent: SentT) -> Tensor:
        """Of each of this rank's tokens the weighted sum of its experts' results, in the order of K: [T, D]."""


@dataclass(frozen=True)
class LocalSent(Sent):
    places_P: Tensor
    weights_TK: Tensor


class LocalDispatcher:
    """All experts are here: dispatch is a sort, combine a sum in fp32. Each token's sum has its own fixed order."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> LocalSent:
        starts_E1, order_P, places_P = sort_by_expert(ids_TK, self._num_experts)
        rows_PD = x_TD.index_select(0, order_P.div_(ids_TK.shape[1], rounding_mode="floor"))
        return LocalSent(rows_PD, starts_E1, places_P, weights_TK)

    def combine(self, y_PD: Tensor, sent: LocalSent) -> Tensor:
        return combine(y_PD, sent.places_P, sent.weights_TK)
