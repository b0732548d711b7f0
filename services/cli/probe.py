"""Readiness as a client sees it: ports that answer, `/ready`, and one real completion through the whole path."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from common.errors import UnavailableError
from services.cli.process import ServiceSpec

POLL_S = 0.1


async def wait_until_ready(spec: ServiceSpec, client: httpx.AsyncClient, waiting: Callable[[str], None]) -> None:
    """Return when the service is ready; `waiting` is told what it says meanwhile. The caller sets the limit."""
    while True:
        try:
            if not spec.ready_url:
                _, writer = await asyncio.open_connection(*spec.address.rsplit(":", 1))
                writer.close()
                return
            response = await client.get(spec.ready_url, timeout=5.0)
            if response.status_code == 200:
                return
            waiting(_reason(response))
        except (OSError, httpx.TransportError):
            pass  # not listening yet
        await asyncio.sleep(POLL_S)


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int


async def complete_once(client: httpx.AsyncClient, url: str, model: str, num_words: int, timeout_s: float) -> Answer:
    """A greedy completion of a prompt of at least `num_words` tokens that no prefix cache has seen.

    Raises `UnavailableError` with what the router answered.
    """
    words = [secrets.token_hex(3) if i % 8 == 0 else "and then the" for i in range(max(num_words, 8))]
    body = {"model": model, "prompt": " ".join(words), "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    try:
        response = await client.post(f"{url}/v1/completions", json=body, timeout=timeout_s)
        if response.status_code != 200:
            raise UnavailableError(f"the test completion was answered {response.status_code}: {response.text[:500]}")
        answer = response.json()
        usage = answer["usage"]
        result = Answer(answer["choices"][0]["text"], usage["prompt_tokens"], usage["completion_tokens"])
    except httpx.HTTPError as error:
        raise UnavailableError(f"the test completion failed: {error!r}") from None
    except (KeyError, IndexError, ValueError) as error:
        raise UnavailableError(f"the test completion's answer lacks {error}: {response.text[:500]}") from None
    if result.completion_tokens < 1:
        raise UnavailableError("the test completion brought no token")
    return result


def _reason(response: httpx.Response) -> str:
    """What a `/ready` that is not 200 says, in one line."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:120]
    if isinstance(body, dict):
        return str(body.get("reason") or body.get("detail") or body.get("status") or body)[:120]
    return str(body)[:120]
