"""API keys, what is asked of their limits, and a clock by hand."""

from __future__ import annotations

from typing import Any

from common.types.keys import ApiKey, LeaseAsk, hashed_key

TOKEN = "an-admin-token-for-tests"
KEY = "sk-nd-a-key-for-tests"


def key(secret: str = KEY, **fields: Any) -> ApiKey:
    return ApiKey(key_hash=hashed_key(secret), **fields)


def ask(api_key: ApiKey, **wants: Any) -> LeaseAsk:
    return LeaseAsk(api_key.key_hash, **wants)


class Ticking:
    t = 0.0

    def now(self) -> float:
        return self.t
