from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from common.errors import NotFoundError, UnavailableError
from common.types import ModelInfo, Role, WorkerInfo, WorkerLoad, WorkerRef, WorkerState
from services.router.policy import Features, LocalLoad, choose

MODEL = ModelInfo(
    name="m",
    architecture="llama",
    model_hash=b"m" * 16,
    max_model_len=64,
    vocab_size=10,
    dtype="float32",
    path="",
    served_names=("alias",),
)
FEATURES = Features("m", 100)
IDLE = LocalLoad()


def worker(name: str, role: Role = Role.DECODE, state: WorkerState = WorkerState.READY, **load: Any) -> WorkerInfo:
    ref = WorkerRef(name, 1, f"{name}:1")
    return WorkerInfo(
        ref=ref, role=role, state=state, model=MODEL, max_num_seqs=10, kv_block_size=16, load=WorkerLoad(**load)
    )


def pick(*workers: WorkerInfo, local: LocalLoad = IDLE, features: Features = FEATURES, seed: int = 0) -> str:
    return choose(workers, local, features, random.Random(seed)).decode.ref.worker_id


def test_the_least_loaded_is_chosen() -> None:
    assert pick(worker("a", running=3), worker("b", running=1), worker("c", waiting=2)) == "b"
    assert pick(worker("a"), worker("b"), local=LocalLoad({"a": 1})) == "b"
    assert pick(worker("a", running=4), worker("b"), local=LocalLoad({"a": 1, "b": 5})) == "a"
    assert pick(worker("a", waiting_tokens=500), worker("b", waiting_tokens=50)) == "b"


def test_load_is_a_share_of_the_batch() -> None:
    small = msgspec.structs.replace(worker("small", running=4), max_num_seqs=8)
    large = msgspec.structs.replace(worker("large", running=8), max_num_seqs=64)
    assert pick(small, large) == "large"


def test_a_worker_without_room_for_the_prompt_comes_last() -> None:
    full = worker("full", kv_blocks_total=100, kv_blocks_available=2)
    assert pick(full, worker("busy", running=9, kv_blocks_total=100, kv_blocks_available=50)) == "busy"
    assert pick(full) == "full"


def test_ties_follow_the_random_source() -> None:
    workers = [worker(name) for name in "abc"]
    assert pick(*workers, seed=5) == pick(*workers, seed=5)
    counts = Counter(pick(*workers, seed=seed) for seed in range(300))
    assert min(counts.values()) > 60


def test_names_states_and_avoided_workers() -> None:
    assert pick(worker("a"), features=Features("alias", 1)) == "a"
    with pytest.raises(NotFoundError, match="`other` does not exist"):
        pick(worker("a"), features=Features("other", 1))
    for state in (WorkerState.STARTING, WorkerState.UNREADY, WorkerState.DRAINING):
        with pytest.raises(UnavailableError):
            pick(worker("a", state=state))
    with pytest.raises(UnavailableError):
        choose([worker("a")], IDLE, FEATURES, random.Random(0), avoid=[WorkerRef("a", 1, "a:1")])
    with pytest.raises(UnavailableError):
        pick(worker("p", Role.PREFILL))


def test_the_prefill_worker_is_of_the_same_model_and_least_loaded() -> None:
    decode = worker("d")
    assert choose([decode], IDLE, FEATURES, random.Random(0)).prefill is None
    other = msgspec.structs.replace(
        worker("x", Role.PREFILL), model=msgspec.structs.replace(MODEL, model_hash=b"x" * 16)
    )
    assert choose([decode, other], IDLE, FEATURES, random.Random(0)).prefill is None
    busy, idle = worker("p1", Role.PREFILL, waiting_tokens=900), worker("p2", Role.PREFILL)
    draining = worker("p3", Role.PREFILL, WorkerState.DRAINING)
    pair = choose([decode, other, busy, idle, draining], IDLE, FEATURES, random.Random(0))
    assert pair.prefill is not None
    assert pair.prefill.ref.worker_id == "p2"
    local = LocalLoad(prefill_tokens={"p2": 1000})
    pair = choose([decode, busy, idle], local, FEATURES, random.Random(0))
    assert pair.prefill is not None
    assert pair.prefill.ref.worker_id == "p1"
