"""Limits of one request that are known before it is tokenised, and how long it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from common.config.schema import RouterConfig
from common.errors import InvalidRequestError
from services.router.schemas import ChatBody, CompletionBody, SamplingFields

TIMEOUT_HEADER: Final = b"x-request-timeout"
_IMAGE_TYPES: Final = ("image_url", "input_image", "image")


def check_sizes(body: SamplingFields, config: RouterConfig) -> None:
    """Raises `InvalidRequestError` naming the field that is over its limit."""
    if body.n is not None and body.n > config.max_n:
        raise InvalidRequestError(f"n must be at most {config.max_n}, got {body.n}", param="n")
    if isinstance(body, CompletionBody):
        check_prompts(body.prompt, config.max_prompts, "prompt")
    elif isinstance(body, ChatBody) and body.messages:
        images = sum(map(_num_images, body.messages))
        if images > config.max_images:
            raise InvalidRequestError(
                f"messages hold {images} images, at most {config.max_images} are allowed", param="messages"
            )


def check_prompts(prompts: str | Sequence[object], most: int, param: str) -> None:
    """Texts or lists of token ids, or one of them."""
    many = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    if many > most:
        raise InvalidRequestError(f"{param} has {many} entries, at most {most} are allowed", param=param)


def _num_images(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, dict) and part.get("type") in _IMAGE_TYPES for part in content)


def time_limit_s(body: SamplingFields, header: str, longest_s: float) -> float:
    """Seconds that the request may take: what it asks for, in the body or the header, up to the router's setting."""
    if body.timeout is not None:
        asked, param = body.timeout, "timeout"
    elif header:
        param = TIMEOUT_HEADER.decode()
        try:
            asked = float(header)
        except ValueError:
            raise InvalidRequestError(
                f"{param} must be a number of seconds, got {header[:40]!r}", param=param
            ) from None
    else:
        return longest_s
    if not (math.isfinite(asked) and asked > 0):
        raise InvalidRequestError(f"{param} must be seconds above 0, got {asked:g}", param=param)
    return min(asked, longest_s)
