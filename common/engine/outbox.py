"""Collects what a step brought into one `Deltas` message, and messages in order around it."""

from __future__ import annotations

from common.engine.messages import DeltaRow, Deltas, FailureOf, FromEngine, PromptLogprobsOf, StatsOf
from common.errors import NanoDeployError
from common.types import ChoiceDelta, Failure, RequestStats


class Outbox:
    def __init__(self) -> None:
        self._messages: list[FromEngine] = []
        self._rows: list[DeltaRow] = []
        self._failures: list[FailureOf] = []
        self._stats: list[StatsOf] = []
        self._prompt_logprobs: list[PromptLogprobsOf] = []

    def send(self, message: FromEngine) -> None:
        self._messages.append(message)

    def delta(self, slot: int, delta: ChoiceDelta) -> None:
        self._rows.append(DeltaRow(slot, delta))

    def fail(self, slot: int, error: NanoDeployError) -> None:
        self._failures.append(FailureOf(slot, Failure.of(error)))

    def stats(self, slot: int, stats: RequestStats) -> None:
        self._stats.append(StatsOf(slot, stats))

    def prompt_logprobs(self, row: PromptLogprobsOf) -> None:
        self._prompt_logprobs.append(row)

    def drain(self, step: int) -> list[FromEngine]:
        """All messages since the last call, the step's deltas last.

        Prompt logprobs can be large: each of them is a message of its own, ahead of the rows that end its request.
        """
        messages = self._messages
        self._messages = []
        messages.extend(Deltas(step, prompt_logprobs=(row,)) for row in self._prompt_logprobs)
        if self._rows or self._failures or self._stats:
            messages.append(Deltas(step, tuple(self._rows), tuple(self._failures), tuple(self._stats)))
        self._rows, self._failures, self._stats, self._prompt_logprobs = [], [], [], []
        return messages
