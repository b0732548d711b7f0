"""The text side of each served model: tokenizer, chat template, the checkpoint's sampling defaults.

    unknown -> LOADING (in a thread, once; whoever needs it waits) -> LOADED | failed (tried again on next use)

Where the files are: the router's own `model_path`, else the folder that the workers report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from common.config.schema import RouterConfig
from common.errors import ConfigError, UnavailableError, UnsupportedError
from common.telemetry import get_logger
from common.text import ChatTemplate, Tokenizer
from common.text.deepseek import DeepSeekFormat, checkpoint_format
from common.text.parsers import CallFormat, ReasoningFormat, call_format, reasoning_format
from common.types import ModelInfo

T = TypeVar("T")

OFF_LOOP_CHARS: Final = 4096  # shorter texts are encoded on the loop: less than a millisecond
_SAMPLING_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_log = get_logger(__name__)


@dataclass(frozen=True)
class ModelText:
    tokenizer: Tokenizer
    template: ChatTemplate | DeepSeekFormat | None
    defaults: dict[str, Any]
    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None

    def require_template(self) -> ChatTemplate | DeepSeekFormat:
        if self.template is None:
            raise UnsupportedError("this model has no chat template: use /v1/completions", param="messages")
        return self.template


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """What generation_config.json says about sampling, where it says something."""
    found = {name: generation_config[name] for name in _SAMPLING_DEFAULTS if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def load_model_text(
    folder: Path,
    template_file: str = "",
    *,
    fast: bool = True,
    architecture: str = "",
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> ModelText:
    """Raises `ConfigError` naming the file or setting at fault. `fast`: see `Tokenizer.load`."""
    tokenizer = Tokenizer.load(folder, fast=fast)
    template = tokenizer.chat_template or checkpoint_format(architecture, folder)
    if template_file:
        try:
            source = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat template {template_file}: {error}", param="chat_template") from error
        template = ChatTemplate(source, special_tokens=tokenizer.special_tokens, name=template_file)
    shown = "" if template is None else template.shown
    return ModelText(
        tokenizer,
        template,
        sampling_defaults(tokenizer.generation_config),
        call_format(tool_call_parser, shown, architecture),
        reasoning_format(reasoning_parser, shown, architecture),
    )


class ModelTexts:
    """Owns the loaded texts and the threads that load and encode."""

    def __init__(self, config: RouterConfig) -> None:
        """Raises `ConfigError` for parsers that there are not."""
        call_format(config.tool_call_parser, "", "")
        reasoning_format(config.reasoning_parser, "", "")
        self._config = config
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._loaded: dict[tuple[str, bytes], ModelText] = {}
        self._loading: dict[tuple[str, bytes], asyncio.Task[ModelText]] = {}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def peek(self, model: ModelInfo) -> ModelText | None:
        """None if it has not been read yet."""
        return self._loaded.get((self._config.model_path or model.path, model.model_hash))

    async def get(self, model: ModelInfo) -> ModelText:
        """Raises `UnavailableError` while the files cannot be read."""
        folder = self._config.model_path or model.path
        key = (folder, model.model_hash)
        loaded = self._loaded.get(key)
        if loaded is not None:
            return loaded
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(key, model.architecture))
        return await asyncio.shield(task)

    async def _load(self, key: tuple[str, bytes], architecture: str) -> ModelText:
        folder, config = key[0], self._config
        load = partial(
            load_model_text,
            Path(folder),
            config.chat_template,
            fast=config.tokenizer_backend == "auto",
            architecture=architecture,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        )
        try:
            text = await self.off_loop(load)
        except ConfigError as error:
            _log.error("model text not loaded", folder=folder, error=error.message)
            raise UnavailableError(f"the router cannot read the model's tokenizer: {error.message}") from error
        finally:
            del self._loading[key]
        self._loaded[key] = text
        _log.info("model text loaded", folder=folder, vocab_size=text.tokenizer.vocab_size)
        return text

    async def off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def run(self, work: Callable[[], T], size_chars: int) -> T:
        """`work` here, or in a thread when it chews on a long text."""
        return work() if size_chars < OFF_LOOP_CHARS else await self.off_loop(work)
