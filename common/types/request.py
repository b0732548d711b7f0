"""Requests, sampling parameters and results, as plain data shared by router, workers and engine."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from common.errors import InvalidRequestError
from common.types.grammar import Grammar


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Meanings and ranges are those of the OpenAI API and of vLLM's extensions.

    `seed` None means one is drawn where the request enters (router, `LLM`); engines always get one.
    `stop` strings are matched where text is made (router, `LLM`), never in an engine.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{field} must be {rule}, got {getattr(self, field)!r}", param=field)

        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (all tokens) or a positive number below 2**31")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(0.0 < self.repetition_penalty <= 2.0, "repetition_penalty", "in (0, 2]")
        check(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        check(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "between 0 and 20")
        check(1 <= self.n <= 128, "n", "between 1 and 128")
        check(len(self.stop) <= 16 and all(self.stop), "stop", "at most 16 non-empty strings")
        check(all(-100.0 <= v <= 100.0 for _, v in self.logit_bias), "logit_bias", "between -100 and 100")


class EmbeddingHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Rows [num_tokens, hidden_size] on an encoder worker that replace placeholder tokens' embeddings.

    `hidden_size`: elements of a row, deepstack features included. `grid`: rows by time, height and width.
    `media_hash` names the data and how it was prepared, so the grid as well.
    """

    owner_id: str
    owner_epoch: int
    owner_address: str
    lease_id: int
    media_hash: bytes
    position: int
    num_tokens: int
    grid: tuple[int, int, int]
    hidden_size: int
    dtype: str
    descriptor: bytes
    digest: int
    transport: str
    remaining_ms: int


class Pooling(msgspec.Struct, frozen=True):
    """The vector of a prompt is wanted instead of tokens. `dimensions`: its first elements; 0 for all of them."""

    dimensions: int = 0


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, complete: any decode worker can run or continue it from this alone.

    `sent[c]` holds the output tokens of choice c that the client has already (resume); missing is empty.
    `ended_choices` are complete already and not run again.
    `deadline_s` is on the local monotonic clock, 0 for none. With `pooling` no token is drawn: the request ends with
    one row that carries the vector, and `sampling` says nothing.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter_id: str = ""
    cache_salt: str = ""
    sent: tuple[tuple[int, ...], ...] = ()
    ended_choices: tuple[int, ...] = ()
    embeddings: tuple[EmbeddingHandle, ...] = ()
    priority: int = 0
    deadline_s: float = 0.0
    traceparent: str = ""
    pooling: Pooling | None = None


class RequestStats(msgspec.Struct, frozen=True, kw_only=True):
    """Where time and prompt tokens went; cached + computed + transferred = prompt tokens.

    `prefill_queue_ms` and `prefill_compute_ms` are parts of `prefill_ms` on a prefill worker, by its own word.
    `drafts` are steps that verified `draft_tokens` in all, of which `accepted_draft_tokens` were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    transferred_tokens: int = 0
    remote_cached_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    prefill_queue_ms: float = 0.0
    prefill_compute_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_bytes: int = 0
    transfer_gbps: float = 0.0
    decode_queue_ms: float = 0.0
    first_token_ms: float = 0.0
    preemptions: int = 0
    prefill_worker: str = ""
    fallback: str = ""
    transport: str = ""
    drafts: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Logprobs of a run of tokens. `top_ids`/`top_logprobs` are flat [num_tokens, top_n], best first."""

    token_logprobs: tuple[float, ...]
    top_n: int = 0
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[TokenLogprobs]) -> TokenLogprobs:
        """The runs one after the other; at least one, all with the same `top_n`."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            tuple(v for p in parts for v in p.token_logprobs),
            parts[0].top_n,
            tuple(v for p in parts for v in p.top_ids),
            tuple(v for p in parts for v in p.top_logprobs),
        )

    def part(self, start: int, end: int) -> TokenLogprobs:
        """Those of tokens [start, end)."""
        n = self.top_n
        return TokenLogprobs(
            self.token_logprobs[start:end], n, self.top_ids[start * n : end * n], self.top_logprobs[start * n : end * n]
        )

    def best(self, top_n: int) -> TokenLogprobs:
        """With at most `top_n` alternatives of each."""
        n = self.top_n
        if top_n >= n:
            return self
        kept = [start + i for start in range(0, len(self.top_ids), n) for i in range(top_n)]
        ids, logprobs = tuple(self.top_ids[i] for i in kept), tuple(self.top_logprobs[i] for i in kept)
        return TokenLogprobs(self.token_logprobs, top_n, ids, logprobs)


class ChoiceDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Tokens that one step added to one choice. `position` is the output index of the first.

    `vector`: what a request for one ends with, float32, little-endian; it takes an output position, as a token does.
    """

    choice: int
    position: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token that ended it; it is the last of token_ids
    logprobs: TokenLogprobs | None = None
    vector: bytes = b""
