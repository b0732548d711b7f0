"""Which workers get a request: one pure function of plain data.

Least loaded for now: the share of a decode worker's batch in use, as the worker reports it or as this router
knows it, whichever is more. What the router sent since the last report is thereby counted at once, and what other
routers sent is counted too. Ties are drawn from the random source passed in.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import NotFoundError, UnavailableError
from common.types import Role, WorkerInfo, WorkerRef, WorkerState


@dataclass(frozen=True)
class Features:
    """What the choice may depend on."""

    model: str
    prompt_tokens: int
    max_tokens: int = 0


@dataclass(frozen=True)
class LocalLoad:
    """What this router has sent and not got back: requests by decode worker, prompt tokens by prefill worker."""

    requests: Mapping[str, int] = field(default_factory=dict)
    prefill_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    decode: WorkerInfo
    prefill: WorkerInfo | None


def serves(worker: WorkerInfo, model: str) -> bool:
    return worker.model.name == model or model in worker.model.served_names


def choose(
    workers: Sequence[WorkerInfo],
    local: LocalLoad,
    features: Features,
    rng: random.Random,
    *,
    avoid: Collection[WorkerRef] = (),
) -> Pair:
    """The decode worker and the prefill worker (None: there is none, the decode worker does it).

    Only READY workers of the model; workers in `avoid` are never taken. Raises `NotFoundError` if no worker has
    the model, `UnavailableError` if none of those that have it can take the request now.
    """
    known = [w for w in workers if serves(w, features.model)]
    if not known:
        raise NotFoundError(f"The model `{features.model}` does not exist.", param="model")
    ready = [w for w in known if w.state is WorkerState.READY and w.ref not in avoid]
    decode = [w for w in ready if w.role is Role.DECODE]
    if not decode:
        raise UnavailableError(f"No decode worker for model `{features.model}` is ready.")
    chosen = min(decode, key=lambda w: (*_decode_load(w, local, features), rng.random()))
    prefill = [w for w in ready if w.role is Role.PREFILL and w.model.model_hash == chosen.model.model_hash]
    if not prefill:
        return Pair(chosen, None)
    return Pair(chosen, min(prefill, key=lambda w: (_prefill_load(w, local), rng.random())))


def _decode_load(worker: WorkerInfo, local: LocalLoad, features: Features) -> tuple[bool, float, float]:
    load = worker.load
    requests = max(load.running + load.waiting, local.requests.get(worker.ref.worker_id, 0))
    needed = features.prompt_tokens / max(worker.kv_block_size, 1)
    full = bool(load.kv_blocks_total) and load.kv_blocks_available < needed
    return full, requests / max(worker.max_num_seqs, 1), load.waiting_tokens


def _prefill_load(worker: WorkerInfo, local: LocalLoad) -> float:
    return max(worker.load.waiting_tokens, local.prefill_tokens.get(worker.ref.worker_id, 0))
