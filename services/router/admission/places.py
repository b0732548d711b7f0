"""Places on the workers: a gate for each model, and what the members say there is room for."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from common.config.schema import RouterConfig
from common.errors import CancelledByCallerError, NanoDeployError
from common.types import Clock, WorkerInfo, WorkerState
from services.router.admission.gate import Gate, GateSettings
from services.router.exchange import Exchange
from services.router.params import Job

EXPECTED_OUTPUT: Final = 512  # tokens counted for a choice that may have more: most end by themselves
_FRESH_S: Final = 0.05  # the members are counted again after this
_WINDOW_S: Final = 2.0  # a worker's report of our own requests is no older


def cost_of(job: Job) -> int:
    """Tokens that a job is foreseen to take: prompts, and output as far as it is likely."""
    sampling = job.sampling
    each = min(sampling.max_tokens, EXPECTED_OUTPUT) * sampling.n
    return sum(map(len, job.prompts)) + each * len(job.prompts)


class Workers(Protocol):
    def decode_workers(self) -> list[WorkerInfo]: ...


class _Capacity:
    """Sequences that this router may have on the workers of one model.

    `factor` times their batches, less what other routers have there: what the workers report beyond our own. Reports
    come once a second, so our own is the most there was since about then.
    """

    def __init__(self, model: str, workers: Workers, factor: float, clock: Clock) -> None:
        self._model = model
        self._workers = workers
        self._factor = factor
        self._clock = clock
        self._counted_s = -_FRESH_S
        self._value = 0
        self._window_s = 0.0
        self._peak = self._peak_before = 0

    def __call__(self, running: int) -> int:
        now_s = self._clock.now()
        if now_s - self._window_s > _WINDOW_S:
            self._window_s, self._peak_before, self._peak = now_s, self._peak, 0
        self._peak = max(self._peak, running)
        if now_s - self._counted_s >= _FRESH_S:
            self._counted_s = now_s
            self._value = self._count()
        return self._value

    def _count(self) -> int:
        places = reported = 0
        for worker in self._workers.decode_workers():
            if worker.model.name != self._model or worker.state is not WorkerState.READY:
                continue
            if not worker.max_num_seqs:
                return 0
            places += worker.max_num_seqs
            reported += worker.load.running + worker.load.waiting
        others = max(0, reported - max(self._peak, self._peak_before))
        return max(1, round(self._factor * places) - others) if places else 0


class Places:
    def __init__(self, config: RouterConfig, workers: Workers, clock: Clock) -> None:
        self._settings = GateSettings(config.max_queued_requests, config.max_queue_wait_s)
        self._factor = config.queue_factor
        self._workers = workers
        self._clock = clock
        self._gates: dict[str, Gate] = {}

    def gate(self, model: str) -> Gate:
        found = self._gates.get(model)
        if found is None:
            capacity = _Capacity(model, self._workers, self._factor, self._clock) if self._factor else _unlimited
            found = self._gates[model] = Gate(self._settings, capacity, self._clock)
        return found

    def waiting(self) -> tuple[int, int, int]:
        """Requests that wait, by priority: before others, as usual, after others."""
        sizes = [gate.waiting for gate in self._gates.values()]
        high, normal, low = (sum(size[level] for size in sizes) for level in range(3))
        return high, normal, low

    def close(self, error: NanoDeployError) -> None:
        for gate in self._gates.values():
            gate.close(error)


def _unlimited(running: int) -> int:
    return 0


class Place:
    """A request's place in a gate.

    enter -> False: wait -> leave
          `-> True --------^
    """

    __slots__ = ("_clock", "_deadline_s", "_entered_s", "_exchange", "_flow", "_gate", "_job", "_priority", "_seqs")

    def __init__(
        self, gate: Gate, exchange: Exchange, flow: str, priority: int, deadline_s: float, clock: Clock
    ) -> None:
        self._gate = gate
        self._exchange = exchange
        self._flow = flow
        self._priority = priority
        self._deadline_s = deadline_s
        self._clock = clock
        self._entered_s = 0.0

    def enter(self, job: Job) -> bool:
        """False if there is a queue: then it is had by `wait`."""
        self._job = job
        self._seqs = len(job.prompts) * job.sampling.n
        self._entered_s = self._clock.now()
        return self._gate.try_enter(self._seqs)

    def leave(self) -> None:
        self._gate.leave(self._seqs, self._clock.now() - self._entered_s)

    async def wait(self) -> None:
        """Raises what the gate says, `CancelledByCallerError` when the client leaves."""
        gate, seqs = self._gate, self._seqs
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: Exception | None) -> None:
            if turn.done():
                if error is None:
                    gate.leave(seqs)  # its turn came to nobody
            elif error is None:
                turn.set_result(None)
            else:
                turn.set_exception(error)

        waiter = gate.offer(self._flow, cost_of(self._job), seqs, self._priority, self._deadline_s, settle)

        def lost() -> None:
            if not turn.done():
                gate.withdraw(waiter)
                turn.set_exception(CancelledByCallerError("the client went away"))

        gate.pump()
        try:
            with self._exchange.watch(lost, lambda: None):
                await turn
        except asyncio.CancelledError:
            gate.withdraw(waiter)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                gate.leave(seqs)
            raise
        self._entered_s = self._clock.now()
