"""Ends tasks that run until they are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

AGAIN_S = 1.0


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them and wait until they are over; what they raise is left alone.

    A library may lose a cancellation that comes while it gives a connection up, and the task goes on: it is asked
    again.
    """
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        ended, waiting = await asyncio.wait(waiting, timeout=AGAIN_S)
        for task in ended:
            if not task.cancelled():
                task.exception()  # looked at: asyncio says nothing of it
