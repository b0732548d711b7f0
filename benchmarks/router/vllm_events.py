"""KV events as vLLM's workers publish them, for vllm-router's `kv_aware`: msgpack over a ZeroMQ PUB socket.

A message has three parts: topic, sequence number (8 bytes, big-endian), batch. The wire is ZMTP 3.0 with the NULL
mechanism (rfc.zeromq.org/spec/23): a greeting of 64 bytes and a READY command each way, then frames. What a subscriber
says afterwards is not read: it gets everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from common.engine.messages import KvChange
from common.types.prefix import hash_keys

_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x05READY" + b"\x0bSocket-Type" + (3).to_bytes(4, "big") + b"PUB"


class Publisher:
    """One worker's. `block_tokens` is filled by whoever knows them: a block's prefix hash -> its tokens."""

    def __init__(self) -> None:
        self.block_tokens: dict[bytes, Sequence[int]] = {}
        self._seq = 0
        self._subscribers: set[asyncio.StreamWriter] = set()

    @property
    def num_subscribers(self) -> int:
        return len(self._subscribers)

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A subscriber's connection, to its end."""
        writer.write(_GREETING + _frame(_READY, 0x04))
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(len(_GREETING))
            _, size = await reader.readexactly(2)
            await reader.readexactly(size)
            self._subscribers.add(writer)
            while await reader.read(4096):
                pass
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self._subscribers.discard(writer)

    def publish(self, changes: Sequence[KvChange]) -> None:
        events = [self._event(change) for change in changes]
        batch = msgspec.msgpack.encode([time.time(), events])
        parts = (_frame(b"", 0x01), _frame(self._seq.to_bytes(8, "big"), 0x01), _frame(batch, 0x00))
        self._seq += 1
        for writer in self._subscribers:
            writer.writelines(parts)

    def _event(self, change: KvChange) -> dict[str, Any]:
        keys = hash_keys(change.hashes)
        if change.kind != "stored":
            return {"type": "BlockRemoved", "block_hashes": keys, "medium": "GPU"}
        return {
            "type": "BlockStored",
            "block_hashes": keys,
            "parent_block_hash": hash_keys([change.parent])[0] if change.parent else None,
            "token_ids": [token for block in change.hashes for token in self.block_tokens[block]],
            "block_size": change.block_size,
            "lora_id": None,
            "lora_name": None,
            "extra_keys": None,
            "medium": "GPU",
        }


def _frame(body: bytes, flags: int) -> bytes:
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | 0x02,)) + len(body).to_bytes(8, "big") + body
