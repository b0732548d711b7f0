"""Stored objects as plain data, and their protobuf forms."""

from __future__ import annotations

import re
from typing import NamedTuple

from common.rpc.codec import checks
from nanodeploy.v1 import objects_pb2 as pb

MAX_PARTS = 1_000_000
_OWNER = re.compile(r"[A-Za-z0-9_.\-]{0,128}")
_KIND = re.compile(r"[a-z][a-z\-]{0,31}")
_OBJECT_ID = re.compile(r"[A-Za-z0-9_.\-]{0,128}")


class ObjectKey(NamedTuple):
    """`owner` is empty for those without an API key. No part holds the ':' that joins them in storage."""

    kind: str
    owner: str
    id: str


class StoredObject(NamedTuple):
    """`num_parts` is 0 in lists."""

    id: str
    data: bytes
    version: int
    nbytes: int
    num_parts: int
    remaining_s: float
    holder: str


def key_to_proto(key: ObjectKey) -> pb.ObjectKey:
    return pb.ObjectKey(kind=key.kind, owner=key.owner, id=key.id)


def key_from_proto(proto: pb.ObjectKey, *, may_lack_id: bool = False) -> ObjectKey:
    if _KIND.fullmatch(proto.kind) is None:
        raise checks.fail("key.kind", f"is not a kind of object: {proto.kind[:64]!r}")
    if _OWNER.fullmatch(proto.owner) is None:
        raise checks.fail("key.owner", "must be at most 128 letters, digits, '_', '.' or '-'")
    if _OBJECT_ID.fullmatch(proto.id) is None or not (proto.id or may_lack_id):
        raise checks.fail("key.id", "must be 1 to 128 letters, digits, '_', '.' or '-'")
    return ObjectKey(proto.kind, proto.owner, proto.id)


def object_to_proto(stored: StoredObject) -> pb.StoredObject:
    return pb.StoredObject(
        id=stored.id,
        data=stored.data,
        version=stored.version,
        nbytes=stored.nbytes,
        num_parts=stored.num_parts,
        remaining_ms=max(0, round(stored.remaining_s * 1000)),
        holder=stored.holder,
    )


def object_from_proto(proto: pb.StoredObject) -> StoredObject:
    return StoredObject(
        proto.id,
        proto.data,
        proto.version,
        proto.nbytes,
        proto.num_parts,
        proto.remaining_ms / 1000,
        proto.holder,
    )
