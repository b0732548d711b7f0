"""Orders: KV that one worker (the owner) computes for another (the reader), as events and commands.

    PlaceOrder -> OrderAccepted -> OrderStarted -> OrderExtent ... -> OrderFinished
              `-> OrderFailed, at any point;  DropOrder or ReleaseLease from the reader, at any point

A lease is OFFERED from OrderStarted on; the reader's side of it is READING -> VERIFIED -> RELEASED, or
FAILED -> recompute. Events of an order come in turn, or the reader fails it.
"""

from __future__ import annotations

from common.types import EmbeddingHandle, Failure, Message
from common.types.prefix import TOKEN_NBYTES, unpack_tokens


class OrderAccepted(Message, frozen=True):
    order_id: int
    promised_tokens: int
    queue_tokens: int


class OrderStarted(Message, frozen=True):
    """Blocks are reserved. `cached_tokens` counts from position 0, whatever the reader has already."""

    order_id: int
    lease_id: int
    cached_tokens: int


class OrderExtent(Message, frozen=True):
    """Positions [start_position, start_position + num_tokens) of one group may be read.

    `digests` is flat [blocks, digests per block] in the owner's layout order.
    """

    order_id: int
    lease_id: int
    group: str
    start_position: int
    num_tokens: int
    block_ids: tuple[int, ...]
    prefix_hash: bytes
    digests: tuple[int, ...]


class OrderFinished(Message, frozen=True):
    order_id: int
    lease_id: int
    num_tokens: int
    queue_ms: float
    compute_ms: float


class OrderFailed(Message, frozen=True):
    order_id: int
    failure: Failure


OrderEvent = OrderAccepted | OrderStarted | OrderExtent | OrderFinished | OrderFailed


# -- what a reader asks: up from its engine, and down to the owner's --------------------------------
#
# `peer` is the key that this side's servicer gave the session. Up it stands for the owner, down for the reader.


class PlaceOrder(Message, frozen=True):
    """Compute KV of positions [start_position, num_tokens) and publish it. `remaining_s`: time left, 0 no limit.

    `packed_tokens`, as `pack_tokens` makes them: it passes through four processes, and only the last looks at them.
    """

    peer: int
    order_id: int
    request_id: str
    packed_tokens: bytes
    start_position: int
    adapter_id: str
    cache_salt: str
    embeddings: tuple[EmbeddingHandle, ...]
    priority: int
    remaining_s: float
    traceparent: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.packed_tokens) // TOKEN_NBYTES

    @property
    def token_ids(self) -> list[int]:
        return unpack_tokens(self.packed_tokens)


class DropOrder(Message, frozen=True):
    peer: int
    order_id: int


class ReleaseLease(Message, frozen=True):
    peer: int
    lease_id: int


class PeerVerdict(Message, frozen=True):
    """How a peer stands: state is ready, refused or lost; transport is what reads run over."""

    peer: int
    state: str
    transport: str
    detail: str


ReaderCommand = PlaceOrder | DropOrder | ReleaseLease | PeerVerdict
