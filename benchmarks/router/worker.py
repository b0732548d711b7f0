"""A decode worker that answers with made-up tokens over the real gRPC contract, a token per step for all its requests.

    python benchmarks/router/worker.py PORT FOLDER

FOLDER has the tokenizer. It is its own controller, too.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.router.load import TEXT  # noqa: E402
from common.rpc import codec  # noqa: E402
from common.types import ModelInfo, Role, WorkerInfo, WorkerRef, WorkerState, new_epoch  # noqa: E402
from nanodeploy.v1 import controller_pb2, controller_pb2_grpc, decode_pb2, decode_pb2_grpc, types_pb2  # noqa: E402

STEP_S = 0.0016  # 64 streams: 40,000 tokens a second are offered
LENGTH = types_pb2.FINISH_REASON_LENGTH
UNFINISHED = types_pb2.FINISH_REASON_UNSPECIFIED
MAX_LAG_S = 0.02  # steps that came late are made up for, up to this


class Worker(decode_pb2_grpc.DecodeServiceServicer, controller_pb2_grpc.ControllerServiceServicer):
    """Gives every running request one token a step, a step every `STEP_S`. It is its own controller, too."""

    def __init__(self, info: WorkerInfo, answer: list[int]) -> None:
        self._info = info
        self._answer = answer
        self._slots = 0
        self._running: dict[str, dict[int, list[int]]] = {}  # router -> slot -> [position, wanted]
        self._asked_s: dict[int, float] = {}  # of those without a token
        self.waited_ms: list[float] = []
        self._wake: dict[str, asyncio.Event] = {}

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[controller_pb2.WatchResponse]:  # noqa: N802
        yield codec.watch_event_to_proto(codec.Snapshot("bench", 1, (self._info,)))
        while True:
            await asyncio.sleep(1)
            yield codec.watch_event_to_proto(codec.Ping(1))

    async def Stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        router_id = (await anext(aiter(requests))).attach.router_id
        running = self._running.setdefault(router_id, {})
        wake = self._wake.setdefault(router_id, asyncio.Event())
        yield decode_pb2.StreamResponse(attached=decode_pb2.StreamAttached(epoch=self._info.ref.epoch))
        results: list[Any] = []
        reader = asyncio.create_task(self._read(requests, running, results, wake))
        try:
            while True:
                due = time.perf_counter()
                while running:
                    deltas = self._step(running)
                    deltas.submitted.extend(results)
                    results.clear()
                    yield decode_pb2.StreamResponse(deltas=deltas)
                    due = max(due + STEP_S, time.perf_counter() - MAX_LAG_S)  # timers are whole milliseconds
                    await asyncio.sleep(max(due - time.perf_counter(), 0))
                wake.clear()
                await wake.wait()
        finally:
            reader.cancel()

    async def _read(
        self, requests: AsyncIterator[Any], running: dict[int, list[int]], results: list[Any], wake: asyncio.Event
    ) -> None:
        number = 0
        async for request in requests:
            for item in request.submit.items:
                self._slots += 1
                running[self._slots] = [0, item.request.sampling.max_tokens]
                self._asked_s[self._slots] = time.perf_counter()
                results.append(decode_pb2.SubmitResult(index=number, slot=self._slots))
                number += 1
                wake.set()
            for slot in request.cancel.slots:
                running.pop(slot, None)

    def _step(self, running: dict[int, list[int]]) -> decode_pb2.StepDeltas:
        answer, size = self._answer, len(self._answer)
        slots = list(running)
        states = [running[slot] for slot in slots]
        positions = [state[0] for state in states]
        ends = [state[0] + 1 >= state[1] for state in states]
        stats = [
            decode_pb2.StatsRow(slot=slot, stats=types_pb2.RequestStats(prompt_tokens=100))
            for slot, position in zip(slots, positions, strict=True)
            if not position
        ]
        now = time.perf_counter()
        self.waited_ms += [1e3 * (now - self._asked_s.pop(slot)) for slot in slots if slot in self._asked_s]
        for slot, state, end in zip(slots, states, ends, strict=True):
            state[0] += 1
            if end:
                del running[slot]
        zeros = [0] * len(slots)
        return decode_pb2.StepDeltas(
            slots=slots,
            choices=zeros,
            positions=positions,
            num_tokens=[1] * len(slots),
            finish_reasons=[LENGTH if end else UNFINISHED for end in ends],
            stop_token_ids=zeros,
            token_ids=[answer[position % size] for position in positions],
            stats=stats,
        )


async def serve_worker(port: int, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = ModelInfo(
        name="bench",
        architecture="llama",
        model_hash=b"b" * 16,
        max_model_len=8192,
        vocab_size=tokenizer.get_vocab_size(),
        dtype="float32",
        path=str(folder),
    )
    ref = WorkerRef("bench-0", new_epoch(), f"127.0.0.1:{port}")
    info = WorkerInfo(ref=ref, role=Role.DECODE, state=WorkerState.READY, model=model, max_num_seqs=256)
    server = grpc.aio.server()
    worker = Worker(info, tokenizer.encode(TEXT).ids)
    stubs: Any = (decode_pb2_grpc, controller_pb2_grpc)
    stubs[0].add_DecodeServiceServicer_to_server(worker, server)
    stubs[1].add_ControllerServiceServicer_to_server(worker, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    waited_ms = sorted(worker.waited_ms)
    if waited_ms:
        p50, p99 = (waited_ms[int(share * (len(waited_ms) - 1))] for share in (0.5, 0.99))
        said = {"answers": len(waited_ms), "first_token_p50_ms": round(p50, 3), "first_token_p99_ms": round(p99, 3)}
        print(json.dumps(said))
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve_worker(int(sys.argv[1]), Path(sys.argv[2])))
