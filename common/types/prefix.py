"""Prefix hashing: one keyed chain over units of 16 tokens, shared by router, workers and KV events.

hash(0) = H(key = SCHEMA, salt);  hash(i) = H(key = hash(i-1), tokens of unit i as little-endian int32,
and the media hashes whose rows start in the unit). A prefix hash therefore names every token before it,
the model, the adapter, the cache salt and the media. Block sizes are multiples of `UNIT`.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import xor

UNIT = 16
HASH_NBYTES = 16
TOKEN_NBYTES = 4
_SCHEMA = b"nanodeploy-prefix-1"
_STATE_FACTOR = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_STRIDE = UNIT * TOKEN_NBYTES


def root_hash(model_hash: bytes, adapter_id: str = "", cache_salt: str = "") -> bytes:
    """Start of the chain: 16 bytes that depend on all that must not be shared."""
    h = hashlib.blake2b(key=_SCHEMA, digest_size=HASH_NBYTES)
    for part in (model_hash, adapter_id.encode(), cache_salt.encode()):
        h.update(len(part).to_bytes(4, "little"))
        h.update(part)
    return h.digest()


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32, one after the other: what is hashed, and what carries a whole prompt."""
    packed = array.array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """What `pack_tokens` packed. ValueError for bytes that are no whole ids."""
    ids = array.array("i")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def _unit_hash(parent: bytes, raw: bytes, start: int, media: Sequence[tuple[int, bytes]]) -> bytes:
    h = hashlib.blake2b(raw, key=parent, digest_size=HASH_NBYTES)
    for position, media_hash in media:
        if start <= position < start + len(raw) // TOKEN_NBYTES:
            h.update((position - start).to_bytes(4, "little"))
            h.update(media_hash)
    return h.digest()


def extend_chain(
    chain: list[bytes],
    token_ids: Sequence[int],
    media: Sequence[tuple[int, bytes]] = (),
    num_tokens: int | None = None,
) -> None:
    """Append to `chain` (whose first entry is the root) the hashes of all whole units of `token_ids`.

    `num_tokens`: of the first so many alone.

    chain[i] is the hash of the first i * UNIT tokens. Units hashed before are not hashed again.
    `media` holds (position, media hash) pairs.
    """
    done = len(chain) - 1
    total = (len(token_ids) if num_tokens is None else min(num_tokens, len(token_ids))) // UNIT
    if total <= done:
        return
    raw = pack_tokens(token_ids[done * UNIT : total * UNIT])
    parent, blake2b = chain[-1], hashlib.blake2b
    for at in range(0, len(raw), _STRIDE):
        if media:
            parent = _unit_hash(parent, raw[at : at + _STRIDE], done * UNIT + at // TOKEN_NBYTES, media)
        else:
            parent = blake2b(raw[at : at + _STRIDE], key=parent, digest_size=HASH_NBYTES).digest()
        chain.append(parent)


def hash_at(
    chain: Sequence[bytes],
    token_ids: Sequence[int],
    num_tokens: int,
    media: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """Prefix hash of the first `num_tokens` tokens; a part of a unit is hashed as it is.

    `chain` must cover the whole units before it.
    """
    units, rest = divmod(num_tokens, UNIT)
    if not rest:
        return chain[units]
    return _unit_hash(chain[units], pack_tokens(token_ids[units * UNIT : num_tokens]), units * UNIT, media)


class LazyChain:
    """A chain that is hashed only as far as somebody asks: whoever looks a prompt up stops at the first miss."""

    __slots__ = ("_hashes", "_media", "_raw", "_token_ids")

    _PACK = 64  # units packed at a time

    def __init__(self, root: bytes, token_ids: Sequence[int], media: Sequence[tuple[int, bytes]] = ()) -> None:
        self._hashes = [root]
        self._token_ids = token_ids
        self._media = media
        self._raw = b""

    def at(self, units: int) -> bytes:
        """The hash of the first `units` units, which the tokens must have."""
        hashes = self._hashes
        for i in range(len(hashes) - 1, units):
            place = i % self._PACK
            if not place:
                self._raw = pack_tokens(self._token_ids[i * UNIT : (i + self._PACK) * UNIT])
            hashes.append(
                _unit_hash(hashes[-1], self._raw[place * _STRIDE : (place + 1) * _STRIDE], i * UNIT, self._media)
            )
        return hashes[units]


def hash_keys(hashes: Iterable[bytes]) -> list[int]:
    """The first 8 bytes of each prefix hash, as an int: what is kept of one where millions are."""
    return array.array("Q", b"".join(hashes))[::2].tolist()


def keys_digest(keys: Iterable[int], *, states: bool) -> int:
    """What these keys add to the digest of a set of them, or take from it: order does not matter.

    Copies of states count under another factor than blocks with the same prefix.
    """
    if states:
        keys = ((key * _STATE_FACTOR) & _MASK for key in keys)
    return reduce(xor, keys, 0)
