"""A decode worker asked without a router: what is left of a first token's time when nothing is between.

    python benchmarks/router/direct.py PORT RATE SECONDS PROMPT_TOKENS TOKENS_OUT

RATE requests a second, evenly. Writes one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.router.load import pause  # noqa: E402
from common.errors import NanoDeployError, UnavailableError  # noqa: E402
from common.types import GenerationRequest, MonotonicClock, SamplingParams, WorkerRef  # noqa: E402
from services.router.peer import GrpcDecodePeer, GrpcDecodeStream  # noqa: E402

CONCURRENCY = 64


async def direct(
    port: int, concurrency: int, seconds: float, every_s: float = 0.0, prompt_tokens: int = 100, tokens_out: int = 1
) -> dict[str, float]:
    """Submit -> first row, over gRPC. `every_s`: between two requests of one of `concurrency`; 0: at once again."""
    peer = GrpcDecodePeer(WorkerRef("bench-0", 1, f"127.0.0.1:{port}"), "direct", MonotonicClock())
    stream = await _attached(peer)
    arrived: dict[int, asyncio.Future[None]] = {}

    def waiter(slot: int) -> asyncio.Future[None]:
        return arrived.setdefault(slot, asyncio.get_running_loop().create_future())

    async def read() -> None:
        while True:
            for slot, row in (await stream.read()).rows:
                if not row.position:
                    waiter(slot).set_result(None)

    reader = asyncio.create_task(read())
    times: list[float] = []
    end = time.perf_counter() + seconds
    request = GenerationRequest(
        request_id="d" * 32,
        model="bench",
        prompt_token_ids=tuple(range(prompt_tokens)),
        sampling=SamplingParams(max_tokens=tokens_out, seed=1),
    )

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            await pause(number, concurrency, every_s)
            sent = time.perf_counter()
            answer: asyncio.Future[int | NanoDeployError] = asyncio.get_running_loop().create_future()
            peer.submit(request, None, 5, answer.set_result)
            slot = await answer
            if isinstance(slot, NanoDeployError):
                raise slot
            await waiter(slot)
            times.append(1000 * (time.perf_counter() - sent))

    await asyncio.gather(*(one(number) for number in range(concurrency)))
    reader.cancel()
    stream.close()
    with contextlib.suppress(asyncio.CancelledError, UnavailableError):
        await reader
    await peer.close()
    return {"p50_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * len(times))]}


async def _attached(peer: GrpcDecodePeer) -> GrpcDecodeStream:
    """The worker says its epoch to the first stream; the second one knows it."""
    asking = peer.open_stream()
    epoch, _ = await asking.attach(1, [])
    asking.close()
    stream = peer.open_stream()
    await stream.attach(epoch, [])
    return stream


def main() -> None:
    port, rate, seconds, prompt_tokens, tokens_out = sys.argv[1:]
    every_s = CONCURRENCY / float(rate)
    found = uvloop.run(direct(int(port), CONCURRENCY, float(seconds), every_s, int(prompt_tokens), int(tokens_out)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
