"""Submits of a decode stream, put together from serialised parts.

A message inside another is its bytes behind their length
(https://protobuf.dev/programming-guides/encoding/#submessages), so a part that is serialised already need not be copied
message by message into the next one: for a prompt of 512 tokens that is half the cost of sending it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from common.rpc.codec.request import request_to_proto
from common.rpc.codec.worker import ref_to_proto
from common.types import GenerationRequest, WorkerRef
from nanodeploy.v1 import decode_pb2 as pb

_BYTES: Final = 2  # wire type of what has a length
_REQUEST: Final = bytes([pb.SubmitItem.REQUEST_FIELD_NUMBER << 3 | _BYTES])
_ITEM: Final = bytes([pb.StreamSubmit.ITEMS_FIELD_NUMBER << 3 | _BYTES])
_SUBMIT: Final = bytes([pb.StreamRequest.SUBMIT_FIELD_NUMBER << 3 | _BYTES])


def submit_item(request: GenerationRequest, prefill: WorkerRef | None, now_s: float) -> bytes:
    """A serialised `SubmitItem`."""
    item = _framed(_REQUEST, request_to_proto(request, now_s).SerializeToString())
    return item if prefill is None else item + pb.SubmitItem(prefill=ref_to_proto(prefill)).SerializeToString()


def submit_message(items: Sequence[bytes]) -> bytes:
    """A serialised `StreamRequest` of serialised `SubmitItem`s."""
    return _framed(_SUBMIT, b"".join([_framed(_ITEM, item) for item in items]))


def _framed(tag: bytes, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"%b%b%b" % (tag, bytes(length), body)
