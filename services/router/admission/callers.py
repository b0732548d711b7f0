"""Who asks: API keys, and what a router remembers of each.

A key is looked up by its SHA-256, the only form in which it is kept: keys are long and random, so that a slow hash
would protect nothing. What a header stood for is cached, which makes the check of a known key one look-up.

Keys come from the settings (static, without limits) and from the controller (`follower`), in one table. With no key
in either the API is open, unless `require_api_key` says otherwise; once there was a key, it stays closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from common.errors import UnauthenticatedError, UnavailableError
from common.types.keys import hash_of_setting, hashed_key
from services.router.admission.meters import KeyMeters

Headers = Iterable[tuple[bytes, bytes]]

MAX_CACHED: Final = 4096  # headers that stood for a key
MAX_PRIORITY: Final = 2**31 - 1
_MISSING = (
    "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


class Caller:
    """One key, or everybody where the API is open. `key_id` is empty then, and nothing is limited or apart."""

    __slots__ = ("_salts", "key_id", "meters", "priority", "tenant")

    def __init__(self, key_id: str = "", tenant: str = "", priority: int = 0, meters: KeyMeters | None = None) -> None:
        self.key_id = key_id
        self.tenant = tenant
        self.priority = priority  # smaller runs first
        self.meters = meters  # None: no limits
        self._salts = _salt(tenant, "") if tenant else ""

    def salt(self, own: str) -> str:
        """The cache salt of a request that brings `own`: prefixes are shared within the tenant alone."""
        if not self.tenant:
            return own
        return _salt(self.tenant, own) if own else self._salts

    def lowered(self, wanted: int) -> int:
        """A request's priority: the key's, or later by as much as its holder asks for; never sooner."""
        return min(self.priority + max(0, wanted), MAX_PRIORITY) if self.key_id else wanted


def _salt(tenant: str, own: str) -> str:
    """Not to be met by any other tenant's own salt: the tenant is the hash's key."""
    key = hashlib.blake2b(tenant.encode(), digest_size=32).digest()
    return hashlib.blake2b(own.encode(), digest_size=16, key=key).hexdigest()


ANYONE: Final = Caller()


class Callers:
    """The table of keys. `caller` is called for every request."""

    def __init__(self, static: Iterable[str], *, admin_token: str = "", required: bool = False) -> None:
        """`static`: keys, or `sha256:` and their hash. `admin_token` is a key as well, and closes nothing."""
        self._static = {hashed: Caller(hashed[:12], hashed[:32]) for hashed in map(hash_of_setting, static)}
        if admin_token:
            self._static[hashed_key(admin_token)] = Caller("admin", "admin")
        self._required = required or any(caller.key_id != "admin" for caller in self._static.values())
        self._stored: dict[str, Caller] = {}
        self._cache: dict[bytes, Caller] = {}
        self.known = not admin_token  # False: whether the controller has keys is not known yet

    @property
    def closed(self) -> bool:
        return self._required or bool(self._stored)

    def caller(self, headers: Headers) -> Caller:
        """Raises `UnauthenticatedError`; `UnavailableError` while it is not known whether keys are needed."""
        given = b""
        for name, value in headers:
            if name == b"authorization":
                given = value
                break
            if name == b"x-api-key":  # Anthropic's clients
                given = b"Bearer " + value
        found = self._cache.get(given)
        return found if found is not None else self._look_up(given)

    def _look_up(self, given: bytes) -> Caller:
        kind, _, secret = given.decode("latin-1").strip().partition(" ")
        hashed = hashed_key(secret.strip()) if kind.lower() == "bearer" and secret.strip() else ""
        found = self._static.get(hashed) or self._stored.get(hashed)
        if found is not None and (found.meters is None or not found.meters.key.revoked):
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[given] = found
            return found
        if not self.known and not self._required:
            raise UnavailableError("API keys are not known yet: no controller has told of them")
        if not self.closed:
            return ANYONE
        if not hashed:
            raise UnauthenticatedError(_MISSING)
        raise UnauthenticatedError("Incorrect API key provided.")

    def again(self, key_id: str, tenant: str) -> Caller:
        """Who asked for a batch, now that it runs; a key that is gone leaves its tenant."""
        for caller in (*self._static.values(), *self._stored.values()):
            if key_id and (caller.key_id, caller.tenant) == (key_id, tenant):
                return caller
        return Caller(key_id, tenant) if tenant else ANYONE

    def replace(self, keys: Mapping[str, KeyMeters]) -> None:
        """The controller's keys, by their hash."""
        self._stored = {
            hashed: Caller(meters.key.key_id, meters.key.tenant, meters.key.priority, meters)
            for hashed, meters in keys.items()
        }
        self._cache.clear()
        self.known = True
