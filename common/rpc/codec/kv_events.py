"""What a prefix cache holds, as it is told: KvEventBatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.rpc.codec import checks
from common.types import WorkerRef
from common.types.prefix import HASH_NBYTES
from nanodeploy.v1 import kv_events_pb2 as pb


class KvStep(NamedTuple):
    """Blocks (or copies of states) with these prefix hashes came (`stored`) or went."""

    stored: bool
    states: bool
    hashes: Sequence[bytes]
    group: str = ""
    block_size: int = 0
    parent: bytes = b""


class KvBatch(NamedTuple):
    """`digest` is of all that is held afterwards; see the proto for `reset` and `parts_left`."""

    seq: int
    digest: int
    steps: Sequence[KvStep] = ()
    reset: bool = False
    parts_left: int = 0


def kv_batch_to_proto(ref: WorkerRef, batch: KvBatch) -> pb.KvEventBatch:
    return pb.KvEventBatch(
        worker_id=ref.worker_id,
        epoch=ref.epoch,
        seq=batch.seq,
        events=[_step_to_proto(step) for step in batch.steps],
        digest=batch.digest,
        reset=batch.reset,
        parts_left=batch.parts_left,
    )


def _step_to_proto(step: KvStep) -> pb.KvEvent:
    if not step.stored:
        removed = pb.KvBlocksRemoved(group=step.group, prefix_hashes=step.hashes, states=step.states)
        return pb.KvEvent(removed=removed)
    stored = pb.KvBlocksStored(
        group=step.group,
        parent_hash=step.parent,
        prefix_hashes=step.hashes,
        block_size=step.block_size,
        states=step.states,
    )
    return pb.KvEvent(stored=stored)


def kv_batch_from_proto(batch: pb.KvEventBatch) -> KvBatch:
    steps = [_step_from_proto(event) for event in batch.events]
    return KvBatch(batch.seq, batch.digest, steps, batch.reset, batch.parts_left)


def _step_from_proto(event: pb.KvEvent) -> KvStep:
    match event.WhichOneof("event"):
        case "stored":
            stored = event.stored
            hashes = _hashes(stored.prefix_hashes, "stored")
            return KvStep(True, stored.states, hashes, stored.group, stored.block_size, stored.parent_hash)
        case "removed":
            removed = event.removed
            return KvStep(False, removed.states, _hashes(removed.prefix_hashes, "removed"), removed.group)
        case _:
            raise checks.fail("events", "must be stored or removed")


def _hashes(values: Sequence[bytes], field: str) -> list[bytes]:
    if any(len(value) != HASH_NBYTES for value in values):
        raise checks.fail(f"{field}.prefix_hashes", f"must be {HASH_NBYTES} bytes each")
    return list(values)
