"""What one key may still spend at this router: slices of the controller's buckets, spent without asking.

    slice has enough -> spent                                     (no wait, no call)
    too little -> lease: granted -> spent; not granted -> 429, said again from memory until the time it named
    no controller -> the slice refills by itself, with this router's share of the limit; of a quota, its share of
                     what was left is all there is, and what of that was spent is told once a controller answers

Tokens are taken before a request runs, prompt and expected output, and settled when it has ended: what was too much
comes back, what was too little is a debt that the next lease pays.
"""

from __future__ import annotations

import math
from typing import Final

from common.types.keys import ApiKey, Grant, Lease, LeaseAsk, Want

QUOTA_SLICES: Final = 1000  # of a quota, so that little is stranded on a router that dies
MIN_QUOTA_SLICE: Final = 1000  # tokens
SPENT_S: Final = 5.0  # a quota that is spent is asked for again after this


class Slice:
    """One limit. `per_s` is how fast the whole of it comes back, 0 for a quota."""

    __slots__ = ("_denied", "_denied_until_s", "_filled_s", "left", "limit", "per_s", "pool", "taken")

    def __init__(self, limit: int, per_s: float, pool: float, now_s: float) -> None:
        self.limit = limit
        self.per_s = per_s
        self.left = 0.0
        self.pool = pool  # left with the controller when it last answered
        self.taken = 0.0  # of a quota's pool without the controller's knowledge
        self._filled_s = now_s
        self._denied = math.inf
        self._denied_until_s = 0.0

    def take(self, amount: int) -> bool:
        if self.left < amount:
            return False
        self.left -= amount
        return True

    def denied_s(self, amount: int, now_s: float) -> float:
        """Seconds until `amount` is there, as far as is known; 0: ask."""
        return max(0.0, self._denied_until_s - now_s) if amount >= self._denied else 0.0

    def ask(self, amount: int) -> Want:
        """What to lease to be able to take `amount`, some more with it."""
        need = max(0, math.ceil(amount - self.left))
        if not need:
            return Want()
        if not self.per_s:
            return Want(1, need + max(MIN_QUOTA_SLICE, self.limit // QUOTA_SLICES))
        return Want(min(need, self.limit), max(min(need, self.limit), round(self.per_s)))

    def put(self, grant: Grant, amount: int, now_s: float) -> None:
        self.left += grant.granted
        self.pool, self._filled_s = grant.left, now_s
        if self.left >= amount:
            self._denied_until_s = 0.0
        elif not self.per_s:
            self._denied, self._denied_until_s = amount, now_s + SPENT_S
        else:
            wait_s = max(grant.wait_ms / 1000, (amount - self.left - grant.left) / self.per_s)
            self._denied, self._denied_until_s = amount, now_s + wait_s

    def refill(self, share: float, now_s: float) -> None:
        """No controller: our share of what it had, and of what has come since."""
        came = (self.pool + (now_s - self._filled_s) * self.per_s) * share
        if self.per_s:
            self.left = min(self.left + came, max(self.left, self.limit * share))
        else:
            self.left += came
            self.taken += came
        self.pool, self._filled_s = 0.0, now_s

    def put_back(self) -> int:
        """A controller answers again: what was taken of its pool is its own; returns what of that is spent."""
        unspent = min(max(0.0, self.left), self.taken)
        self.left -= unspent
        self.pool += unspent
        spent, self.taken = round(self.taken - unspent), 0.0
        return spent

    def idle(self) -> int:
        """Takes what is not spent, to be given back."""
        whole = max(0, math.floor(self.left))
        self.left -= whole
        return whole

    @property
    def remaining(self) -> int:
        return max(0, math.floor(self.left + self.pool))

    def wait_s(self, amount: int, share: float) -> float:
        """Alone: seconds until `amount` has come."""
        return (amount - self.left) / (self.per_s * share) if self.per_s else 0.0

    @property
    def reset_s(self) -> float:
        """Until all of it is there again."""
        return max(0.0, self.limit - self.remaining) / self.per_s if self.per_s else 0.0


class KeyMeters:
    """A key's slices; None where it has no such limit."""

    __slots__ = ("key", "num_routers", "quota", "requests", "spent", "tokens", "used_s")

    def __init__(self, key: ApiKey, now_s: float) -> None:
        self.key = key
        self.requests = _rate(key.requests_per_minute, now_s)
        self.tokens = _rate(key.tokens_per_minute, now_s)
        left = max(0, key.quota_tokens - key.used_tokens)
        self.quota = Slice(key.quota_tokens, 0.0, left, now_s) if key.quota_tokens else None
        self.num_routers = 1
        self.spent = 0  # tokens that no lease covers and the controller has not been told of
        self.used_s = now_s

    @property
    def slices(self) -> tuple[Slice | None, Slice | None, Slice | None]:
        return self.requests, self.tokens, self.quota

    @property
    def share(self) -> float:
        return 1.0 / self.num_routers

    def take(self, requests: int, tokens: int, now_s: float) -> bool:
        """All or nothing. A quota lets a request pass while any of it is left."""
        self.used_s = now_s
        if self.requests is not None and self.requests.left < requests:
            return False
        if self.tokens is not None and self.tokens.left < tokens:
            return False
        if self.quota is not None and tokens:
            if self.quota.left < 1:
                return False
            self.quota.left -= tokens
        if self.requests is not None:
            self.requests.left -= requests
        if self.tokens is not None:
            self.tokens.left -= tokens
        return True

    def settle(self, reserved: int, spent: int) -> None:
        """A request that took `reserved` tokens has ended with `spent`."""
        if self.tokens is not None:
            self.tokens.left += reserved - spent
        if self.quota is not None:
            self.quota.left += reserved - spent
        else:
            self.spent += spent

    def ask(self, requests: int, tokens: int) -> LeaseAsk:
        spent, self.spent = self.spent, 0
        return LeaseAsk(
            self.key.key_hash,
            Want() if self.requests is None else self.requests.ask(requests),
            Want() if self.tokens is None else self.tokens.ask(tokens),
            Want() if self.quota is None or not tokens else self.quota.ask(tokens),
            spent,
        )

    def give_back(self, *, all_of_it: bool) -> LeaseAsk | None:
        """What an idle key holds (`all_of_it`), and what it spent; None if that is nothing."""
        parts = self.slices if all_of_it else (None, None, None)
        requests, tokens, quota = (Want(give_back=0 if part is None else part.idle()) for part in parts)
        spent, self.spent = self.spent, 0
        if not (spent or requests.give_back or tokens.give_back or quota.give_back):
            return None
        return LeaseAsk(self.key.key_hash, requests, tokens, quota, spent)

    def late(self, lease: Lease) -> None:
        """An answer long after its call. What it brings of a rate has come again by itself."""
        if self.quota is not None:
            self.quota.left += lease.quota.granted

    def put(self, lease: Lease, requests: int, tokens: int, now_s: float) -> None:
        self.num_routers = max(1, lease.num_routers)
        if self.requests is not None:
            self.requests.put(lease.requests, requests, now_s)
        if self.tokens is not None:
            self.tokens.put(lease.tokens, tokens, now_s)
        if self.quota is not None and tokens:
            self.quota.put(lease.quota, 1, now_s)

    def refill(self, now_s: float) -> None:
        for part in self.slices:
            if part is not None:
                part.refill(self.share, now_s)

    def found_again(self) -> None:
        """A controller answers again."""
        if self.quota is not None:
            self.spent += self.quota.put_back()

    def update(self, key: ApiKey, now_s: float) -> None:
        """The key's record as it is now: what is in hand stays, with limits that stay."""
        fresh = KeyMeters(key, now_s)
        if key.requests_per_minute != self.key.requests_per_minute:
            self.requests = fresh.requests
        if key.tokens_per_minute != self.key.tokens_per_minute:
            self.tokens = fresh.tokens
        if key.quota_tokens != self.key.quota_tokens:
            self.quota = fresh.quota
        self.key = key


def _rate(per_minute: int, now_s: float) -> Slice | None:
    return Slice(per_minute, per_minute / 60, per_minute, now_s) if per_minute else None
