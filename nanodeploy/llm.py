"""Offline generation: the engine in this process, no services.

llm = LLM("path/to/model", dtype="float32")
for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
print(out.outputs[0].text)
"""

from __future__ import annotations

import gc
import itertools
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError
from torch import Tensor

from common.attention.context import AttentionBackend
from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.config.load import suggest
from common.engine.build import build_engine
from common.engine.calibrate import KVMeter
from common.engine.media_local import LocalMedia
from common.engine.messages import Cancel, Deltas, Submit
from common.errors import ConfigError, NanoDeployError
from common.kvcache.pool import KVPool
from common.models.kv_scales import FILE_NAME, write_scales
from common.models.spec import ModelSpec
from common.text.deepseek import checkpoint_format
from common.text.detokenizer import Detokenizer
from common.text.stop import StopAutomaton, StopMatcher
from common.text.tokenizer import Tokenizer
from common.types import (
    ChoiceDelta,
    EmbeddingHandle,
    FinishReason,
    GenerationRequest,
    MonotonicClock,
    RequestStats,
    Role,
    SamplingParams,
    TokenLogprobs,
)
from nanodeploy.guard import EngineGuard, interrupts_held_back


@dataclass(frozen=True)
class MediaRows:
    """An image's embeddings in place of the tokens from `position` on, one row per token.

    `rows`: a floating tensor [num_tokens, width]; the width is the model's hidden size, and that again for each
    feature that is added to its first layers. `grid`: rows by time, height and width.
    """

    position: int
    rows: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class MediaPrompt:
    """Token ids, those of the model's placeholders where images are, and the images in their order."""

    token_ids: Sequence[int]
    media: Sequence[MediaRows]


Prompt = str | Sequence[int] | MediaPrompt
Progress = Callable[[int, int], None]
Loading = Callable[[str, int, int], None]


@dataclass
class CompletionOutput:
    """One choice. `text` ends before a stop string unless it was asked for; `token_ids` with the token that made it.

    `logprobs` has an entry for each token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: TokenLogprobs | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    error: NanoDeployError | None = None  # why it failed, where errors were kept; `outputs` are then incomplete


@dataclass
class _Choice:
    output: CompletionOutput
    detokenizer: Detokenizer
    stops: StopMatcher | None

    def push(self, delta: ChoiceDelta) -> bool:
        """Take new tokens; True if a stop string ended the choice, whose tokens end there."""
        output, logprobs = self.output, delta.logprobs
        hidden = -1 if delta.stop_token_id is None else len(delta.token_ids) - 1  # not text
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
        if self.stops is None:
            self.output.text += text
            return False
        self.output.text += self.stops.push(text)
        if self.stops.matched is None:
            return False
        self.output.finish_reason, self.output.stop_reason = FinishReason.STOP.value, self.stops.matched
        return True


class LLM:
    """A model, loaded. `options` are the fields of `EngineConfig` (vLLM's names): dtype, max_model_len ...

    Any number of prompts may wait, unless `max_waiting_seqs` says otherwise. `loading(stage, done, total)` is called
    as it loads; stage "loading weights" counts bytes. Raises ConfigError for a bad checkpoint or option.

    A rank that is lost (`RankLostError`) ends it, and so does Ctrl-C that does not wait for the end of a step.
    """

    def __init__(self, model: str | Path, *, loading: Loading | None = None, **options: Any) -> None:
        engine = _engine_config(model, {"max_waiting_seqs": sys.maxsize} | options)
        config = WorkerConfig(engine=engine, handoff=HandoffConfig(transports=("memory",)))
        self._folder = Path(model)
        self._clock = MonotonicClock()
        self._media = LocalMedia()
        self._built = build_engine(config, Role.DECODE, self._clock, loading or (lambda *_: None), media=self._media)
        self._built.engine.drain()
        self._guard = EngineGuard(self._built)
        if self._built.ready.device != "cpu":
            gc.collect()
            gc.freeze()  # a full collection that looks through model and libraries would hold a step up for 0.1 s
        self._slots = itertools.count(1)
        self.tokenizer = Tokenizer.load(Path(model)) if _has_tokenizer(Path(model)) else None

    @property
    def max_model_len(self) -> int:
        return self._built.ready.max_model_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        keep_errors: bool = False,
    ) -> list[RequestOutput]:
        """Answer all prompts (texts, token ids, or token ids with images), batched, in their order.

        `progress(done, total)` is called as requests end. Raises the error of the first request that fails; with
        `keep_errors` that becomes the `error` of its output, and the others go on. Ctrl-C waits for the step that is
        under way; pressed again it does not, and ends this LLM.
        """
        if self._guard.ended is not None:
            raise self._guard.ended
        many = _many(prompts)
        params = sampling_params if sampling_params is not None else SamplingParams()
        per_prompt = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(per_prompt) != len(many):
            raise ValueError(f"{len(many)} prompts and {len(per_prompt)} sampling params")
        return _Run(self, keep_errors).all(many, per_prompt, progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
    ) -> RequestOutput:
        """Answer one conversation with the checkpoint's chat template."""
        tokenizer = self._need_tokenizer()
        template = tokenizer.chat_template or checkpoint_format(
            ModelSpec.from_folder(self._folder).model_type, self._folder
        )
        if template is None:
            raise ValueError("the checkpoint has no chat template")
        prompt = tokenizer.encode(template.render(list(messages)), add_special_tokens=False)
        return self.generate([prompt], sampling_params)[0]

    def calibrate_kv(self, prompts: Prompt | Sequence[Prompt], path: str | Path = "", **about: Any) -> Path:
        """Measure the scales that `kv_dtype="fp8_e4m3"` needs on these prompts, and write them.

        To the file `path` (for `kv_scales`), or beside the checkpoint, where they are found. `about`: what else the
        file shall say. Raises ConfigError for a model or an engine that it cannot be done with.
        """
        spec = ModelSpec.from_folder(self._folder)
        meters: list[KVMeter] = []

        def watch(backend: AttentionBackend, pool: KVPool) -> AttentionBackend:
            meters.append(KVMeter(spec, backend, pool))
            return meters[0]

        runner = self._built.parts.runner
        runner.observe(watch)
        try:
            outputs = self.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1))
        finally:
            runner.observe(lambda _, pool: meters[0].backend)
        target = Path(path) if path else self._folder / FILE_NAME
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        write_scales(target, spec, meters[0].scales(), **{"tokens": num_tokens} | about)
        return target

    def close(self) -> None:
        """Free the KV cache and stop the transport."""
        self._built.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer.json: give token ids")
        return self.tokenizer


class _Run:
    """One call of `generate`."""

    def __init__(self, llm: LLM, keep_errors: bool) -> None:
        self._llm = llm
        self._keep_errors = keep_errors
        self._engine = llm._built.engine
        self._guard = llm._guard
        self._outputs: list[RequestOutput] = []
        self._choices: dict[int, list[_Choice]] = {}
        self._by_slot: dict[int, RequestOutput] = {}
        self._handles: list[EmbeddingHandle] = []

    def all(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], progress: Progress | None
    ) -> list[RequestOutput]:
        """Run to the end; what still runs when that fails is cancelled."""
        total = len(prompts)
        try:
            with interrupts_held_back() as look:
                for prompt, one in zip(prompts, params, strict=True):
                    self._submit(prompt, one)
                while self._by_slot:
                    with self._guard.computing():
                        self._engine.step()
                    for message in self._engine.drain():
                        if isinstance(message, Deltas):
                            self._take(message)
                    if progress is not None:
                        progress(total - len(self._by_slot), total)
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
            self._llm._media.drop(handle)

    def _submit(self, prompt: Prompt, params: SamplingParams) -> None:
        llm = self._llm
        slot = next(llm._slots)
        media = prompt.media if isinstance(prompt, MediaPrompt) else ()
        prompt = prompt.token_ids if isinstance(prompt, MediaPrompt) else prompt
        ids = llm._need_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        handles = tuple(llm._media.put(m.position, m.rows, m.grid) for m in media)
        self._handles += handles
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(64))
        output = RequestOutput(
            request_id=f"{slot:032x}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            outputs=[CompletionOutput(i) for i in range(params.n)],
        )
        stops = StopAutomaton(params.stop) if params.stop else None
        self._choices[slot] = [self._choice(o, ids, params, stops) for o in output.outputs]
        self._by_slot[slot] = output
        self._outputs.append(output)
        request = GenerationRequest(
            request_id=output.request_id, model="", prompt_token_ids=tuple(ids), sampling=params, embeddings=handles
        )
        self._engine.handle(Submit(slot, request))

    def _choice(
        self, output: CompletionOutput, prompt_ids: list[int], params: SamplingParams, stops: StopAutomaton | None
    ) -> _Choice:
        tokenizer = self._llm.tokenizer
        detokenizer: Detokenizer = (
            _NoText()
            if tokenizer is None
            else tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens, context=prompt_ids)
        )
        matcher = None
        if stops is not None:
            self._llm._need_tokenizer()
            matcher = StopMatcher(stops, include_stop=params.include_stop_str_in_output)
        return _Choice(output, detokenizer, matcher)

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
            self._by_slot[prompt.slot].prompt_logprobs = prompt.logprobs
        for delta_row in deltas.rows:
            output = self._by_slot.get(delta_row.slot)
            if output is not None:
                self._delta(delta_row.slot, output, delta_row.delta)

    def _delta(self, slot: int, output: RequestOutput, delta: ChoiceDelta) -> None:
        choice = self._choices[slot][delta.choice]
        if choice.output.finish_reason is not None:
            return
        if choice.push(delta) and delta.finish is None:
            self._engine.handle(Cancel((slot,), (delta.choice,)))
        if all(o.finish_reason is not None for o in output.outputs):
            del self._by_slot[slot]


class _NoText:
    """A model folder without a tokenizer gives token ids only."""

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | MediaPrompt):
        return [prompts]
    ids = [p for p in prompts if isinstance(p, int)]
    if not ids:
        return [p for p in prompts if not isinstance(p, int)]
    if len(ids) != len(prompts):
        raise ValueError("prompts mixes token ids with prompts")
    return [ids]


def _engine_config(model: str | Path, options: Mapping[str, Any]) -> EngineConfig:
    """Raises `ConfigError` that names the option or the folder."""
    for name in options:
        if name not in EngineConfig.model_fields:
            raise ConfigError(f"unknown option {name!r}; {suggest(name, EngineConfig)}", param=name)
    try:
        config = EngineConfig(model=str(model), **options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{model}: not a folder of a Hugging Face checkpoint: it has no config.json", param="model")
    return config


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


__all__ = ["LLM", "CompletionOutput", "MediaPrompt", "MediaRows", "RequestOutput", "SamplingParams"]
