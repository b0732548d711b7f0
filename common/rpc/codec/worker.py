"""Workers as the cluster sees them: WorkerRef, ModelInfo, WorkerLoad, WorkerInfo."""

from __future__ import annotations

from common.rpc.codec import checks
from common.types import BlockStates, ModelInfo, Role, WorkerInfo, WorkerLoad, WorkerRef, WorkerState
from nanodeploy.v1 import types_pb2 as pb

_ROLE_TO_WIRE: dict[Role, pb.WorkerRole] = {
    Role.PREFILL: pb.WORKER_ROLE_PREFILL,
    Role.DECODE: pb.WORKER_ROLE_DECODE,
    Role.ENCODER: pb.WORKER_ROLE_ENCODER,
}
_ROLE_FROM_WIRE: dict[int, Role] = {number: role for role, number in _ROLE_TO_WIRE.items()}
_STATE_TO_WIRE: dict[WorkerState, pb.WorkerState] = {
    WorkerState.STARTING: pb.WORKER_STATE_STARTING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.UNREADY: pb.WORKER_STATE_UNREADY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
}
_STATE_FROM_WIRE: dict[int, WorkerState] = {number: state for state, number in _STATE_TO_WIRE.items()}


def state_to_proto(state: WorkerState) -> pb.WorkerState:
    return _STATE_TO_WIRE[state]


def state_from_proto(state: int, field: str = "state") -> WorkerState:
    return checks.enum_value(_STATE_FROM_WIRE, state, field)


def ref_to_proto(ref: WorkerRef) -> pb.WorkerRef:
    return pb.WorkerRef(worker_id=ref.worker_id, epoch=ref.epoch, address=ref.address)


def ref_from_proto(ref: pb.WorkerRef, field: str = "ref") -> WorkerRef:
    checks.identifier(ref.worker_id, f"{field}.worker_id")
    if ref.epoch == 0:
        raise checks.fail(f"{field}.epoch", "must be set")
    checks.address(ref.address, f"{field}.address")
    return WorkerRef(ref.worker_id, ref.epoch, ref.address)


def model_to_proto(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        name=model.name,
        served_names=model.served_names,
        architecture=model.architecture,
        model_hash=model.model_hash,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        path=model.path,
        embedding_size=model.embedding_size,
    )


def model_from_proto(model: pb.ModelInfo, field: str = "model") -> ModelInfo:
    """The hash may be empty: a worker that starts has not read its checkpoint yet."""
    if not model.name:
        raise checks.fail(f"{field}.name", "must be set")
    return ModelInfo(
        name=checks.short_text(model.name, f"{field}.name"),
        served_names=tuple(model.served_names),
        architecture=model.architecture,
        model_hash=checks.hash_bytes(model.model_hash, f"{field}.model_hash", may_be_empty=True),
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        path=model.path,
        embedding_size=model.embedding_size,
    )


def block_states_to_proto(states: BlockStates) -> pb.KvBlockStates:
    return pb.KvBlockStates(
        group=states.group,
        total=states.total,
        free=states.free,
        live=states.live,
        cached=states.cached,
        leased=states.leased,
        in_flight=states.in_flight,
    )


def block_states_from_proto(states: pb.KvBlockStates) -> BlockStates:
    """The five states are not required to add up here: a broken ledger must be seen, not refused."""
    return BlockStates(
        group=states.group,
        total=states.total,
        free=states.free,
        live=states.live,
        cached=states.cached,
        leased=states.leased,
        in_flight=states.in_flight,
    )


def load_to_proto(load: WorkerLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        kv_blocks_total=load.kv_blocks_total,
        kv_blocks_available=load.kv_blocks_available,
        steps=load.steps,
        tokens_per_s=load.tokens_per_s,
        kv_states=[block_states_to_proto(s) for s in load.kv_states],
        transport_bytes=load.transport_bytes,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_ms=load.decode_step_ms,
    )


def load_from_proto(load: pb.WorkerLoad, field: str = "load") -> WorkerLoad:
    return WorkerLoad(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        kv_blocks_total=load.kv_blocks_total,
        kv_blocks_available=load.kv_blocks_available,
        steps=load.steps,
        tokens_per_s=checks.finite(load.tokens_per_s, f"{field}.tokens_per_s"),
        kv_states=tuple(block_states_from_proto(s) for s in load.kv_states),
        transport_bytes=tuple(load.transport_bytes),
        prefill_tokens_per_s=checks.finite(load.prefill_tokens_per_s, f"{field}.prefill_tokens_per_s"),
        decode_step_ms=checks.finite(load.decode_step_ms, f"{field}.decode_step_ms"),
    )


def worker_to_proto(worker: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        ref=ref_to_proto(worker.ref),
        role=_ROLE_TO_WIRE[worker.role],
        state=_STATE_TO_WIRE[worker.state],
        model=model_to_proto(worker.model),
        http_address=worker.http_address,
        host=worker.host,
        pid=worker.pid,
        version=worker.version,
        device=worker.device,
        transports=worker.transports,
        layout_fingerprint=worker.layout_fingerprint,
        max_num_seqs=worker.max_num_seqs,
        max_num_batched_tokens=worker.max_num_batched_tokens,
        load=load_to_proto(worker.load),
        kv_block_size=worker.kv_block_size,
        min_remote_tokens=worker.min_remote_tokens,
    )


def worker_from_proto(worker: pb.WorkerInfo, field: str = "worker") -> WorkerInfo:
    if worker.http_address:
        checks.address(worker.http_address, f"{field}.http_address")
    return WorkerInfo(
        ref=ref_from_proto(worker.ref, f"{field}.ref"),
        role=checks.enum_value(_ROLE_FROM_WIRE, worker.role, f"{field}.role"),
        state=state_from_proto(worker.state, f"{field}.state"),
        model=model_from_proto(worker.model, f"{field}.model"),
        http_address=worker.http_address,
        host=checks.short_text(worker.host, f"{field}.host"),
        pid=worker.pid,
        version=checks.short_text(worker.version, f"{field}.version"),
        device=checks.short_text(worker.device, f"{field}.device"),
        transports=tuple(worker.transports),
        layout_fingerprint=checks.hash_bytes(
            worker.layout_fingerprint, f"{field}.layout_fingerprint", may_be_empty=True
        ),
        max_num_seqs=worker.max_num_seqs,
        max_num_batched_tokens=worker.max_num_batched_tokens,
        load=load_from_proto(worker.load, f"{field}.load"),
        kv_block_size=worker.kv_block_size,
        min_remote_tokens=worker.min_remote_tokens,
    )
