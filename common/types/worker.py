"""Workers as the cluster sees them. Plain data; the wire forms are in `common.rpc.codec`."""

from __future__ import annotations

import enum
import secrets

import msgspec


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODER = "encoder"


class WorkerState(enum.StrEnum):
    """STARTING -> READY <-> UNREADY, then DRAINING until the process ends."""

    STARTING = "starting"
    READY = "ready"
    UNREADY = "unready"
    DRAINING = "draining"


class WorkerRef(msgspec.Struct, frozen=True):
    """Identity of one worker process. `epoch` is random per process and compared for equality only."""

    worker_id: str
    epoch: int
    address: str


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    architecture: str
    model_hash: bytes
    max_model_len: int
    vocab_size: int
    dtype: str
    path: str
    served_names: tuple[str, ...] = ()
    embedding_size: int = 0  # elements of a vector; 0: the model generates text


class BlockStates(msgspec.Struct, frozen=True, kw_only=True):
    """KV ledger of one group, in blocks: the five states add up to `total`."""

    group: str
    total: int
    free: int
    live: int
    cached: int
    leased: int
    in_flight: int


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_available: int = 0
    steps: int = 0
    tokens_per_s: float = 0.0
    kv_states: tuple[BlockStates, ...] = ()
    transport_bytes: tuple[int, ...] = ()
    prefill_tokens_per_s: float = 0.0
    decode_step_ms: float = 0.0


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    ref: WorkerRef
    role: Role
    state: WorkerState
    model: ModelInfo
    http_address: str = ""
    host: str = ""
    pid: int = 0
    version: str = ""
    device: str = "cpu"
    transports: tuple[str, ...] = ()
    layout_fingerprint: bytes = b""
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    kv_block_size: int = 0
    min_remote_tokens: int = 0
    load: WorkerLoad = WorkerLoad()


def new_epoch() -> int:
    """A random non-zero 64-bit epoch."""
    return secrets.randbits(64) | 1
