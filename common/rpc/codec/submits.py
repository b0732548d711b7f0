"""Submits of a decode stream, put together from serialised parts.

A message inside another is its bytes behind their length
(https://protobuf.dev/programming-guides/encoding/#submessages), so a part that is serialised already need not be copied
message by message into the next one: for a prompt of 512 tokens that is half the cost of sending it. The other half was
the prompt itself, a call per token: here it is packed by a look-up. Each token takes four bytes, since a varint may be
padded (a byte of it says only whether another follows), and a row of equal width needs no loop.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from common.rpc.codec.request import request_to_proto
from common.rpc.codec.worker import ref_to_proto
from common.types import GenerationRequest, WorkerRef
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import types_pb2

_BYTES: Final = 2  # wire type of what has a length
_REQUEST: Final = bytes([pb.SubmitItem.REQUEST_FIELD_NUMBER << 3 | _BYTES])
_ITEM: Final = bytes([pb.StreamSubmit.ITEMS_FIELD_NUMBER << 3 | _BYTES])
_SUBMIT: Final = bytes([pb.StreamRequest.SUBMIT_FIELD_NUMBER << 3 | _BYTES])
_PROMPT: Final = bytes([types_pb2.GenerationRequest.PROMPT_TOKEN_IDS_FIELD_NUMBER << 3 | _BYTES])
_TABLE_IDS: Final = 1 << 18  # 1 MiB; few vocabularies have ids beyond it


def _padded(ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Varints of four bytes, least significant group first, of numbers below 2**28."""
    groups = ids & 0x7F | (ids & 0x3F80) << 1 | (ids & 0x1FC000) << 2 | (ids & 0xFE00000) << 3
    return (groups | 0x808080).astype("<u4")


_TABLE: Final = _padded(np.arange(_TABLE_IDS, dtype=np.uint32))


def submit_item(request: GenerationRequest, prefill: WorkerRef | None, now_s: float) -> bytes:
    """A serialised `SubmitItem`."""
    others = request_to_proto(request, now_s, prompt=False).SerializeToString()
    item = _framed(_REQUEST, others + _prompt(request.prompt_token_ids))
    return item if prefill is None else item + pb.SubmitItem(prefill=ref_to_proto(prefill)).SerializeToString()


def submit_message(items: Sequence[bytes]) -> bytes:
    """A serialised `StreamRequest` of serialised `SubmitItem`s."""
    return _framed(_SUBMIT, b"".join([_framed(_ITEM, item) for item in items]))


def _prompt(token_ids: Sequence[int]) -> bytes:
    """The field of a serialised `GenerationRequest`."""
    try:
        return _framed(_PROMPT, _TABLE.take(np.frombuffer(array("I", token_ids), np.uint32)).tobytes())
    except IndexError:  # an id beyond the table
        return types_pb2.GenerationRequest(prompt_token_ids=token_ids).SerializeToString()


def _framed(tag: bytes, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"%b%b%b" % (tag, bytes(length), body)
