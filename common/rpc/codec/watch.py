"""Membership as it travels from a controller to a watcher: a snapshot, then changes one revision apart.

Snapshot(incarnation, revision r) -> Change(r + 1) -> Change(r + 2) ... -> Snapshot, on a resync
Loads and Ping come in between and carry no new revision.
"""

from __future__ import annotations

import enum

import msgspec

from common.rpc.codec import checks
from common.rpc.codec.worker import load_from_proto, load_to_proto, worker_from_proto, worker_to_proto
from common.types import WorkerInfo, WorkerLoad
from nanodeploy.v1 import controller_pb2 as pb

# A controller with nothing to say sends a Ping this often; three missed ones mean that it is dead.
PING_INTERVAL_S = 2.0


class ChangeKind(enum.StrEnum):
    ADDED = "added"
    UPDATED = "updated"
    REMOVED = "removed"


class Snapshot(msgspec.Struct, frozen=True):
    """All workers at one revision. Another `incarnation` means that revisions began anew."""

    incarnation: str
    revision: int
    workers: tuple[WorkerInfo, ...]


class Change(msgspec.Struct, frozen=True):
    """`reason` of a removal: expired, deregistered or replaced."""

    revision: int
    kind: ChangeKind
    worker: WorkerInfo
    reason: str = ""


class LoadEntry(msgspec.Struct, frozen=True):
    worker_id: str
    epoch: int
    load: WorkerLoad


class Loads(msgspec.Struct, frozen=True):
    entries: tuple[LoadEntry, ...]


class Ping(msgspec.Struct, frozen=True):
    revision: int


WatchEvent = Snapshot | Change | Loads | Ping

_KIND_TO_WIRE: dict[ChangeKind, pb.ChangeKind] = {
    ChangeKind.ADDED: pb.CHANGE_KIND_ADDED,
    ChangeKind.UPDATED: pb.CHANGE_KIND_UPDATED,
    ChangeKind.REMOVED: pb.CHANGE_KIND_REMOVED,
}
_KIND_FROM_WIRE: dict[int, ChangeKind] = {number: kind for kind, number in _KIND_TO_WIRE.items()}


def watch_event_to_proto(event: WatchEvent) -> pb.WatchResponse:
    match event:
        case Snapshot():
            workers = [worker_to_proto(w) for w in event.workers]
            return pb.WatchResponse(
                snapshot=pb.WatchSnapshot(incarnation=event.incarnation, revision=event.revision, workers=workers)
            )
        case Change():
            return pb.WatchResponse(
                change=pb.WatchChange(
                    revision=event.revision,
                    kind=_KIND_TO_WIRE[event.kind],
                    worker=worker_to_proto(event.worker),
                    reason=event.reason,
                )
            )
        case Loads():
            entries = [
                pb.WorkerLoadEntry(worker_id=e.worker_id, epoch=e.epoch, load=load_to_proto(e.load))
                for e in event.entries
            ]
            return pb.WatchResponse(loads=pb.WatchLoads(entries=entries))
        case Ping():
            return pb.WatchResponse(ping=pb.WatchPing(revision=event.revision))


def watch_event_from_proto(response: pb.WatchResponse) -> WatchEvent:
    match response.WhichOneof("event"):
        case "snapshot":
            s = response.snapshot
            workers = tuple(worker_from_proto(w, f"snapshot.workers[{i}]") for i, w in enumerate(s.workers))
            return Snapshot(checks.identifier(s.incarnation, "snapshot.incarnation"), s.revision, workers)
        case "change":
            c = response.change
            kind = checks.enum_value(_KIND_FROM_WIRE, c.kind, "change.kind")
            return Change(c.revision, kind, worker_from_proto(c.worker, "change.worker"), c.reason)
        case "loads":
            return Loads(
                tuple(
                    LoadEntry(e.worker_id, e.epoch, load_from_proto(e.load, "loads.load"))
                    for e in response.loads.entries
                )
            )
        case "ping":
            return Ping(response.ping.revision)
        case _:
            raise checks.fail("event", "must be set")
