"""What passes between a gRPC process and its engine process: plain msgspec structs, no proto, no torch.

Down: requests, peers and orders. Up: deltas, orders to place, order events, load. The same orders travel up from
the engine that reads and down to the one that computes (owner); the same order events the other way.

    reader engine --PlaceOrder--> servicer ==gRPC==> servicer --PlaceOrder--> owner engine
    reader engine <--OrderEvent-- servicer <==gRPC== servicer <--OrderEvent-- owner engine
"""

from __future__ import annotations

import msgspec

from common.kvcache.layout import KVLayout
from common.kvtransfer.orders import DropOrder, OrderEvent, PeerVerdict, PlaceOrder, ReleaseLease
from common.kvtransfer.transport import Endpoint
from common.types import (
    BlockStates,
    ChoiceDelta,
    Failure,
    GenerationRequest,
    Message,
    RequestStats,
    TokenLogprobs,
    WorkerLoad,
    WorkerRef,
)

# -- down: to the engine -----------------------------------------------------------------------------


class Setup(Message, frozen=True):
    """First message to a new engine process: its role and the JSON of its worker and log configs."""

    role: str
    worker_json: bytes
    log_json: bytes


class Submit(Message, frozen=True):
    """Run a request. `remaining_s` is its time left (0: none). `prefill` is a peer key, 0 for here."""

    slot: int
    request: GenerationRequest
    remaining_s: float = 0.0
    prefill: int = 0


class Cancel(Message, frozen=True):
    """End requests, or one choice of each: `choices` is empty (all) or per slot, None for all."""

    slots: tuple[int, ...]
    choices: tuple[int | None, ...] = ()


class PeerReady(Message, frozen=True):
    """A prefill worker's session is up. `peer` is a number the servicer made for (worker, epoch)."""

    peer: int
    ref: WorkerRef
    layout: KVLayout
    endpoints: tuple[Endpoint, ...]
    lease_ttl_s: float


class PeerGone(Message, frozen=True):
    """The session broke: every order placed there has failed."""

    peer: int
    reason: str


class PeerEvent(Message, frozen=True):
    """An order event from a peer, for the engine that placed the order."""

    peer: int
    event: OrderEvent


class PeerComputes(Message, frozen=True):
    """A prefill worker's engine has gone on: orders placed there that hear nothing wait for their turn."""

    peer: int


class ReaderGone(Message, frozen=True):
    """A reader's session broke: its orders are cancelled; its leases run out by their own time."""

    reader: int


class GetLedger(Message, frozen=True):
    call_id: int
    with_blocks: bool


class Drain(Message, frozen=True):
    pass


class Shutdown(Message, frozen=True):
    pass


ToEngine = (
    Setup
    | Submit
    | Cancel
    | PeerReady
    | PeerGone
    | PeerEvent
    | PeerComputes
    | PlaceOrder
    | DropOrder
    | ReleaseLease
    | ReaderGone
    | GetLedger
    | Drain
    | Shutdown
)


# -- up: from the engine -----------------------------------------------------------------------------


class EngineProgress(Message, frozen=True):
    """A long step of the start: `done` of `total` (bytes for weights). Once ready: a step is under way."""

    stage: str
    done: int
    total: int


class EngineReady(Message, frozen=True):
    """The model is loaded and the self-test made a token (or computed a block and read it back)."""

    layout: KVLayout
    endpoints: tuple[Endpoint, ...]
    max_model_len: int
    vocab_size: int
    architecture: str
    dtype: str
    device: str
    lease_ttl_s: float
    pid: int
    embedding_size: int = 0  # elements of a vector; 0: the model generates


class DeltaRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    slot: int
    delta: ChoiceDelta


class StatsOf(msgspec.Struct, frozen=True, array_like=True):
    slot: int
    stats: RequestStats


class FailureOf(msgspec.Struct, frozen=True, array_like=True):
    slot: int
    failure: Failure


class PromptLogprobsOf(msgspec.Struct, frozen=True, array_like=True):
    slot: int
    logprobs: TokenLogprobs


def prompt_logprobs_nbytes(num_tokens: int, top_n: int) -> int:
    """At most so many bytes on the wire: a float each, and an id of up to 5 bytes for each alternative."""
    return num_tokens * (4 + 9 * top_n)


class Deltas(Message, frozen=True):
    """All that one step brought. A request ends by a finish on every choice or by one failure."""

    step: int
    rows: tuple[DeltaRow, ...] = ()
    failures: tuple[FailureOf, ...] = ()
    stats: tuple[StatsOf, ...] = ()
    prompt_logprobs: tuple[PromptLogprobsOf, ...] = ()


class ReaderEvent(Message, frozen=True):
    """An order event for the session `reader`."""

    reader: int
    event: OrderEvent


class PeerTraffic(msgspec.Struct, frozen=True, array_like=True):
    peer: int
    transport: str
    bytes_read: int
    reads: int
    digest_mismatches: int


class LabelledCounter(msgspec.Struct, frozen=True, array_like=True):
    """A counter with one label: (value of the label, count since start) of each of its series."""

    name: str
    label: str
    values: tuple[tuple[str, float], ...]


class EngineLoad(Message, frozen=True):
    """Sent about once a second and whenever the engine turns idle: progress as well as load.

    `counters` and `histograms` feed Prometheus in the gRPC process: (name, value since start) and
    (name, observations since the last message); `labelled` are counters too.
    """

    load: WorkerLoad
    peers: tuple[PeerTraffic, ...]
    counters: tuple[tuple[str, float], ...] = ()
    histograms: tuple[tuple[str, tuple[float, ...]], ...] = ()
    labelled: tuple[LabelledCounter, ...] = ()


class LedgerBlock(msgspec.Struct, frozen=True, array_like=True):
    group: str
    block_id: int
    state: str
    owner: str
    age_ms: int
    tier: str = "device"


class Ledger(Message, frozen=True):
    call_id: int
    groups: tuple[BlockStates, ...]
    blocks: tuple[LedgerBlock, ...]


class KvChange(msgspec.Struct, frozen=True, array_like=True):
    """`kind`: stored, removed or cleared (all groups). Neighbours of one chain are told together."""

    kind: str
    group: str = ""
    parent: bytes = b""
    hashes: tuple[bytes, ...] = ()
    block_size: int = 0


class KvChanges(Message, frozen=True):
    """What entered and left the prefix indexes since the last message, in order."""

    changes: tuple[KvChange, ...]


class EngineFatal(Message, frozen=True):
    """The engine cannot go on (bad checkpoint, out of memory at start, failed self-test); it exits."""

    failure: Failure


FromEngine = (
    EngineProgress
    | EngineReady
    | Deltas
    | PlaceOrder
    | DropOrder
    | ReleaseLease
    | PeerVerdict
    | ReaderEvent
    | EngineLoad
    | Ledger
    | KvChanges
    | EngineFatal
)
