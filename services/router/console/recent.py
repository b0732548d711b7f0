"""The last requests of this router, for those who look at the dashboard: ids, sizes and times, never a text.

A request is noted once, when it has ended, in a ring of fixed length; what falls out of it is gone.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from typing import Final

import msgspec

from common.types import RequestStats
from services.router.admission.callers import Caller
from services.router.exchange import Exchange
from services.router.run import Run

KEPT: Final = 256


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """`number` counts from 1; `ended` is wall time in seconds; times are milliseconds since the request came.

    `stats` and `decode_worker` are the first prompt's.
    """

    number: int
    ended: float
    request_id: str
    model: str
    tenant: str
    code: str = ""  # of the error, empty when it was answered
    finish: tuple[str, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prepared_ms: float = 0.0  # body, template and tokenizer done
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    decode_worker: str = ""
    stats: RequestStats | None = None


class Recent:
    """One per router. `epoch` tells one process's numbers from another's that shares the port."""

    def __init__(self, kept: int = KEPT) -> None:
        self.epoch = secrets.token_hex(4)
        self.started = time.time()
        self.count = 0
        self._entries: deque[Entry] = deque(maxlen=kept)

    def answered(self, exchange: Exchange, run: Run, model: str, started_s: float, seconds: float) -> None:
        usage, stats = exchange.usage or run.usage(), run.stats
        self._add(
            Entry(
                number=self.count + 1,
                ended=time.time(),
                request_id=exchange.request_id,
                model=model,
                tenant=exchange.caller.tenant,
                finish=tuple(run.finishes),
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                prepared_ms=1000 * (run.made_s - started_s),
                first_token_ms=1000 * (run.first_token_s - started_s),
                total_ms=1000 * seconds,
                decode_worker=run.decode_worker,
                stats=stats[0] if stats else None,
            )
        )

    def failed(self, exchange: Exchange, model: str, code: str, seconds: float) -> None:
        self._add(
            Entry(
                number=self.count + 1,
                ended=time.time(),
                request_id=exchange.request_id,
                model=model,
                tenant=exchange.caller.tenant,
                code=code,
                total_ms=1000 * seconds,
            )
        )

    def _add(self, entry: Entry) -> None:
        self.count += 1
        self._entries.append(entry)

    def seen_by(self, caller: Caller, since: int = 0) -> list[Entry]:
        """Those after number `since`, oldest first: of the caller's tenant, or all for the admin and in an open API."""
        everybody = not caller.tenant or caller.key_id == "admin"
        return [e for e in self._entries if e.number > since and (everybody or e.tenant == caller.tenant)]
