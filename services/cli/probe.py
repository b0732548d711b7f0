"""Readiness as a client sees it: ports that answer, `/ready`, and one real answer through the whole path."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import httpx

from common.errors import UnavailableError
from services.cli.process import ServiceSpec

FIRST_POLL_S = 0.05
MAX_POLL_S = 0.5
SICK_S = 3.0
_WORDS = "the ships came home with salt and bread and nobody asked how far they had been "
_TIMINGS = {"x-nanodeploy-timings": "1", "x-nanodeploy-separation": "always"}  # the path is what is proven


async def wait_until_ready(spec: ServiceSpec, client: httpx.AsyncClient, waiting: Callable[[str], None]) -> None:
    """Return when the service is ready; `waiting` is told what it says meanwhile. The caller sets the limit.

    Raises `UnavailableError` when the service says for `SICK_S` that it is not alive: it will not recover.
    """
    sick_since, pause_s = 0.0, FIRST_POLL_S
    loop = asyncio.get_running_loop()
    while True:
        try:
            if not spec.ready_url:
                _, writer = await asyncio.open_connection(*spec.address.rsplit(":", 1))
                writer.close()
                return
            response = await client.get(spec.ready_url, timeout=5.0)
            if response.status_code == 200:
                return
            waiting(_reason(response)[:120])
            health = await client.get(spec.ready_url.removesuffix("/ready") + "/health", timeout=5.0)
            sick_since = 0.0 if health.status_code == 200 else sick_since or loop.time()
            if sick_since and loop.time() - sick_since > SICK_S:
                raise UnavailableError(f"{spec.name} cannot serve: {_reason(health)}; its log is {spec.log}")
        except (OSError, httpx.TransportError):
            pass  # not listening yet
        await asyncio.sleep(pause_s)
        pause_s = min(MAX_POLL_S, 1.2 * pause_s)


@dataclass(frozen=True)
class Answer:
    """A completion, or a vector of `embedding_size` elements, and, from its waterfall, the way it took.

    `fallback`: why a prefill worker was given up. `needs_key`: the API answers nobody without one.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_worker: str
    transferred_tokens: int
    transport: str
    transfer_gbps: float
    fallback: str
    embedding_size: int = 0
    needs_key: bool = False

    @property
    def path(self) -> str:
        if self.embedding_size:
            return f"a vector of {self.embedding_size} elements from {self.prompt_tokens} prompt tokens"
        text = f"{self.completion_tokens} tokens from {self.prompt_tokens} prompt tokens"
        if not self.transferred_tokens:
            return f"{text}, prefilled by the decode worker"
        return (
            f"{text}, KV of {self.transferred_tokens} from {self.prefill_worker} over {self.transport} "
            f"at {self.transfer_gbps:.1f} GB/s"
        )


async def complete_once(
    client: httpx.AsyncClient,
    url: str,
    model: str,
    num_tokens: int,
    timeout_s: float,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Answer:
    """A greedy completion of a prompt of at least `num_tokens` tokens that no prefix cache has seen, or its vector
    where the model makes those.

    Raises `UnavailableError` with what the router answered.
    """
    prompt = f"{secrets.token_hex(4)} " + _WORDS * (num_tokens // len(_WORDS.split()) + 1)
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    try:
        card = await client.get(f"{url}/v1/models/{model}", headers=dict(headers), timeout=timeout_s)
        stranger = await client.get(f"{url}/v1/models/{model}", timeout=timeout_s)
        embeds = card.status_code == 200 and card.json().get("capabilities", {}).get("embeddings", False)
        if embeds:
            body = {"model": model, "input": prompt}
        path = "/v1/embeddings" if embeds else "/v1/completions"
        response = await client.post(f"{url}{path}", json=body, headers={**_TIMINGS, **headers}, timeout=timeout_s)
        if response.status_code != 200:
            raise UnavailableError(f"the test completion was answered {response.status_code}: {response.text[:500]}")
        answer = response.json()
        stats = answer["nanodeploy"]["requests"][0]
        result = Answer(
            prompt_tokens=answer["usage"]["prompt_tokens"],
            completion_tokens=0 if embeds else answer["usage"]["completion_tokens"],
            prefill_worker=stats["prefill_worker"],
            transferred_tokens=stats["transferred_tokens"],
            transport=stats["transport"],
            transfer_gbps=stats["transfer_gbps"],
            fallback=stats["fallback"],
            embedding_size=len(answer["data"][0]["embedding"]) if embeds else 0,
            needs_key=stranger.status_code == 401,
        )
    except httpx.HTTPError as error:
        raise UnavailableError(f"the test completion failed: {error!r}") from None
    except (KeyError, IndexError, ValueError) as error:
        raise UnavailableError(f"the test completion's answer lacks {error}: {response.text[:500]}") from None
    if not embeds and result.completion_tokens < 1:
        raise UnavailableError("the test completion brought no token")
    return result


def _reason(response: httpx.Response) -> str:
    """What a `/ready` that is not 200 says, in one line."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:1000]
    if isinstance(body, dict):
        return str(body.get("reason") or body.get("detail") or body.get("status") or body)
    return str(body)
