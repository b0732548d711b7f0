"""Requests that wait for the stream of one worker."""

from __future__ import annotations

import asyncio

from common.errors import NanoDeployError


class Reaching:
    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self, timeout_s: float) -> None:
        """Until `tell`, whose error it raises; TimeoutError."""
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(reached)
        try:
            async with asyncio.timeout(timeout_s):
                await reached
        finally:
            self._waiting.discard(reached)

    def tell(self, error: NanoDeployError | None = None) -> None:
        """There is a stream; or `error` says why nobody should wait for it."""
        for reached in [reached for reached in self._waiting if not reached.done()]:
            if error is None:
                reached.set_result(None)
            else:
                reached.set_exception(error)
