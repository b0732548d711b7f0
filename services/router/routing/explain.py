"""Why a request went where it went, in the caller's words: for `x-nanodeploy-explain`."""

from __future__ import annotations

from typing import Any, Final

from common.types import Role
from services.router.routing.cost import ALONE, local_terms, remote_terms, stays
from services.router.routing.view import Choice, Features, Seat, Terms, View, hit_of

MAX_CANDIDATES: Final = 64


def explain(view: View, features: Features, choice: Choice, policy: str) -> dict[str, Any]:
    """The candidates with their predicted times, cheapest first, and the pair that was chosen.

    To be called with the view that the choice was made from. Times are predictions in milliseconds.
    """
    limits_s = (view.limit_s(Role.DECODE), view.limit_s(Role.PREFILL))
    found: list[tuple[Terms, Choice]] = []
    for seat in view.decode:
        hit = hit_of(features.hits, seat.bit)
        helpers = () if stays(seat, features, hit) else view.prefill.get(seat.worker.model.model_hash, ())
        if not (helpers and features.separate):
            terms = local_terms(seat, features, hit, limits_s[0], alone=ALONE if helpers else 1.0)
            found.append((terms, Choice(seat, None, hit, 0)))
        for helper in helpers:
            own = hit_of(features.hits, helper.bit)
            terms = remote_terms(seat, helper, features, hit, own, limits_s)
            found.append((terms, Choice(seat, helper, hit, own)))
    found.sort(key=lambda entry: entry[0].total_s)
    return {
        "policy": policy,
        "prompt_tokens": features.prompt_tokens,
        "hot_tokens": features.hot,
        "expected_output_tokens": features.output_tokens,
        "chosen": _pair(choice),
        "candidates": [_candidate(terms, pair, view) for terms, pair in found[:MAX_CANDIDATES]],
        "candidates_left_out": max(len(found) - MAX_CANDIDATES, 0),
    }


def _pair(choice: Choice) -> dict[str, str | None]:
    prefill = choice.prefill.worker.ref.worker_id if choice.prefill is not None else None
    return {"decode": choice.decode.worker.ref.worker_id, "prefill": prefill}


def _candidate(terms: Terms, choice: Choice, view: View) -> dict[str, Any]:
    computing = choice.prefill or choice.decode
    names = ("queue_ms", "prefill_ms", "transfer_ms", "decode_ms", "others_ms")
    return {
        **_pair(choice),
        "score": round(1e3 * terms.total_s, 3),
        "first_token_ms": round(1e3 * terms.ttft_s, 3),
        "terms": {name: round(1e3 * value, 3) for name, value in zip(names, terms, strict=True)},
        "cached_tokens": choice.decode_hit,
        "prefill_cached_tokens": choice.prefill_hit,
        "open_requests": round(choice.decode.open_requests),
        "queued_tokens": round(computing.queue_tokens),
        "index": _state(choice.decode),
        "above_its_share": choice.decode.recent_s > view.limit_s(choice.decode.worker.role),
    }


def _state(seat: Seat) -> str:
    return "EXACT" if seat.exact else "DEGRADED"
