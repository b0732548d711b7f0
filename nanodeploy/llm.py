"""Offline generation: the engine in this process, no services.

    llm = LLM("path/to/model", dtype="float32")
    for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
        print(out.outputs[0].text)

An `LLM` is one engine, and each call runs its prompts to the end.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.attention.context import AttentionBackend
from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.config.load import suggest
from common.engine.build import BuiltEngine, build_engine
from common.engine.calibrate import KVMeter
from common.engine.gpu_memory import give_memory_back
from common.engine.media_local import LocalMedia
from common.errors import ConfigError
from common.kvcache.pool import KVPool
from common.models.kv_scales import FILE_NAME, write_scales
from common.models.spec import ModelSpec
from common.text.deepseek import checkpoint_format
from common.text.tokenizer import Tokenizer
from common.types import MonotonicClock, Pooling, Role, SamplingParams
from nanodeploy.guard import EngineGuard
from nanodeploy.outputs import (
    CompletionOutput,
    EmbeddingRequestOutput,
    MediaPrompt,
    MediaRows,
    Progress,
    Prompt,
    RequestOutput,
)
from nanodeploy.prompts import many
from nanodeploy.run import EmbedRun, GenerateRun, Local

Loading = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Opened:
    built: BuiltEngine
    local: Local


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
        media = LocalMedia()
        built = build_engine(config, Role.DECODE, MonotonicClock(), loading or (lambda *_: None), media=media)
        built.engine.drain()
        if built.ready.device != "cpu":
            gc.collect()
            gc.freeze()  # a full collection that looks through model and libraries would hold a step up for 0.1 s
        self.tokenizer = Tokenizer.load(Path(model)) if _has_tokenizer(Path(model)) else None
        self._opened: _Opened | None = _Opened(built, Local(built.engine, EngineGuard(built), media, self.tokenizer))

    @property
    def max_model_len(self) -> int:
        return self._built.ready.max_model_len

    @property
    def _built(self) -> BuiltEngine:
        return self._open().built

    @property
    def _local(self) -> Local:
        return self._open().local

    def _open(self) -> _Opened:
        """ValueError once it is closed."""
        if self._opened is None:
            raise ValueError("this LLM is closed")
        return self._opened

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        keep_errors: bool = False,
    ) -> list[RequestOutput]:
        """Answer all prompts (texts, token ids, token ids with images, or dicts of vLLM's), batched, in their order.

        `progress(done, total)` is called as requests end. Raises the error of the first request that fails; with
        `keep_errors` that becomes the `error` of its output, and the others go on. Ctrl-C waits for the step that is
        under way; pressed again it does not, and ends this LLM.
        """
        plain = many(prompts)
        params = sampling_params if sampling_params is not None else SamplingParams()
        per_prompt = [params] * len(plain) if isinstance(params, SamplingParams) else list(params)
        if len(per_prompt) != len(plain):
            raise ValueError(f"{len(plain)} prompts and {len(per_prompt)} sampling params")
        return GenerateRun(self._local, keep_errors).all(list(zip(plain, per_prompt, strict=True)), progress)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int = 0,
        progress: Progress | None = None,
        keep_errors: bool = False,
    ) -> list[EmbeddingRequestOutput]:
        """The vectors of all prompts, in their order; the first `dimensions` of their numbers (0: all).

        For a checkpoint that makes embeddings, or any with `runner="pooling"`. `progress`, `keep_errors` and Ctrl-C as
        `generate` has them.
        """
        asked, plain = Pooling(dimensions), many(prompts)
        if any(isinstance(prompt, MediaPrompt) for prompt in plain):
            raise ValueError("embed takes no images")
        return EmbedRun(self._local, keep_errors).all([(prompt, asked) for prompt in plain], progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
    ) -> RequestOutput:
        """Answer one conversation with the checkpoint's chat template."""
        tokenizer = self._local.need_tokenizer()
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
        """Stop the engine, and give its memory back: model and KV cache are gone. Closing it again does nothing."""
        if self._opened is None:
            return
        built, self._opened = self._opened.built, None
        built.close()
        if built.ready.device != "cpu":
            del built
            gc.unfreeze()
            give_memory_back()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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


__all__ = [
    "LLM",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "MediaPrompt",
    "MediaRows",
    "RequestOutput",
    "SamplingParams",
]
