"""`nanodeploy calibrate-kv`: the scales of an 8-bit KV cache from a text that the model reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError
from services.cli.calibration_text import TEXT
from services.cli.up import resolve_model

PIECE = 512  # tokens read at once: positions beyond them are other turns of the same keys


def run_calibrate(
    model: str, text: str, output: str, max_tokens: int, engine: Mapping[str, Any], console: Console
) -> int:
    """Read file `text` (ours when empty) with `model` (the demo model when empty) and write the scales to `output`.

    Returns the exit code. Raises `ConfigError`, `OSError`.
    """
    folder = resolve_model(model, console)
    content = Path(text).read_text(encoding="utf-8") if text else TEXT
    from nanodeploy import LLM

    with LLM(folder, **engine) as llm:
        if llm.tokenizer is None:
            raise ConfigError(f"{folder} has no tokenizer.json: it cannot read a text", param="model")
        ids = llm.tokenizer.encode(content)[:max_tokens]
        if not ids:
            raise ConfigError(f"{text} has no text", param="text")
        size = min(PIECE, llm.max_model_len - 1)
        pieces = [ids[first : first + size] for first in range(0, len(ids), size)]
        digest = hashlib.sha256(content.encode()).hexdigest()
        target = llm.calibrate_kv(pieces, output, text=(text and Path(text).name) or "built-in", text_sha256=digest)
    console.print(f"{target}: scales of {len(ids)} tokens", highlight=False, soft_wrap=True)
    return 0
