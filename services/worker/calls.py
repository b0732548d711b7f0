"""What the workers' streaming calls have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from common.errors import DeadlineExceededError

T = TypeVar("T")

FIRST_MESSAGE_S = 10.0


async def first_message(requests: AsyncIterator[T]) -> T | None:
    """What a caller says first; None if it ended its side. DeadlineExceededError if it says nothing."""
    try:
        async with asyncio.timeout(FIRST_MESSAGE_S):
            return await anext(aiter(requests), None)
    except TimeoutError:
        raise DeadlineExceededError(f"the caller said nothing for {FIRST_MESSAGE_S:g} s") from None
