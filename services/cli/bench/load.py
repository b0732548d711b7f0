"""Which requests are sent, and when: a closed loop of N clients, or Poisson arrivals at a rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from services.cli.bench.client import BenchClient
from services.cli.bench.stats import Sample

_TEXT = """Every morning the harbour filled with small boats whose owners argued about weather, prices and the depth of
the channel. A painter from the north had rented the highest room above the bakery, and from there he counted masts,
chimneys and gulls until the light was good enough to work. Children carried letters between the market and the
station for a coin each; the postmaster pretended not to notice. When rain came the whole street moved indoors, and
the talk turned to machines, distant cities, old songs, arithmetic, unpaid debts and the proper way to cook lentils.
Nobody remembered who had planted the orange trees along the wall, yet somebody watered them through every drought."""


@dataclass(frozen=True)
class LoadOptions:
    """`concurrency` clients in a closed loop, or with `request_rate` > 0 arrivals per second, Poisson."""

    model: str
    num_prompts: int
    concurrency: int
    request_rate: float
    input_len: int  # tokens
    output_len: int  # tokens
    shared_prefix_len: int = 0  # tokens that all prompts begin with
    chat: bool = False
    seed: int = 0
    temperature: float = 0.0
    timeout_s: float = 600.0


async def vocabulary(url: str, model: str, headers: dict[str, str]) -> list[int]:
    """Token ids of plain English in the server's own vocabulary; empty when it does not tokenize for us."""
    async with httpx.AsyncClient(timeout=30.0, headers=headers) as client:
        try:
            response = await client.post(f"{url}/tokenize", json={"model": model, "prompt": _TEXT})
            tokens = response.json().get("tokens", []) if response.status_code == 200 else []
        except (httpx.HTTPError, ValueError):
            return []
    return sorted({int(token) for token in tokens})


def make_bodies(options: LoadOptions, token_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The requests, the same for the same seed. Exact lengths need token ids; words come close otherwise."""
    random = Random(options.seed)
    words = _TEXT.split()
    by_id = bool(token_ids) and not options.chat

    def piece(length: int) -> list[Any]:
        return random.choices(token_ids if by_id else words, k=max(length, 0))

    prefix = piece(min(options.shared_prefix_len, options.input_len))
    bodies: list[dict[str, Any]] = []
    for _ in range(options.num_prompts):
        items = prefix + piece(options.input_len - len(prefix))
        prompt = items if by_id else " ".join(items)
        body: dict[str, Any] = {
            "model": options.model,
            "max_tokens": options.output_len,
            "temperature": options.temperature,
            "seed": random.randrange(2**31),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {"messages": [{"role": "user", "content": prompt}]} if options.chat else {"prompt": prompt}
        bodies.append(body)
    return bodies


async def run_load(
    client: BenchClient, options: LoadOptions, bodies: Sequence[dict[str, Any]], done: Callable[[], None]
) -> tuple[list[Sample], float]:
    """Send all requests; the samples in order of sending and the seconds from first sent to last ended."""
    path = "/v1/chat/completions" if options.chat else "/v1/completions"
    samples: list[Sample] = []
    started = time.perf_counter()

    async def one(body: dict[str, Any]) -> None:
        samples.append(await client.stream(path, body, options.timeout_s))
        done()

    if options.request_rate > 0:
        random = Random(options.seed + 1)
        due = started
        async with asyncio.TaskGroup() as group:
            for body in bodies:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(one(body))
                due += random.expovariate(options.request_rate)
    else:
        queue = iter(bodies)

        async def loop() -> None:
            for body in queue:
                await one(body)

        await asyncio.gather(*(loop() for _ in range(min(options.concurrency, len(bodies)))))
    return sorted(samples, key=lambda s: s.started_s), time.perf_counter() - started
