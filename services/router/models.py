"""The text side of each served model: tokenizer, chat template, the checkpoint's sampling defaults.

    unknown -> LOADING (in a thread, once; whoever needs it waits) -> LOADED | failed (tried again on next use)

Where the files are: the router's own `model_path`, else the folder that the workers report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from common.config.schema import RouterConfig
from common.errors import ConfigError, UnavailableError, UnsupportedError
from common.telemetry import get_logger
from common.text import ChatTemplate, Tokenizer
from common.types import ModelInfo

T = TypeVar("T")

OFF_LOOP_CHARS: Final = 4096  # shorter texts are encoded on the loop: less than a millisecond
_SAMPLING_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_log = get_logger(__name__)


@dataclass(frozen=True)
class ModelText:
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: dict[str, Any]
    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None

    def require_template(self) -> ChatTemplate:
        if self.template is None:
            raise UnsupportedError("this model has no chat template: use /v1/completions", param="messages")
        return self.template


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """What generation_config.json says about sampling, where it says something."""
    found = {name: generation_config[name] for name in _SAMPLING_DEFAULTS if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def load_model_text(folder: Path, template_file: str = "", *, fast: bool = True) -> ModelText:
    """Raises `ConfigError` naming the file at fault. `fast`: see `Tokenizer.load`."""
    tokenizer = Tokenizer.load(folder, fast=fast)
    if template_file:
        try:
            source = Path(template_file).read_text()
        except OSError as error:
            raise ConfigError(f"chat template {template_file}: {error}", param="chat_template") from error
        template = ChatTemplate(source, special_tokens=tokenizer.special_tokens, name=template_file)
        return ModelText(tokenizer, template, sampling_defaults(tokenizer.generation_config))
    return ModelText(tokenizer, tokenizer.chat_template, sampling_defaults(tokenizer.generation_config))


class ModelTexts:
    """Owns the loaded texts and the threads that load and encode."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._loaded: dict[tuple[str, bytes], ModelText] = {}
        self._loading: dict[tuple[str, bytes], asyncio.Task[ModelText]] = {}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get(self, model: ModelInfo) -> ModelText:
        """Raises `UnavailableError` while the files cannot be read."""
        folder = self._config.model_path or model.path
        key = (folder, model.model_hash)
        loaded = self._loaded.get(key)
        if loaded is not None:
            return loaded
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(key))
        return await asyncio.shield(task)

    async def _load(self, key: tuple[str, bytes]) -> ModelText:
        folder = key[0]
        try:
            fast = self._config.tokenizer_backend == "auto"
            text = await self.off_loop(lambda: load_model_text(Path(folder), self._config.chat_template, fast=fast))
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
