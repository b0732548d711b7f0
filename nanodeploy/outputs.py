"""What offline calls take and give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.errors import NanoDeployError
from common.types import RequestStats, TokenLogprobs


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


Plain = str | Sequence[int] | MediaPrompt
Prompt = Plain | Mapping[str, Any]
"""A dict has `prompt` or `prompt_token_ids`, as vLLM's have."""
Progress = Callable[[int, int], None]


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
class Embedding:
    """A prompt's vector."""

    embedding: list[float] = field(default_factory=list)


@dataclass
class EmbeddingRequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: Embedding
    stats: RequestStats = field(default_factory=RequestStats)
    error: NanoDeployError | None = None  # why it failed, where errors were kept
