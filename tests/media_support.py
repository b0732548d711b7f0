"""Prompts with images: how they are asked and what has to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_support import Answer, Solo, greedy
from tiny_models import make_qwen3_vl
from vision_support import Illustrated, Layout, oracle_tokens

from common.engine.media_local import LocalMedia
from common.types import EmbeddingHandle

COUNT = 12
ONE: Layout = (21, (1, 10, 8), 14)
THREE: Layout = (0, (1, 8, 4), 3, (1, 2, 10), 40, (1, 4, 4), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("qwen3-vl"), seed=3)


def handles(source: LocalMedia, prompt: Illustrated) -> tuple[EmbeddingHandle, ...]:
    return tuple(source.put(p.position, p.rows_NW, p.grid) for p in prompt.pictures)


def ask(engine: Solo, source: LocalMedia, prompt: Illustrated, **more: Any) -> Answer:
    params = more.pop("params", greedy(COUNT))
    return engine.submit(prompt.tokens, params, embeddings=handles(source, prompt), **more)


def settle(engine: Solo, folder: Path, prompt: Illustrated, answer: Answer) -> None:
    engine.run(answer)
    assert answer.failure is None
    assert answer.tokens[0] == oracle_tokens(folder, prompt, COUNT)
