"""Reads of all ranks of one reader, told by the first (decision 19): every rank reads its own part of an extent.

    rank 0   connect, read, disconnect -> itself, and over a link of their own the others
    others   the same on their transport, in a thread beside their steps -> ended, lost, or what a peer is reached over

A read has ended when it has on every rank, and failed if it has on one. The blocks of a read are free of what ran
before on rank 0; on another rank they are once it has been told as much as rank 0 had told it then (`num_orders`).
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from common.errors import NanoDeployError, PeerLostError, RankLostError
from common.kvcache.layout import KVLayout
from common.kvtransfer.reads import Joined, Planned, RankReads, Wanted, together
from common.kvtransfer.transport import Endpoint, PeerDown, ReadResult, ReadStatus
from common.parallel.link import Link, LinkClosedError
from common.telemetry import get_logger
from common.types import Message

log = get_logger(__name__)

_SETTLE_S = 0.01
_IDLE_S = 1.0
_ORDERS_S = 10.0  # for a rank to do what it was told before a read
_UNSETTLED = "/connecting"


class ConnectPeer(Message, frozen=True):
    peer_id: int
    layout: KVLayout
    endpoints: tuple[Endpoint, ...]


class DisconnectPeer(Message, frozen=True):
    peer_id: int


class ReadExtent(Message, frozen=True):
    peer_id: int
    read_id: int
    wanted: Wanted
    num_orders: int


class Ended(Message, frozen=True):
    result: ReadResult


class Lost(Message, frozen=True):
    peer_id: int
    message: str


class Reached(Message, frozen=True):
    """What a peer is reached over, whenever that changes."""

    peer_id: int
    over: str


ToRank = ConnectPeer | DisconnectPeer | ReadExtent
FromRank = Ended | Lost | Reached


class _RankReads(Protocol):
    """`RankReads` with a descriptor to wait on."""

    @property
    def name(self) -> str: ...

    @property
    def wakeup_fd(self) -> int: ...

    def connect(self, layout: KVLayout, endpoints: Sequence[Endpoint]) -> int: ...

    def disconnect(self, peer_id: int) -> None: ...

    def describe(self, peer_id: int) -> str: ...

    def plan(self, peer_id: int, wanted: Wanted) -> Planned: ...

    def read(self, peer_id: int, read_id: int, planned: Planned) -> None: ...

    def poll(self) -> list[ReadResult | PeerDown]: ...


class RankedReads:
    """The reads of rank 0, and with them those of all ranks. `num_orders`: told to other ranks so far."""

    def __init__(self, own: RankReads, links: Sequence[Link], num_orders: Callable[[], int]) -> None:
        self._own = own
        self._links = list(links)
        self._num_orders = num_orders
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
        self._over: dict[int, list[str]] = {}
        self._joined: dict[int, Joined] = {}
        self._events: list[ReadResult | PeerDown] = []

    @property
    def name(self) -> str:
        return self._own.name

    def connect(self, layout: KVLayout, endpoints: Sequence[Endpoint]) -> int:
        peer_id = self._own.connect(layout, endpoints)
        self._over[peer_id] = [self.name + _UNSETTLED] * len(self._links)
        self._tell(ConnectPeer(peer_id, layout, tuple(endpoints)))
        return peer_id

    def disconnect(self, peer_id: int) -> None:
        del self._over[peer_id]
        self._own.disconnect(peer_id)
        self._tell(DisconnectPeer(peer_id))

    def describe(self, peer_id: int) -> str:
        return together([self._own.describe(peer_id), *self._over[peer_id]])

    def plan(self, peer_id: int, wanted: Wanted) -> Planned:
        return self._own.plan(peer_id, wanted)

    def read(self, peer_id: int, read_id: int, planned: Planned) -> None:
        self._joined[read_id] = Joined(read_id, 1 + len(self._links))
        try:
            self._own.read(peer_id, read_id, planned)
        except BaseException:
            del self._joined[read_id]
            raise
        self._tell(ReadExtent(peer_id, read_id, planned.wanted, self._num_orders()))

    def poll(self) -> list[ReadResult | PeerDown]:
        for event in self._own.poll():
            self._take(event)
        for index, link in enumerate(self._links):
            self._hear(index, link)
        events, self._events = self._events, []
        return events

    def _hear(self, index: int, link: Link) -> None:
        try:
            while link.wait(0):
                message = self._decoder.decode(link.receive()[1])
                match message:
                    case Ended():
                        self._take(message.result)
                    case Lost():
                        self._take(PeerDown(message.peer_id, message.message))
                    case Reached() if message.peer_id in self._over:
                        self._over[message.peer_id][index] = message.over
        except LinkClosedError:  # reads that are under way there would never end
            raise RankLostError(f"rank {index + 1} is gone: its reads have ended") from None

    def _take(self, event: ReadResult | PeerDown) -> None:
        if isinstance(event, PeerDown):
            if event.peer_id in self._over:
                self._events.append(event)
            return
        whole = self._joined[event.read_id].add(event)
        if whole is not None:
            del self._joined[event.read_id]
            self._events.append(whole)

    def _tell(self, message: ToRank) -> None:
        payload = self._encoder.encode(message)
        for link in self._links:
            with contextlib.suppress(LinkClosedError):  # the rank is gone: `poll` says so
                link.send(0, payload)


class ReadsLoop:
    """Another rank's side, in a thread of its own until the link ends. `on_start` is called in that thread.

    `await_orders(count, timeout_s)`: returns once the rank has done so many orders; False if the time is over.
    """

    def __init__(
        self,
        reads: _RankReads,
        link: Link,
        await_orders: Callable[[int, float], bool],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_start = on_start
        self._reads = reads
        self._link = link
        self._await_orders = await_orders
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
        self._ids: dict[int, int] = {}  # rank 0's number of a peer -> ours
        self._over: dict[int, str] = {}
        self._thread = threading.Thread(target=self._run, name="reads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The link has ended, or is ended here."""
        self._link.end()
        self._thread.join(_ORDERS_S + _IDLE_S)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.register(self._reads.wakeup_fd, select.POLLIN)
        try:
            self._on_start()
            while True:
                unsettled = any(over.endswith(_UNSETTLED) for over in self._over.values())
                poll.poll((_SETTLE_S if unsettled else _IDLE_S) * 1e3)
                while self._link.wait(0):
                    self._do(self._decoder.decode(self._link.receive()[1]))
                self._report()
        except LinkClosedError:
            return
        except Exception:
            log.exception("reads of a rank failed")
        finally:
            self._link.end()

    def _do(self, message: ToRank) -> None:
        match message:
            case ConnectPeer():
                self._connect(message)
            case DisconnectPeer():
                own = self._ids.pop(message.peer_id, None)
                self._over.pop(message.peer_id, None)
                if own is not None:
                    self._reads.disconnect(own)
            case ReadExtent():
                self._read(message)

    def _connect(self, message: ConnectPeer) -> None:
        self._over[message.peer_id] = ""
        try:
            self._ids[message.peer_id] = self._reads.connect(message.layout, message.endpoints)
        except (NanoDeployError, ValueError) as error:
            self._send(Lost(message.peer_id, str(error)))

    def _read(self, message: ReadExtent) -> None:
        try:
            if message.peer_id not in self._ids:
                raise PeerLostError("the peer is not connected")
            if not self._await_orders(message.num_orders, _ORDERS_S):
                raise PeerLostError(f"steps before the read have not ended within {_ORDERS_S:.0f} s")
            own = self._ids[message.peer_id]
            self._reads.read(own, message.read_id, self._reads.plan(own, message.wanted))
        except NanoDeployError as error:
            self._send(Ended(ReadResult(message.read_id, ReadStatus.FAILED, 0, 0.0, 0.0, error.message)))

    def _report(self) -> None:
        for event in self._reads.poll():
            if isinstance(event, ReadResult):
                self._send(Ended(event))
                continue
            number = next((n for n, own in self._ids.items() if own == event.peer_id), None)
            if number is not None:
                self._send(Lost(number, event.message))
        for number, own in self._ids.items():
            if (over := self._reads.describe(own)) != self._over[number]:
                self._over[number] = over
                self._send(Reached(number, over))

    def _send(self, message: FromRank) -> None:
        self._link.send(0, self._encoder.encode(message))
