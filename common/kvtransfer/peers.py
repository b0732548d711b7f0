"""The peers a reader knows: verdict on each pair of layouts, its connection, what was read over it.

    add -> REFUSED | CONNECTING --settle--> READY | REFUSED;   CONNECTING | READY --lose--> LOST --add--> ...

A transport may know only a moment after `connect` what it runs over; the verdict waits for that, for a limited
time, so that a demanded transport is demanded of what is really in use.
A number stands for one (worker, epoch): a restarted worker comes under a new number, so that endpoints and
remote keys of the old process are never used for the new one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from common.config.schema import HandoffConfig
from common.errors import NanoDeployError
from common.kvcache.layout import KVLayout, compare
from common.kvtransfer.orders import PeerVerdict, ReaderCommand
from common.kvtransfer.plan import supplied_groups
from common.kvtransfer.reads import Reads
from common.kvtransfer.transport import Endpoint
from common.types import Clock, WorkerRef

SETTLE_POLL_S = 0.01
_UNSETTLED = ("/connecting", "/gone")


class PeerState(enum.StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"
    LOST = "lost"


class Traffic(msgspec.Struct, frozen=True):
    """What was read from one peer since it was announced."""

    peer: int
    worker_id: str
    transport: str
    state: str
    nbytes: int
    reads: int
    mismatches: int


@dataclass
class Peer:
    number: int
    ref: WorkerRef
    layout: KVLayout
    lease_ttl_s: float
    state: PeerState = PeerState.REFUSED
    cold: tuple[str, ...] = ()
    transport: str = ""
    transport_id: int = 0
    settle_by: float = math.inf
    session_up: bool = True
    nbytes: int = 0
    reads: int = 0
    mismatches: int = 0


class Peers:
    """All peers of one reader, by number. Emits a PeerVerdict at every change of state but removal."""

    def __init__(
        self,
        layout: KVLayout,
        reads: Reads,
        clock: Clock,
        config: HandoffConfig,
        emit: Callable[[ReaderCommand], None],
    ) -> None:
        self._layout = layout
        self._reads = reads
        self._clock = clock
        self._config = config
        self._emit = emit
        self._peers: dict[int, Peer] = {}
        self._by_transport: dict[int, Peer] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._peers

    def __getitem__(self, number: int) -> Peer:
        return self._peers[number]

    def by_transport(self, transport_id: int) -> Peer | None:
        return self._by_transport.get(transport_id)

    def usable(self, number: int) -> bool:
        peer = self._peers.get(number)
        return peer is not None and peer.state is PeerState.READY

    def can_tell(self, number: int) -> bool:
        """Is the peer's session up, so that it hears what is emitted?"""
        peer = self._peers.get(number)
        return peer is not None and peer.session_up

    def add(
        self, number: int, ref: WorkerRef, layout: KVLayout, endpoints: Sequence[Endpoint], lease_ttl_s: float
    ) -> None:
        """Judge a peer and begin to connect to it; the verdict is emitted once it is known."""
        peer = Peer(number, ref, layout, lease_ttl_s)
        old = self._peers.get(number)
        if old is not None:
            peer.nbytes, peer.reads, peer.mismatches = old.nbytes, old.reads, old.mismatches
        self._peers[number] = peer
        refusal, peer.cold = self._judge(layout)
        chosen = self._choose(endpoints)[: layout.tp_size]
        if not refusal and len(chosen) < layout.tp_size:
            offered = ", ".join(e.transport for e in endpoints) or "none"
            ranks = f" for {layout.tp_size} ranks" if layout.tp_size > 1 else ""
            refusal = f"transports: source offers {offered}{ranks}, reader uses {self._usable_transports()}"
        if not refusal:
            short = (self._short_memory(layout, endpoint) for endpoint in chosen)
            refusal = next(filter(None, short), "") or self._connect(peer, chosen)
        if refusal:
            self._say(peer, PeerState.REFUSED, refusal)
        else:
            self._settle(peer)

    def tend(self) -> None:
        """Give the verdict on peers whose transport is known by now."""
        for peer in [p for p in self._peers.values() if p.state is PeerState.CONNECTING]:
            self._settle(peer)

    def next_deadline(self) -> float:
        """When `tend` must run next, inf for never."""
        if any(p.state is PeerState.CONNECTING for p in self._peers.values()):
            return self._clock.now() + SETTLE_POLL_S
        return math.inf

    def lose(self, number: int, reason: str, *, tell: bool = True) -> None:
        """Destroy the peer's endpoint; without effect on one that has none."""
        peer = self._peers[number]
        if peer.state in (PeerState.READY, PeerState.CONNECTING):
            self._disconnect(peer)
            peer.state = PeerState.LOST
            if tell:
                self._say(peer, PeerState.LOST, reason)

    def remove(self, number: int) -> None:
        del self._peers[number]

    def count(self, number: int, nbytes: int, mismatch: bool) -> None:
        """A read ended; peers that are gone are not counted any more."""
        peer = self._peers.get(number)
        if peer is not None:
            peer.reads += 1
            peer.nbytes += nbytes
            peer.mismatches += mismatch

    def traffic(self) -> list[Traffic]:
        return [
            Traffic(p.number, p.ref.worker_id, p.transport, p.state.value, p.nbytes, p.reads, p.mismatches)
            for p in self._peers.values()
        ]

    def _judge(self, layout: KVLayout) -> tuple[str, tuple[str, ...]]:
        verdict = compare(layout, self._layout)
        if not verdict.ok:
            return verdict.reason, ()
        return "", verdict.cold_regions

    def _usable_transports(self) -> list[str]:
        return [t for t in self._config.transports if t == self._reads.name]

    def _choose(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Those of the transport in use, in the order of the source's ranks."""
        names = self._usable_transports()
        return [e for e in endpoints if e.transport in names]

    def _short_memory(self, layout: KVLayout, endpoint: Endpoint) -> str:
        handles = {h.group: h for h in endpoint.memory}
        for group in supplied_groups(layout, self._layout):
            need = layout.group(group).num_blocks * layout.block_nbytes(group)
            have = handles[group].nbytes if group in handles else 0
            if have < need:
                return f"endpoint.memory[{group}]: {have} bytes, the layout needs {need}"
        return ""

    def _connect(self, peer: Peer, endpoints: Sequence[Endpoint]) -> str:
        try:
            peer.transport_id = self._reads.connect(peer.layout, endpoints)
        except NanoDeployError as error:
            return f"endpoint.address: {error.message}"
        peer.state = PeerState.CONNECTING
        peer.settle_by = self._clock.now() + self._config.accept_timeout_s
        self._by_transport[peer.transport_id] = peer
        return ""

    def _settle(self, peer: Peer) -> None:
        peer.transport = self._reads.describe(peer.transport_id)
        required = self._config.require_transport
        if any(name.endswith(_UNSETTLED) for name in peer.transport.split("+")):
            if peer.settle_by <= self._clock.now():
                self.lose(peer.number, f"no answer within {self._config.accept_timeout_s} s")
        elif not all(name.startswith(required) for name in peer.transport.split("+")):
            self._disconnect(peer)
            why = f"require_transport: {required} is required, {peer.transport} reaches the peer"
            self._say(peer, PeerState.REFUSED, why)
        else:
            self._say(peer, PeerState.READY, f"cold regions: {', '.join(peer.cold)}" if peer.cold else "")

    def _disconnect(self, peer: Peer) -> None:
        del self._by_transport[peer.transport_id]
        self._reads.disconnect(peer.transport_id)

    def _say(self, peer: Peer, state: PeerState, detail: str) -> None:
        peer.state = state
        self._emit(PeerVerdict(peer.number, state.value, peer.transport, detail))
