"""NanoDeploy from Python: `from nanodeploy import LLM, SamplingParams`.

Loaded on first use: importing `nanodeploy.v1` (the generated contracts) must cost neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.types import Grammar as Grammar
    from common.types import GrammarKind as GrammarKind
    from common.types import SamplingParams as SamplingParams
    from nanodeploy.llm import LLM as LLM
    from nanodeploy.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from nanodeploy.outputs import MediaPrompt as MediaPrompt
    from nanodeploy.outputs import MediaRows as MediaRows
    from nanodeploy.outputs import RequestOutput as RequestOutput

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "EmbeddingRequestOutput",
    "Grammar",
    "GrammarKind",
    "MediaPrompt",
    "MediaRows",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOME = {
    "EmbeddingRequestOutput": "nanodeploy.outputs",
    "Grammar": "common.types",
    "GrammarKind": "common.types",
    "LLM": "nanodeploy.llm",
    "MediaPrompt": "nanodeploy.outputs",
    "MediaRows": "nanodeploy.outputs",
    "RequestOutput": "nanodeploy.outputs",
    "SamplingParams": "common.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
