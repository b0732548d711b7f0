"""A router under test: real HTTP in front, real gRPC behind, and decode workers that follow a script.

The scripted worker is the router's peer and nothing else: it keeps a log per request, answers attach from it and
notes every cancel and acknowledgement, as `services.decode_worker` does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import httpx
import msgspec
import openai
import text_support

from common.config.schema import RouterConfig
from common.errors import NanoDeployError
from common.rpc import codec
from common.rpc.codec import ChangeKind
from common.rpc.membership import MembershipChange
from common.rpc.status import ErrorInterceptor
from common.text import Tokenizer
from common.types import (
    ChoiceDelta,
    Failure,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    RequestStats,
    Role,
    TokenLogprobs,
    WorkerInfo,
    WorkerRef,
    WorkerState,
    new_epoch,
)
from nanodeploy.v1 import decode_pb2 as pb
from nanodeploy.v1 import decode_pb2_grpc as pb_grpc
from services.router.server import Router

MODEL = "tiny"
MAX_MODEL_LEN = 256
ENGINE_FAILED = Failure("internal", "the engine failed")
NO_STATS = RequestStats()


def tokenizer() -> Tokenizer:
    return Tokenizer(text_support.byte_level(), special_tokens={"eos_token": "<|im_end|>"})


@dataclasses.dataclass
class Script:
    """What a request brings: `outputs[choice]`, `step_tokens` at a time, `delay_s` before each step; or a vector."""

    outputs: list[list[int]]
    delay_s: float = 0.0
    step_tokens: int = 1
    finish: FinishReason = FinishReason.LENGTH
    stop_token_id: int | None = None
    refuse: NanoDeployError | None = None  # by Submit
    fail_at: int = -1  # output position where `failure` comes instead of a token
    failure: Failure = ENGINE_FAILED
    stats: RequestStats = NO_STATS
    vector: bytes = b""


@dataclasses.dataclass
class Entry:
    request: GenerationRequest
    prefill: WorkerRef | None
    router_id: str
    rows: list[ChoiceDelta] = dataclasses.field(default_factory=list)
    failure: Failure | None = None
    stats: RequestStats | None = None
    prompt_logprobs: TokenLogprobs | None = None
    cancelled_at: float = 0.0
    acked: dict[int, int] = dataclasses.field(default_factory=dict)
    task: asyncio.Task[None] | None = None


def say(text: str, **kwargs: Any) -> Callable[[GenerationRequest], Script]:
    """Every choice says `text`, cut at max_tokens; it ends by EOS if it is not cut."""
    ids = [*tokenizer().encode(text), 2]

    def script(request: GenerationRequest) -> Script:
        cut = ids[: request.sampling.max_tokens]
        ended = {"finish": FinishReason.STOP, "stop_token_id": 2} if len(cut) == len(ids) else {}
        return Script(outputs=[cut] * request.sampling.n, **{**ended, **kwargs})

    return script


class ScriptedWorker(pb_grpc.DecodeServiceServicer):
    def __init__(
        self,
        script: Callable[[GenerationRequest], Script],
        folder: Path,
        *,
        worker_id: str = "d0",
        model: str = MODEL,
        max_model_len: int = MAX_MODEL_LEN,
        architecture: str = "llama",
        embedding_size: int = 0,
    ) -> None:
        self.script = script
        self.entries: dict[int, Entry] = {}
        self.attached = 0
        self.epoch = new_epoch()
        self.worker_id = worker_id
        self.max_num_seqs = 64
        self.port = 0
        self.model = ModelInfo(
            name=model,
            architecture=architecture,
            model_hash=b"m" * 16,
            max_model_len=max_model_len,
            vocab_size=text_support.byte_level().get_vocab_size(),
            dtype="float32",
            path=str(folder),
            embedding_size=embedding_size,
        )
        self.refuse_streams = False
        self.mute = False  # streams are taken and nothing is said on them
        self._queues: dict[str, asyncio.Queue[pb.StepDeltas | None]] = {}
        self._server: grpc.aio.Server | None = None

    # -- life --

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_DecodeServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def kill(self) -> None:
        """As if the process died: connections close, everything it knew is gone."""
        for entry in self.entries.values():
            if entry.task is not None:
                entry.task.cancel()
        if self._server is not None:
            await asyncio.wait({asyncio.create_task(self._server.stop(0))}, timeout=3)
            self._server = None
        self._queues.clear()

    async def restart(self) -> None:
        """Another process at the same address."""
        await self.kill()
        self.entries = {}
        self.epoch = new_epoch()
        await self.start()

    def break_streams(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(None)

    def info(self, state: WorkerState = WorkerState.READY) -> WorkerInfo:
        ref = WorkerRef(self.worker_id, self.epoch, f"127.0.0.1:{self.port}")
        return WorkerInfo(
            ref=ref, role=Role.DECODE, state=state, model=self.model, max_num_seqs=self.max_num_seqs, kv_block_size=16
        )

    @property
    def requests(self) -> list[GenerationRequest]:
        return [entry.request for entry in self.entries.values()]

    # -- service --

    def _answer(self, router_id: str, number: int, item: pb.SubmitItem) -> pb.StepDeltas:
        try:
            result = pb.SubmitResult(index=number, slot=self._submit(router_id, item))
        except NanoDeployError as error:
            result = pb.SubmitResult(index=number, error=codec.error_to_proto(error))
        return pb.StepDeltas(submitted=[result])

    def _submit(self, router_id: str, item: pb.SubmitItem) -> int:
        decoded = codec.request_from_proto(item.request, time.monotonic())
        plan = self.script(decoded)
        if plan.refuse is not None:
            raise plan.refuse
        slot = len(self.entries) + 1
        prefill = codec.ref_from_proto(item.prefill) if item.HasField("prefill") else None
        entry = self.entries[slot] = Entry(decoded, prefill, router_id)
        entry.task = asyncio.create_task(self._produce(slot, entry, plan))
        return slot

    async def Stream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.StreamRequest], context: Any
    ) -> AsyncIterator[Any]:
        attach = (await anext(aiter(request_iterator))).attach
        if self.refuse_streams:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no streams now")
        if self.mute:
            await until(lambda: not self.mute, timeout_s=60)
        if (older := self._queues.get(attach.router_id)) is not None:
            older.put_nowait(None)
        queue = self._queues[attach.router_id] = asyncio.Queue()
        self.attached += 1
        unknown = [slot for slot in attach.slots if slot not in self.entries]
        for slot, choice, position in zip(attach.slots, attach.choices, attach.next_positions, strict=True):
            if slot in self.entries:
                self._replay(queue, slot, choice, position)
        for slot, entry in self.entries.items():  # its Submit may not have been answered yet
            if slot not in attach.slots and entry.router_id == attach.router_id:
                for choice in range(entry.request.sampling.n):
                    self._replay(queue, slot, choice, 0)
        yield pb.StreamResponse(attached=pb.StreamAttached(epoch=self.epoch, unknown_slots=sorted(set(unknown))))
        reader = asyncio.create_task(self._read(request_iterator, attach.router_id, queue))
        try:
            while (deltas := await queue.get()) is not None:
                yield pb.StreamResponse(deltas=deltas)
        finally:
            reader.cancel()

    def _replay(self, queue: asyncio.Queue[Any], slot: int, choice: int, position: int) -> None:
        entry = self.entries[slot]
        rows = [
            (slot, row)
            for row in entry.rows
            if row.choice == choice and (row.position + len(row.token_ids) > position or row.finish is not None)
        ]
        failures = [(slot, entry.failure)] if entry.failure else []
        queue.put_nowait(codec.deltas_to_proto(rows, failures))

    async def _read(
        self, requests: AsyncIterator[pb.StreamRequest], router_id: str, queue: asyncio.Queue[pb.StepDeltas | None]
    ) -> None:
        number = 0
        async for request in requests:
            for item in request.submit.items:
                queue.put_nowait(self._answer(router_id, number, item))
                number += 1
            if request.WhichOneof("message") == "cancel":
                for slot, choice in zip(request.cancel.slots, request.cancel.choices, strict=True):
                    self._cancel(slot, choice)
            else:
                ack = request.ack
                for slot, choice, position in zip(ack.slots, ack.choices, ack.next_positions, strict=True):
                    if slot in self.entries:
                        self.entries[slot].acked[choice] = position

    def _cancel(self, slot: int, choice: int) -> None:
        entry = self.entries.get(slot)
        if entry is not None and not choice and entry.task is not None:
            entry.cancelled_at = time.monotonic()
            entry.task.cancel()

    # -- output --

    async def _produce(self, slot: int, entry: Entry, plan: Script) -> None:
        sent = [len(entry.request.sent[c]) if c < len(entry.request.sent) else 0 for c in range(len(plan.outputs))]
        longest = max(len(output) for output in plan.outputs)
        entry.stats = msgspec.structs.replace(plan.stats, prompt_tokens=len(entry.request.prompt_token_ids))
        entry.prompt_logprobs = self._prompt_logprobs(entry.request)
        first = True
        for position in range(min(sent), longest + 1, plan.step_tokens):
            if plan.delay_s:
                await asyncio.sleep(plan.delay_s)
            if 0 <= plan.fail_at <= position:
                entry.failure = plan.failure
                self._send(entry, codec.deltas_to_proto([], [(slot, plan.failure)]))
                return
            rows = [r for c in range(len(plan.outputs)) if (r := self._row(entry, plan, c, position, sent[c]))]
            if plan.vector:
                rows = [ChoiceDelta(choice=0, position=0, token_ids=(), finish=plan.finish, vector=plan.vector)]
            entry.rows.extend(rows)
            prompt = [(slot, entry.prompt_logprobs)] if first and entry.prompt_logprobs else []
            stats = [(slot, entry.stats)] if first else []
            first = False
            self._send(entry, codec.deltas_to_proto([(slot, row) for row in rows], (), stats, prompt))

    def _row(self, entry: Entry, plan: Script, choice: int, position: int, sent: int) -> ChoiceDelta | None:
        output = plan.outputs[choice]
        start = max(position, sent)
        ids = tuple(output[start : position + plan.step_tokens])
        if not ids or choice in entry.request.ended_choices:
            return None
        ends = position + plan.step_tokens >= len(output)
        return ChoiceDelta(
            choice=choice,
            position=start,
            token_ids=ids,
            finish=plan.finish if ends else None,
            stop_token_id=plan.stop_token_id if ends else None,
            logprobs=_logprobs(ids, entry.request.sampling.logprobs),
        )

    @staticmethod
    def _prompt_logprobs(request: GenerationRequest) -> TokenLogprobs | None:
        return _logprobs(request.prompt_token_ids[1:], request.sampling.prompt_logprobs)

    def _send(self, entry: Entry, deltas: pb.StepDeltas) -> None:
        queue = self._queues.get(entry.router_id)
        if queue is not None:
            queue.put_nowait(deltas)


def _logprobs(ids: tuple[int, ...], top_n: int | None) -> TokenLogprobs | None:
    """The token itself at -0.25, the ones after it at -1.25, -2.25 ..."""
    if top_n is None:
        return None
    return TokenLogprobs(
        (-0.25,) * len(ids),
        top_n,
        tuple((i + k) % 400 for i in ids for k in range(top_n)),
        tuple(-0.25 - k for _ in ids for k in range(top_n)),
    )


class StaticMembers:
    """Membership that a test changes by hand."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerInfo] = {}
        self._listeners: list[Callable[[MembershipChange], None]] = []

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        return MappingProxyType(self._workers)

    def subscribe(self, listener: Callable[[MembershipChange], None]) -> None:
        for worker in self._workers.values():
            listener(MembershipChange(ChangeKind.ADDED, worker))
        self._listeners.append(listener)

    def put(self, worker: WorkerInfo) -> None:
        kind = ChangeKind.UPDATED if worker.ref.worker_id in self._workers else ChangeKind.ADDED
        self._workers[worker.ref.worker_id] = worker
        self._tell(MembershipChange(kind, worker))

    def remove(self, worker_id: str, reason: str = "expired") -> None:
        self._tell(MembershipChange(ChangeKind.REMOVED, self._workers.pop(worker_id), reason))

    def _tell(self, change: MembershipChange) -> None:
        for listener in self._listeners:
            listener(change)


@dataclasses.dataclass
class Cluster:
    router: Router
    members: StaticMembers
    workers: list[ScriptedWorker]
    http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    @property
    def worker(self) -> ScriptedWorker:
        return self.workers[0]

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def openai_sync(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)


@asynccontextmanager
async def cluster(
    folder: Path,
    script: Callable[[GenerationRequest], Script],
    *,
    num_workers: int = 1,
    max_model_len: int = MAX_MODEL_LEN,
    template: str | None = text_support.CHAT_TEMPLATE,
    architecture: str = "llama",
    embedding_size: int = 0,
    generation: Mapping[str, object] = MappingProxyType({}),
    **config: Any,
) -> AsyncIterator[Cluster]:
    text_support.write_checkpoint(folder, chat_template=template, **generation)
    workers = [
        ScriptedWorker(
            script,
            folder,
            worker_id=f"d{i}",
            max_model_len=max_model_len,
            architecture=architecture,
            embedding_size=embedding_size,
        )
        for i in range(num_workers)
    ]
    members = StaticMembers()
    for worker in workers:
        await worker.start()
        members.put(worker.info())
    router = Router(RouterConfig(host="127.0.0.1", port=0, **config), members)
    port = await router.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        made = Cluster(router, members, workers, http)
        await until(lambda: all(worker.attached for worker in workers))
        try:
            yield made
        finally:
            await router.stop(grace_s=0.5)
            for worker in workers:
                await worker.kill()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Wait for a condition; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "did not come true in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


def events(text: str) -> list[dict[str, Any]]:
    """The JSON events of an SSE body, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1:]
    return [msgspec.json.decode(line) for line in lines[:-1]]
