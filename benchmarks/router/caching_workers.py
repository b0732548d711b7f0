"""Decode workers with prefix caches for `prefix.py`, all in one process, which does not compute but waits.

    python benchmarks/router/caching_workers.py grpc|http FOLDER PORT[:EVENTS_PORT] ...

Each is the simulator's: the real scheduler, cache manager, load meter and KV feed, with steps that take the time that
`PROFILE` says, here on the real clock. Over gRPC they are what our router expects, with KV events and loads, and the
first is their controller; over HTTP they have OpenAI's streaming API, and at the other port KV events as vLLM's. FOLDER
has the tokenizer. When they end (SIGTERM) they write a line of JSON: what their books say.
"""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import msgspec

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.router.trace import ANSWER, BLOCK, token_ids  # noqa: E402
from benchmarks.router.vllm_events import Publisher  # noqa: E402
from common.engine.messages import EngineLoad, KvChanges  # noqa: E402
from common.engine.scheduler import StepPlan  # noqa: E402
from common.engine.sequence import Sequence as EngineSequence  # noqa: E402
from common.kvtransfer.session import OrderSpec  # noqa: E402
from common.rpc import codec  # noqa: E402
from common.types import (  # noqa: E402
    ChoiceDelta,
    FinishReason,
    MonotonicClock,
    RequestStats,
    Role,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
)
from common.types.prefix import UNIT, extend_chain, root_hash  # noqa: E402
from nanodeploy.v1 import controller_pb2, controller_pb2_grpc, decode_pb2, decode_pb2_grpc, worker_pb2_grpc  # noqa: E402
from services.simulator.machine import MODEL, Machine, Profile  # noqa: E402
from services.worker.servicer import WorkerServicer  # noqa: E402

PROFILE = Profile(
    prefill_tokens_per_s=6_000.0,
    step_s=0.02,
    sequence_s=0.0002,
    kv_tokens=48_000,
    block_size=BLOCK,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
)
MAX_LAG_S = 0.05  # steps that came late are made up for, up to this
LOADS_S = 1.0
EVENT = (
    'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
    '"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}\n\n'
)


class Row(NamedTuple):
    """A token of a sequence. `stats` with the first."""

    seq_id: int
    position: int
    ended: bool
    stats: RequestStats | None


class LiveWorker:
    """One simulated machine on the clock of its event loop. `tell` gets what each step brought."""

    def __init__(self, number: int, port: int, folder: Path, tell: Callable[[list[Row]], None]) -> None:
        self.machine = Machine(f"worker-{number}", Role.DECODE, number, PROFILE, MonotonicClock(), _no_order)
        self.load = WorkerLoad()
        self.publisher: Publisher | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.waited_s = 0.0  # from each submit to its first token, all together
        self.lost_s = 0.0  # steps were so much later than could be made up for
        self._model = msgspec.structs.replace(MODEL, name="bench", path=str(folder), vocab_size=257)
        self._root = root_hash(MODEL.model_hash)
        self._ref = WorkerRef(self.machine.name, number, f"127.0.0.1:{port}")
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._seq_ids = 0
        self._due_s = 0.0  # when the last step was over

    @property
    def info(self) -> WorkerInfo:
        return msgspec.structs.replace(self.machine.info(self.load), ref=self._ref, model=self._model)

    @property
    def books(self) -> dict[str, float]:
        return {
            "requests": self.machine.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "busy_s": round(self.machine.busy_s, 3),
            "waited_s": round(self.waited_s, 3),
            "lost_s": round(self.lost_s, 3),
        }

    def submit(self, ids: Sequence[int], max_tokens: int) -> int:
        self._seq_ids += 1
        chain = [self._root]
        extend_chain(chain, ids)
        seq = self.machine.submit(self._seq_ids, list(ids), chain, max_tokens, 0)
        self._name_blocks(seq)
        if not self.machine.is_stepping:
            self._begin(self._loop.time())
        return self._seq_ids

    def _begin(self, at_s: float) -> None:
        begun = self.machine.begin_step()
        self.machine.is_stepping = begun is not None
        if begun is None:
            self._report()
            return
        plan, seconds = begun
        self._due_s = at_s + seconds
        self._loop.call_at(self._due_s, self._end, plan, at_s)

    def _end(self, plan: StepPlan, launched_s: float) -> None:
        drawn = [item.seq for item in plan.items if item.draws]
        first, over = map(set, self.machine.end_step(plan, launched_s))
        rows = []
        for seq in drawn:
            stats = None
            if seq in first:
                hit = self.machine.hits.pop(seq.seq_id)
                self.prompt_tokens += seq.num_prompt
                self.cached_tokens += hit
                self.waited_s += time.monotonic() - seq.times.submitted
                stats = RequestStats(
                    prompt_tokens=seq.num_prompt, cached_tokens=hit, computed_tokens=seq.num_prompt - hit
                )
            if seq in over or not seq.num_computed % BLOCK:
                self._name_blocks(seq)
            rows.append(Row(seq.seq_id, seq.num_output - 1, seq in over, stats))
        self._tell(rows)
        self._report()
        late_s = self._loop.time() - self._due_s
        self.lost_s += max(late_s - MAX_LAG_S, 0.0)
        self._begin(self._due_s + max(late_s - MAX_LAG_S, 0.0))

    def _report(self) -> None:
        for message in self.machine.report():
            if isinstance(message, EngineLoad):
                self.load = message.load
            elif isinstance(message, KvChanges):
                self.machine.feed.take(message)
                if self.publisher is not None:
                    self.publisher.publish(message.changes)

    def _name_blocks(self, seq: EngineSequence) -> None:
        """The tokens of its blocks, which the events that are published have and ours do not."""
        if self.publisher is not None:
            ends = range(BLOCK, (len(seq.chain) - 1) * UNIT + 1, BLOCK)
            tokens = {seq.chain[end // UNIT]: seq.token_ids[end - BLOCK : end] for end in ends}
            self.publisher.block_tokens.update(tokens)


def _no_order(machine: Machine, spec: OrderSpec) -> None:
    raise AssertionError("there is no prefill worker")


# -- over gRPC -------------------------------------------------------------------------------------------


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """For one router that cancels nothing and never comes back."""

    def __init__(self, number: int, port: int, folder: Path) -> None:
        self.worker = LiveWorker(number, port, folder, self._tell)
        self._steps: asyncio.Queue[decode_pb2.StepDeltas] = asyncio.Queue()

    def _tell(self, rows: list[Row]) -> None:
        deltas = [
            (
                row.seq_id,
                ChoiceDelta(
                    choice=0,
                    position=row.position,
                    token_ids=(0,),
                    finish=FinishReason.LENGTH if row.ended else None,
                ),
            )
            for row in rows
        ]
        if deltas:
            stats = [(row.seq_id, row.stats) for row in rows if row.stats is not None]
            self._steps.put_nowait(codec.deltas_to_proto(deltas, stats=stats))

    async def Stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await anext(aiter(requests))
        yield decode_pb2.StreamResponse(attached=decode_pb2.StreamAttached(epoch=self.worker.info.ref.epoch))
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                yield decode_pb2.StreamResponse(deltas=await self._steps.get())
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        number = 0
        async for request in requests:
            results = []
            for item in request.submit.items:
                slot = self.worker.submit(item.request.prompt_token_ids, item.request.sampling.max_tokens)
                results.append(decode_pb2.SubmitResult(index=number, slot=slot))
                number += 1
            if results:
                self._steps.put_nowait(decode_pb2.StepDeltas(submitted=results))


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    def __init__(self, workers: Sequence[LiveWorker]) -> None:
        self._workers = workers

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[controller_pb2.WatchResponse]:  # noqa: N802
        yield codec.watch_event_to_proto(codec.Snapshot("bench", 1, tuple(worker.info for worker in self._workers)))
        while True:
            await asyncio.sleep(LOADS_S)
            infos = [worker.info for worker in self._workers]
            entries = tuple(codec.LoadEntry(info.ref.worker_id, info.ref.epoch, info.load) for info in infos)
            yield codec.watch_event_to_proto(codec.Loads(entries))
            yield codec.watch_event_to_proto(codec.Ping(1))


async def serve_grpc(folder: Path, ports: Sequence[int], open_servers: AsyncExitStack) -> list[LiveWorker]:
    servicers = [DecodeServicer(number, port, folder) for number, port in enumerate(ports, 1)]
    workers = [servicer.worker for servicer in servicers]
    stubs: Any = (decode_pb2_grpc, worker_pb2_grpc, controller_pb2_grpc)
    for servicer, port in zip(servicers, ports, strict=True):
        server, worker = grpc.aio.server(), servicer.worker
        host: Any = None  # WatchKv asks nothing of the engine's host
        info = functools.partial(getattr, worker, "info")
        telling = WorkerServicer(host, info, tuple, lambda grace_s: None, worker.machine.feed)
        stubs[0].add_DecodeServiceServicer_to_server(servicer, server)
        stubs[1].add_WorkerServiceServicer_to_server(telling, server)
        if port == ports[0]:
            stubs[2].add_ControllerServiceServicer_to_server(ControllerServicer(workers), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        open_servers.push_async_callback(server.stop, None)
    return workers


# -- over HTTP -------------------------------------------------------------------------------------------


class HttpWorker:
    """What connections to one port share."""

    def __init__(self, number: int, port: int, folder: Path) -> None:
        self.worker = LiveWorker(number, port, folder, self._tell)
        self.answering: dict[int, asyncio.WriteTransport] = {}

    def _tell(self, rows: list[Row]) -> None:
        for row in rows:
            transport = self.answering[row.seq_id]
            data = b""
            if not row.position:
                data += b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            data += _chunk(EVENT % (ANSWER, "null"))
            if row.ended:
                del self.answering[row.seq_id]
                data += _chunk(EVENT % ("", '"length"') + "data: [DONE]\n\n") + b"0\r\n\r\n"
            transport.write(data)


def _chunk(text: str) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text), text.encode())


class HttpConnection(asyncio.Protocol):
    """A request at a time, with its length in its head."""

    def __init__(self, worker: HttpWorker) -> None:
        self._worker = worker
        self._in = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._in += data
        while (end := self._in.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._in[:end]).lower()
            _, _, rest = head.partition(b"content-length:")
            size = end + 4 + int(rest.split(b"\r\n")[0] or 0)
            if len(self._in) < size:
                return
            body = bytes(self._in[end + 4 : size])
            del self._in[:size]
            self._take(head, body)

    def _take(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"post /v1/chat/completions "):
            asked = json.loads(body)
            limit = asked.get("max_tokens") or asked["max_completion_tokens"]
            seq_id = self._worker.worker.submit(_prompt(asked), limit)
            self._worker.answering[seq_id] = self._transport
            return
        if head.startswith(b"post /v1/chat/completions/render "):
            said = rendered(body)
        else:
            said = b'{"status":"ok","object":"list","model_path":"bench","data":[{"id":"bench","object":"model"}]}'
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(said)
        self._transport.write(head + said)


@functools.lru_cache(64)
def rendered(body: bytes) -> bytes:
    """As vLLM's workers answer vllm-router, which asks all of them for the tokens of every request."""
    said = {"request_id": "chatcmpl-0", "token_ids": _prompt(json.loads(body)), "features": None, "sampling_params": {}}
    return json.dumps(said, separators=(",", ":")).encode()


def _prompt(asked: dict[str, Any]) -> list[int]:
    return token_ids([(message["role"], message["content"]) for message in asked["messages"]])


async def serve_http(
    folder: Path, ports: Sequence[int], events_ports: Sequence[int], open_servers: AsyncExitStack
) -> list[LiveWorker]:
    found = [HttpWorker(number, port, folder) for number, port in enumerate(ports, 1)]
    loop = asyncio.get_running_loop()
    for worker, port in zip(found, ports, strict=True):
        server = await loop.create_server(functools.partial(HttpConnection, worker), "127.0.0.1", port)
        open_servers.callback(server.close)
    workers = [each.worker for each in found]
    for worker, port in zip(workers, events_ports, strict=False):  # there may be none
        worker.publisher = Publisher()
        server = await asyncio.start_server(worker.publisher.attend, "127.0.0.1", port)
        open_servers.callback(server.close)
    return workers


async def main(kind: str, folder: Path, addresses: Sequence[str]) -> None:
    ports = [int(address.split(":")[0]) for address in addresses]
    events_ports = [int(address.split(":")[1]) for address in addresses if ":" in address]
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with AsyncExitStack() as open_servers:
        if kind == "grpc":
            workers = await serve_grpc(folder, ports, open_servers)
        else:
            workers = await serve_http(folder, ports, events_ports, open_servers)
        await stopped.wait()
        print(json.dumps([worker.books for worker in workers]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
