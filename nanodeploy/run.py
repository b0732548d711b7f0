"""One offline call: its prompts go to the engine together, and what comes back to their outputs.

all(prompts) -> Submit of each -> steps until the last has ended -> outputs, in the prompts' order
"""

from __future__ import annotations

import itertools
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec
import numpy as np

from common.engine.engine import Engine
from common.engine.media_local import LocalMedia
from common.engine.messages import Cancel, Deltas, Submit
from common.text.detokenizer import Detokenizer
from common.text.stop import StopAutomaton, StopMatcher
from common.text.tokenizer import Tokenizer
from common.types import ChoiceDelta, EmbeddingHandle, FinishReason, GenerationRequest, Pooling, SamplingParams
from nanodeploy.guard import EngineGuard, interrupts_held_back
from nanodeploy.outputs import (
    CompletionOutput,
    Embedding,
    EmbeddingRequestOutput,
    MediaPrompt,
    Plain,
    Progress,
    RequestOutput,
)

Output = TypeVar("Output", RequestOutput, EmbeddingRequestOutput)
Asked = TypeVar("Asked", SamplingParams, Pooling)


@dataclass(frozen=True)
class Local:
    """An engine in this process, with what its calls share."""

    engine: Engine
    guard: EngineGuard
    media: LocalMedia
    tokenizer: Tokenizer | None
    slots: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer.json: give token ids")
        return self.tokenizer

    def ids_of(self, prompt: Plain) -> list[int]:
        if isinstance(prompt, str):
            return self.need_tokenizer().encode(prompt)
        return list(prompt.token_ids if isinstance(prompt, MediaPrompt) else prompt)


class _Run(ABC, Generic[Asked, Output]):
    def __init__(self, local: Local, keep_errors: bool) -> None:
        self._local = local
        self._engine = local.engine
        self._guard = local.guard
        self._keep_errors = keep_errors
        self._outputs: list[Output] = []
        self._by_slot: dict[int, Output] = {}
        self._handles: list[EmbeddingHandle] = []

    def all(self, prompts: Sequence[tuple[Plain, Asked]], progress: Progress | None) -> list[Output]:
        """Run to the end; what still runs when that fails is cancelled."""
        if self._guard.ended is not None:
            raise self._guard.ended
        try:
            with interrupts_held_back() as look:
                for prompt, asked in prompts:
                    self._submit(prompt, asked)
                while self._by_slot:
                    with self._guard.computing():
                        self._engine.step()
                    for message in self._engine.drain():
                        if isinstance(message, Deltas):
                            self._take(message)
                    if progress is not None:
                        progress(len(prompts) - len(self._by_slot), len(prompts))
                    look()
        finally:
            self._end()
        return self._outputs

    def _end(self) -> None:
        if self._guard.ended is None:
            if self._by_slot:
                self._engine.handle(Cancel(tuple(self._by_slot)))
            with self._guard.computing():
                self._engine.settle()
            self._engine.drain()
        for handle in self._handles:
            self._local.media.drop(handle)

    @abstractmethod
    def _submit(self, prompt: Plain, asked: Asked) -> None: ...

    @abstractmethod
    def _delta(self, slot: int, output: Output, delta: ChoiceDelta) -> None: ...

    def _put(self, slot: int, output: Output, request: GenerationRequest) -> None:
        self._by_slot[slot] = output
        self._outputs.append(output)
        self._engine.handle(Submit(slot, request))

    def _take(self, deltas: Deltas) -> None:
        for failure in deltas.failures:
            failed = self._by_slot.pop(failure.slot, None)
            if failed is None:
                continue
            if not self._keep_errors:
                raise failure.failure.to_error()
            failed.error = failure.failure.to_error()
        for row in deltas.stats:
            if row.slot in self._by_slot:
                self._by_slot[row.slot].stats = row.stats
        for prompt in deltas.prompt_logprobs:
            asked = self._by_slot[prompt.slot]
            assert isinstance(asked, RequestOutput)
            asked.prompt_logprobs = prompt.logprobs
        for delta_row in deltas.rows:
            output = self._by_slot.get(delta_row.slot)
            if output is not None:
                self._delta(delta_row.slot, output, delta_row.delta)


class GenerateRun(_Run[SamplingParams, RequestOutput]):
    """One call of `LLM.generate`."""

    def __init__(self, local: Local, keep_errors: bool) -> None:
        super().__init__(local, keep_errors)
        self._choices: dict[int, list[_Choice]] = {}

    def _submit(self, prompt: Plain, asked: SamplingParams) -> None:
        local, slot, ids = self._local, next(self._local.slots), self._local.ids_of(prompt)
        begun = len(self._handles)
        for image in prompt.media if isinstance(prompt, MediaPrompt) else ():
            self._handles.append(local.media.put(image.position, image.rows, image.grid))
        params = asked if asked.seed is not None else msgspec.structs.replace(asked, seed=secrets.randbits(64))
        output = RequestOutput(
            request_id=f"{slot:032x}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            outputs=[CompletionOutput(i) for i in range(params.n)],
        )
        stops = StopAutomaton(params.stop) if params.stop else None
        self._choices[slot] = [self._choice(o, ids, params, stops) for o in output.outputs]
        request = GenerationRequest(
            request_id=output.request_id,
            model="",
            prompt_token_ids=tuple(ids),
            sampling=params,
            embeddings=tuple(self._handles[begun:]),
        )
        self._put(slot, output, request)

    def _choice(
        self, output: CompletionOutput, prompt_ids: list[int], params: SamplingParams, stops: StopAutomaton | None
    ) -> _Choice:
        tokenizer = self._local.tokenizer
        detokenizer: Detokenizer = (
            _NoText()
            if tokenizer is None
            else tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens, context=prompt_ids)
        )
        matcher = None
        if stops is not None:
            self._local.need_tokenizer()
            matcher = StopMatcher(stops, include_stop=params.include_stop_str_in_output)
        return _Choice(output, detokenizer, matcher, params)

    def _delta(self, slot: int, output: RequestOutput, delta: ChoiceDelta) -> None:
        choice = self._choices[slot][delta.choice]
        if choice.output.finish_reason is not None:
            return
        stopped = choice.push(delta)
        if stopped and delta.finish is None:
            self._engine.handle(Cancel((slot,), (delta.choice,)))
        if (stopped or delta.finish is not None) and all(o.finish_reason is not None for o in output.outputs):
            del self._by_slot[slot]


class EmbedRun(_Run[Pooling, EmbeddingRequestOutput]):
    """One call of `LLM.embed`."""

    def _submit(self, prompt: Plain, asked: Pooling) -> None:
        slot, ids = next(self._local.slots), self._local.ids_of(prompt)
        output = EmbeddingRequestOutput(
            request_id=f"{slot:032x}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            outputs=Embedding(),
        )
        request = GenerationRequest(
            request_id=output.request_id,
            model="",
            prompt_token_ids=tuple(ids),
            sampling=SamplingParams(max_tokens=1, seed=0),
            pooling=asked,
        )
        self._put(slot, output, request)

    def _delta(self, slot: int, output: EmbeddingRequestOutput, delta: ChoiceDelta) -> None:
        output.outputs.embedding = np.frombuffer(delta.vector, "<f4").tolist()
        del self._by_slot[slot]


@dataclass
class _Choice:
    output: CompletionOutput
    detokenizer: Detokenizer
    stops: StopMatcher | None
    params: SamplingParams

    def push(self, delta: ChoiceDelta) -> bool:
        """Take new tokens; True if a stop string ended the choice, whose tokens end there."""
        output, logprobs = self.output, delta.logprobs
        is_text = delta.stop_token_id is None or self.params.include_stop_str_in_output
        hidden = -1 if is_text else len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            output.token_ids.append(token_id)
            if logprobs is not None:
                output.logprobs.append(logprobs.part(i, i + 1))
            if i != hidden and self._show(self.detokenizer.push((token_id,))):
                return True
        if delta.finish is None:
            return False
        if self._show(self.detokenizer.finish()):
            return True
        if self.stops is not None:
            output.text += self.stops.flush()
        output.finish_reason, output.stop_reason = delta.finish.value, delta.stop_token_id
        return False

    def _show(self, text: str) -> bool:
        if self.stops is None or len(self.output.token_ids) <= self.params.min_tokens:
            self.output.text += text
            return False
        self.output.text += self.stops.push(text)
        if self.stops.matched is None:
            return False
        self.output.finish_reason, self.output.stop_reason = FinishReason.STOP.value, self.stops.matched
        return True


class _NoText:
    """A model folder without a tokenizer gives token ids only."""

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""
