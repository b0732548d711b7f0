"""An API key as it is stored and as it travels: its hash and its limits, never itself."""

from __future__ import annotations

import hashlib

import msgspec

HASH_PREFIX = "sha256:"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """0 is no limit. `used_tokens` is what was spent of the quota, or at all where there is none."""

    key_hash: str  # SHA-256 of the key, hexadecimal
    name: str = ""
    tenant: str = ""  # shares cached prefixes
    priority: int = 0  # smaller runs first
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    quota_tokens: int = 0
    used_tokens: int = 0
    created_s: int = 0  # Unix time
    revoked: bool = False

    @property
    def key_id(self) -> str:
        """What it is called in lists and logs: it tells nothing of the key."""
        return self.key_hash[:12]


class Want(msgspec.Struct, frozen=True):
    """What a router asks of one limit: at least `need`, or nothing, and `want` if it is there."""

    need: int = 0
    want: int = 0
    give_back: int = 0


class Grant(msgspec.Struct, frozen=True):
    """The answer: units to spend, units left for everybody, and when `need` will be there if it was not."""

    granted: int = 0
    left: int = 0
    wait_ms: int = 0


class LeaseAsk(msgspec.Struct, frozen=True):
    key_hash: str
    requests: Want = Want()
    tokens: Want = Want()
    quota: Want = Want()
    spent_tokens: int = 0  # since the last one, that no slice covers


class Lease(msgspec.Struct, frozen=True):
    """`num_routers` have asked lately: each may spend its share alone while no controller answers."""

    key_hash: str
    requests: Grant
    tokens: Grant
    quota: Grant
    num_routers: int = 1


class KeyTable(msgspec.Struct, frozen=True):
    """All keys at a revision; `keys` is None where the reader has that revision. Another incarnation: it was lost."""

    incarnation: str
    revision: int
    keys: tuple[ApiKey, ...] | None = None


def hashed_key(secret: str) -> str:
    """SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def hash_of_setting(entry: str) -> str:
    """As `hashed_key`; in settings `sha256:` and a hash stand for a key. Never for what a caller sends."""
    given = entry.removeprefix(HASH_PREFIX)
    if given != entry and len(given) == 64 and set(given) <= set("0123456789abcdef"):
        return given
    return hashed_key(entry)
