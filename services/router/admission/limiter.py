"""What each key may spend, followed from the controller: the table of keys, slices of their limits, what comes back.

    following (a look every 2 s) -> no controller answers: alone, on the last table and our share of the limits
             ^------------------------- one answers again ----'

A storage that lost its keys (another incarnation) gets them back from us; until then the table stays, so that losing
the storage opens no API. A key that was revoked while no controller was reached is good until one is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import msgspec

from common.errors import InvalidRequestError, NanoDeployError, UnauthenticatedError, UnsupportedError
from common.rpc.tasks import end_tasks
from common.telemetry import get_logger
from common.types import Clock
from common.types.keys import ApiKey, KeyTable, Lease, LeaseAsk
from services.router.admission.callers import Caller, Callers
from services.router.admission.meters import KeyMeters, Slice
from services.router.errors import QuotaExceededError, RateLimitedError

FOLLOW_S: Final = 2.0
FIRST_S: Final = 0.2  # until the first answer, without which nothing is served
IDLE_S: Final = 5.0  # what a key does not use for so long is given back
STOP_S: Final = 1.0

_log = get_logger(__name__)


class Ledger(Protocol):
    """The part of `common.rpc.limits.LimitsClient` that a router uses."""

    async def put_keys(self, keys: Sequence[ApiKey]) -> int: ...

    async def list_keys(self, incarnation: str = "", revision: int = 0) -> KeyTable: ...

    async def lease(
        self, router_id: str, asks: Sequence[LeaseAsk], *, number: int = 0, oldest: int = 0
    ) -> list[Lease]: ...

    async def close(self) -> None: ...


class _Calls:
    """Calls for leases. One whose answer did not come is made again under its number, until it is answered once."""

    def __init__(self, ledger: Ledger, router_id: str) -> None:
        self._ledger = ledger
        self._router_id = router_id
        self._numbers = itertools.count(1)
        self._open: dict[int, Sequence[LeaseAsk]] = {}  # without an answer, by number
        self._unheard: set[int] = set()  # those of them that are not under way

    async def lease(self, asks: Sequence[LeaseAsk]) -> list[Lease]:
        number = next(self._numbers)
        self._open[number] = asks
        return await self._call(number)

    async def again(self) -> AsyncIterator[Lease]:
        """What the calls bring that were not heard so far."""
        for number in sorted(self._unheard):
            for lease in await self._call(number):
                yield lease

    async def _call(self, number: int) -> list[Lease]:
        self._unheard.discard(number)
        asks, oldest = self._open[number], min(self._open)
        try:
            leases = await self._ledger.lease(self._router_id, asks, number=number, oldest=oldest)
        except InvalidRequestError:  # it never counts
            del self._open[number]
            raise
        except BaseException:
            self._unheard.add(number)
            raise
        del self._open[number]
        return leases


class Limiter:
    """Life: start -> charge, settle ... -> stop. Without a ledger there are no limits."""

    def __init__(self, callers: Callers, ledger: Ledger | None, router_id: str, clock: Clock) -> None:
        self._callers = callers
        self._ledger = ledger
        self._calls = None if ledger is None else _Calls(ledger, router_id)
        self._clock = clock
        self._table = KeyTable("", 0)
        self._keys: dict[str, KeyMeters] = {}
        self._leasing: dict[str, asyncio.Lock] = {}
        self._leases: set[asyncio.Task[None]] = set()  # under way
        self._task: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self._giving = asyncio.Lock()  # held while what is given back is under way: it is nobody's then
        self.following = False  # the last word from a controller was an answer

    async def start(self, wait_s: float = 0.0) -> None:
        """Follow the controller; wait so long for its first word, without which nothing is served."""
        if self._ledger is None:
            return
        self._task = asyncio.create_task(self._follow(self._ledger), name="limits")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._heard.wait()

    async def stop(self) -> None:
        """Give everything back, if a controller answers within a second each time."""
        if self._task is None or self._ledger is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._giving.acquire()
        await end_tasks([self._task])
        if self._leases:
            await asyncio.wait(self._leases, timeout=STOP_S)
        if not self.following:
            self._found_again()
        try:
            async with asyncio.timeout(STOP_S):
                await self._give_back(math.inf)
        except (NanoDeployError, TimeoutError) as error:
            _log.info("slices of limits could not be given back", error=str(error))
        await end_tasks(self._leases)
        await self._ledger.close()

    # -- requests --

    def check(self, caller: Caller) -> None:
        """Raises what is known of a key without looking at its request."""
        meters = caller.meters
        if meters is not None and self.following:
            now_s = self._clock.now()
            for part in (meters.requests, meters.quota):
                if part is not None and part.left < 1 and part.denied_s(1, now_s):
                    raise self._refusal(meters, 0, now_s)

    async def charge(self, caller: Caller, prompt: int, cost: int) -> int:
        """Take a request of `prompt` tokens, `cost` with its output; returns the tokens taken, for `settle`.

        Raises `RateLimitedError`, `QuotaExceededError`; `UnauthenticatedError` for a key that was revoked since.
        """
        meters = caller.meters
        if meters is None:
            return 0
        if meters.key.revoked:
            raise UnauthenticatedError("This API key was revoked.")
        if meters.tokens is not None:
            if prompt > meters.tokens.limit:
                raise RateLimitedError(
                    f"Request too large for this API key: limit {meters.tokens.limit} tokens per minute, "
                    f"requested {prompt}.",
                    headers=headers(meters),
                )
            cost = min(cost, meters.tokens.limit)
        if not meters.take(1, cost, self._clock.now()):
            await self._more(meters, cost)
        return cost

    async def _more(self, meters: KeyMeters, tokens: int) -> None:
        """Lease what lacks, and take it. Requests of one key ask one after the other, and none in vain.

        A request that ends meanwhile leaves its lease, and the turn, to those behind it: what was granted is theirs.
        """
        turn = self._leasing.setdefault(meters.key.key_hash, asyncio.Lock())
        await turn.acquire()
        lease: asyncio.Task[None] | None = None
        try:
            now_s = self._clock.now()
            if meters.take(1, tokens, now_s):
                return
            if self.following and not self._denied(meters, tokens, now_s):
                lease = asyncio.create_task(self._lease(meters, tokens), name="lease")
                self._leases.add(lease)
                lease.add_done_callback(self._leases.discard)
                await asyncio.shield(lease)
                now_s = self._clock.now()
            if not self.following:
                meters.refill(now_s)
            if not meters.take(1, tokens, now_s):
                raise self._refusal(meters, tokens, now_s)
        finally:
            if lease is None or lease.done():
                turn.release()
            else:
                lease.add_done_callback(lambda _: turn.release())

    def _denied(self, meters: KeyMeters, tokens: int, now_s: float) -> bool:
        wanted = ((meters.requests, 1), (meters.tokens, tokens), (meters.quota, 1))
        return any(part is not None and part.left < n and part.denied_s(n, now_s) > 0 for part, n in wanted)

    async def _lease(self, meters: KeyMeters, tokens: int) -> None:
        assert self._calls is not None
        try:
            leases = await self._calls.lease([meters.ask(1, tokens)])
        except NanoDeployError as error:
            self._lost(error)
            return
        for lease in leases:  # none: the key was revoked a moment ago, which the next look shows
            meters.put(lease, 1, tokens, self._clock.now())

    def _refusal(self, meters: KeyMeters, tokens: int, now_s: float) -> RateLimitedError:
        if meters.quota is not None and meters.quota.left < 1:
            if not self.following:
                why = "This router's share of the key's quota is spent, and no controller answers that has the rest."
                return RateLimitedError(why, retry_after_s=FOLLOW_S, headers=headers(meters))
            return QuotaExceededError("You exceeded your current quota.", headers=headers(meters))
        parts = (("requests", meters.requests, 1), ("tokens", meters.tokens, tokens))
        what, part, wait_s = "requests", meters.requests, 0.0
        for name, each, amount in parts:
            if each is not None and each.left < amount:
                share = 1.0 if self.following else meters.share
                known_s = each.denied_s(amount, now_s) if self.following else 0.0
                needed_s = known_s or each.wait_s(amount, share)
                if needed_s >= wait_s:
                    what, part, wait_s = name, each, needed_s
        limit = 0 if part is None else part.limit
        return RateLimitedError(
            f"Rate limit reached for this API key: limit {limit} {what} per minute. "
            f"Please try again in {spell(wait_s)}.",
            retry_after_s=max(wait_s, 0.001),
            headers=headers(meters),
        )

    def settle(self, caller: Caller, taken: int, spent: int) -> None:
        """A request that took `taken` tokens has ended with `spent`."""
        if caller.meters is not None:
            caller.meters.settle(taken, spent)

    # -- following --

    async def _follow(self, ledger: Ledger) -> None:
        while True:
            try:
                await self._look(ledger)
                if self._callers.known:
                    self._heard.set()
                async with self._giving:
                    await self._give_back(self._clock.now() - IDLE_S)
            except Exception as error:  # noqa: BLE001 - keys stay as they are, whatever the controller does
                self._lost(error)
            await asyncio.sleep(FOLLOW_S if self._callers.known else FIRST_S)

    async def _look(self, ledger: Ledger) -> None:
        try:
            table = await ledger.list_keys(self._table.incarnation, self._table.revision)
        except UnsupportedError:
            if not self._callers.known:
                _log.warning("the controller is of a version that keeps no API keys")
                self._callers.replace({})
            return
        if not self.following:
            self._found_again()
            self.following = True
            _log.info("API keys are followed", keys=len(self._keys) if table.keys is None else len(table.keys))
        if table.keys is None:
            return
        there = {key.key_hash for key in table.keys}
        lost = [self._remembered(meters) for hashed, meters in self._keys.items() if hashed not in there]
        if lost:
            _log.warning("the storage has lost API keys: they are put back", keys=len(lost))
            await ledger.put_keys(lost)
            return  # the next look finds them
        now_s = self._clock.now()
        found: dict[str, KeyMeters] = {}
        for key in table.keys:
            meters = self._keys.get(key.key_hash)
            if meters is None:
                meters = KeyMeters(key, now_s)
            else:
                meters.update(key, now_s)
            found[key.key_hash] = meters
        self._keys, self._table = found, KeyTable(table.incarnation, table.revision)
        self._callers.replace(found)

    @staticmethod
    def _remembered(meters: KeyMeters) -> ApiKey:
        """A key as it was last seen: of a quota, what was left is what we knew to be left."""
        key = meters.key
        if meters.quota is None:
            return key
        return msgspec.structs.replace(key, used_tokens=max(0, key.quota_tokens - meters.quota.remaining))

    async def _give_back(self, before_s: float) -> None:
        """What keys last used before then hold; and what keys without a quota have spent.

        Before that, what calls bring that were not heard so far.
        """
        assert self._calls is not None
        async for lease in self._calls.again():
            if (meters := self._keys.get(lease.key_hash)) is not None:
                meters.late(lease)
        asks = []
        for meters in self._keys.values():
            if meters.used_s <= before_s or meters.spent:
                ask = meters.give_back(all_of_it=meters.used_s <= before_s)
                if ask is not None:
                    asks.append(ask)
        if asks:
            await self._calls.lease(asks)

    def _found_again(self) -> None:
        for meters in self._keys.values():
            meters.found_again()

    def _lost(self, error: BaseException) -> None:
        if self.following:
            _log.warning("no controller for API keys: the last ones stay, limits are shared out", error=str(error))
        self.following = False


def headers(meters: KeyMeters) -> list[tuple[bytes, bytes]]:
    """OpenAI's, for the limits that the key has."""
    out: list[tuple[bytes, bytes]] = []
    if meters.requests is not None:
        out += _header_lines(b"requests", meters.requests)
    if meters.tokens is not None:
        out += _header_lines(b"tokens", meters.tokens)
    return out


def _header_lines(name: bytes, part: Slice) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-" + name, b"%d" % part.limit),
        (b"x-ratelimit-remaining-" + name, b"%d" % part.remaining),
        (b"x-ratelimit-reset-" + name, spell(part.reset_s).encode()),
    ]


def spell(seconds: float) -> str:
    """As OpenAI writes them: 12ms, 6s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
