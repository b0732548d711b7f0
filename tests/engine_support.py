"""Engines for tests, in this process: alone, or a prefill and a decode engine joined by a memory network.

The models are tiny and real; only the network is made up, so that its faults can be made on purpose. Every
engine recounts its KV ledger at every step.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import select
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_models
import torch
from parallel_support import LockedTransport, ThreadRanks
from transformers import AutoModelForCausalLM
from worker_support import ManualClock

from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.engine.build import BuiltEngine, build_engine
from common.engine.media import MediaSource
from common.engine.messages import (
    Cancel,
    Deltas,
    FromEngine,
    PeerEvent,
    PeerGone,
    PeerReady,
    ReaderEvent,
    ReaderGone,
    Submit,
)
from common.kvtransfer.memory import MemoryNetwork
from common.kvtransfer.orders import DropOrder, PeerVerdict, PlaceOrder, ReleaseLease
from common.types import (
    Clock,
    Failure,
    FinishReason,
    GenerationRequest,
    RequestStats,
    Role,
    SamplingParams,
    TokenLogprobs,
    WorkerRef,
)

KV_BYTES = 8 << 20
PEER = 7
READER = 3


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_llama(tmp_path_factory.mktemp("llama"), seed=1)


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with a full and sliding-window layers: two positional groups."""
    return tiny_models.make_qwen3(tmp_path_factory.mktemp("windowed"), seed=2, sliding_window=24, num_hidden_layers=4)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three kinds of layers: delta nets and one that attends."""
    return tiny_models.make_qwen3_5(tmp_path_factory.mktemp("hybrid"), seed=6, max_position_embeddings=1024)


@functools.cache
def _oracle(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def reference_tokens(folder: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens of transformers in fp32."""
    with torch.inference_mode():
        ids = torch.tensor([list(prompt)])
        out = _oracle(folder).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def prompts(seed: int, lengths: Sequence[int], vocab: int = tiny_models.VOCAB_SIZE) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(4, vocab) for _ in range(n)) for n in lengths]


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "seed": 0} | more))


@dataclass
class Answer:
    """What a request has got so far."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, FinishReason] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    failure: Failure | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    prompt_logprobs: TokenLogprobs | None = None
    vector: bytes = b""

    @property
    def ended(self) -> bool:
        return self.failure is not None or (bool(self.finish) and len(self.finish) == self.num_choices)

    num_choices: int = 1


class Answers:
    """Collects deltas and insists that they are consistent: positions without gap, one end per choice."""

    def __init__(self) -> None:
        self.by_slot: dict[int, Answer] = {}

    def take(self, deltas: Deltas) -> None:
        for row in deltas.rows:
            answer, delta = self.by_slot[row.slot], row.delta
            tokens = answer.tokens.setdefault(delta.choice, [])
            assert answer.failure is None
            assert delta.choice not in answer.finish
            assert delta.position == len(tokens)
            tokens += delta.token_ids
            if delta.logprobs is not None:
                answer.logprobs.setdefault(delta.choice, []).extend(delta.logprobs.token_logprobs)
            if delta.finish is not None:
                answer.finish[delta.choice] = delta.finish
                answer.vector = delta.vector
        for failure in deltas.failures:
            answer = self.by_slot[failure.slot]
            assert not answer.ended
            answer.failure = failure.failure
        for stats in deltas.stats:
            self.by_slot[stats.slot].stats = stats.stats
        for prompt in deltas.prompt_logprobs:
            self.by_slot[prompt.slot].prompt_logprobs = prompt.logprobs


class Solo:
    """One engine."""

    def __init__(self, folder: Path, clock: Clock | None = None, **engine: Any) -> None:
        self.clock = clock or ManualClock()
        self.network = MemoryNetwork(self.clock)
        self.decode = make_engine(folder, Role.DECODE, self.network, self.clock, **engine)
        self.answers = Answers()
        self._slots = itertools.count(1)

    def submit(self, prompt: Sequence[int], params: SamplingParams, prefill: int = 0, **request: Any) -> Answer:
        slot = next(self._slots)
        answer = self.answers.by_slot[slot] = Answer(num_choices=params.n - len(request.get("ended_choices", ())))
        answer.slot = slot  # type: ignore[attr-defined]
        remaining_s = request.pop("remaining_s", 0.0)
        whole = GenerationRequest(
            request_id=f"r{slot}", model="m", prompt_token_ids=tuple(prompt), sampling=params, **request
        )
        sent = request.get("sent", ())
        for choice, tokens in enumerate(sent):
            answer.tokens[choice] = list(tokens)
        self.decode.engine.handle(Submit(slot, whole, remaining_s, prefill))
        return answer

    def cancel(self, answer: Answer, choice: int | None = None) -> None:
        self.decode.engine.handle(Cancel((answer.slot,), (choice,)))  # type: ignore[attr-defined]

    def step(self) -> None:
        self.decode.engine.step()
        for message in self.decode.engine.drain():
            self.on_decode(message)

    def on_decode(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            self.answers.take(message)

    def run(self, *answers: Answer, limit: int = 5000) -> None:
        """Step until these (or all) requests have ended."""
        wanted = answers or tuple(self.answers.by_slot.values())
        for _ in range(limit):
            if all(a.ended for a in wanted):
                return
            self.step()
            self._await_grammars()
        raise AssertionError(f"no end after {limit} steps")

    def _await_grammars(self) -> None:
        """Threads compile them: steps that have nothing else to do would run out meanwhile."""
        pool = self.decode.parts.grammars
        if pool is not None and pool.next_deadline < math.inf and not self.decode.parts.scheduler.has_work:
            waiting = select.poll()
            waiting.register(pool.wakeup_fd, select.POLLIN)
            waiting.poll(100)

    def check_idle(self) -> None:
        for _ in range(3):
            self.step()
        self.decode.parts.cache.check()
        self.decode.parts.cache.check_idle()
        assert len(self.decode.parts.requests) == 0


class Pair(Solo):
    """A decode engine with a prefill engine behind it. `to_owner` and `to_reader` may be bent by tests."""

    def __init__(
        self, folder: Path, prefill: dict[str, Any] | None = None, handoff: dict[str, Any] | None = None, **decode: Any
    ) -> None:
        clock = ManualClock()
        super().__init__(folder, clock, handoff=handoff or {}, **decode)
        self.prefill = make_engine(folder, Role.PREFILL, self.network, self.clock, **(prefill or {}))
        self.verdicts: list[PeerVerdict] = []
        self.events: list[Any] = []
        self.cut = False
        self.connect()

    def connect(self, peer: int = PEER) -> None:
        ready = self.prefill.ready
        ref = WorkerRef("prefill-0", 1, "nowhere:1")
        self.decode.engine.handle(PeerReady(peer, ref, ready.layout, ready.endpoints, ready.lease_ttl_s))

    def submit(self, prompt: Sequence[int], params: SamplingParams, prefill: int = PEER, **request: Any) -> Answer:
        return super().submit(prompt, params, prefill, **request)

    def step(self) -> None:
        super().step()
        self.prefill.engine.step()
        for message in self.prefill.engine.drain():
            if isinstance(message, ReaderEvent) and message.reader == READER and not self.cut:
                self.events.append(message.event)
                self.decode.engine.handle(PeerEvent(PEER, message.event))

    def on_decode(self, message: FromEngine) -> None:
        super().on_decode(message)
        if isinstance(message, PeerVerdict):
            self.verdicts.append(message)
        if self.cut:
            return
        match message:
            case PlaceOrder() | DropOrder() | ReleaseLease():
                self.prefill.engine.handle(msgspec.structs.replace(message, peer=READER))

    def kill_prefill(self) -> None:
        """The prefill process dies: its memory, its session, everything."""
        self.cut = True
        self.network.kill(self.prefill.transport)  # type: ignore[arg-type]
        self.decode.engine.handle(PeerGone(PEER, "killed"))

    def lose_session(self) -> None:
        """Only the session breaks; both engines live on."""
        self.cut = True
        self.decode.engine.handle(PeerGone(PEER, "session lost"))
        self.prefill.engine.handle(ReaderGone(READER))

    def check_idle(self) -> None:
        super().check_idle()
        if not self.cut:
            self.prefill.parts.cache.check()
            self.prefill.parts.cache.check_idle()


def abort_after(pair: Pair, steps: int, prompt: tuple[int, ...], count: int) -> Answer:
    """Cancel a hand-off some steps after it was asked for, its bytes still held back; another answer, still to come."""
    pair.network.held = True
    answer = pair.submit(prompt, greedy(count))
    bystander = pair.submit(prompt[:50], greedy(count))
    for _ in range(steps):
        pair.step()
        pair.network.step()
    pair.cancel(answer)
    pair.network.held = False
    pair.network.advance()
    pair.run(bystander)
    assert answer.ended
    return bystander


def make_engine(
    folder: Path, role: Role, network: MemoryNetwork, clock: Clock, media: MediaSource | None = None, **options: Any
) -> BuiltEngine:
    handoff = {"transports": ("memory",), "min_remote_tokens": 1} | options.pop("handoff", {})
    engine = {"dtype": "float32", "check_ledger": True, "num_threads": 1, "kv_cache_memory_bytes": KV_BYTES} | options
    config = WorkerConfig(engine=EngineConfig(model=str(folder), **engine), handoff=HandoffConfig(**handoff))
    transport = LockedTransport(network)
    ranks = ThreadRanks(network, clock) if config.engine.tensor_parallel_size > 1 else None
    built = build_engine(config, role, clock, lambda stage, done, total: None, transport, media, ranks)
    built.engine.drain()
    return built
