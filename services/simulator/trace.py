"""Traces: when requests arrive, how long they are, and what they share.

One request a line, as in Mooncake's traces: `{"timestamp": ms, "input_length": tokens, "output_length": tokens,
"hash_ids": [..]}`, where an id stands for `TRACE_BLOCK` tokens and equal ids at the beginning are an equal prefix.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.types.prefix import UNIT, extend_chain

TRACE_BLOCK = 512
_TOKEN_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`at_s` from the trace's start."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


def load_trace(path: Path) -> list[TraceRequest]:
    """In order of time. Raises `ConfigError` that names the line at fault."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            found.append(_request(path, number, line))
    if not found:
        raise ConfigError(f"{path} has no requests", param="trace")
    found.sort(key=lambda request: request.at_s)
    return found


def _request(path: Path, number: int, line: str) -> TraceRequest:
    try:
        row = json.loads(line)
        length, output = int(row["input_length"]), int(row["output_length"])
        hash_ids = tuple(int(i) for i in row["hash_ids"])
        at_s = float(row["timestamp"]) / 1e3
        if not math.isfinite(at_s):
            raise ValueError(f"timestamp {at_s}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}, line {number}: {type(error).__name__} {error}", param="trace") from None
    if length < 1 or output < 1 or len(hash_ids) * TRACE_BLOCK < length:
        raise ConfigError(f"{path}, line {number}: {len(hash_ids)} hash_ids for {length} tokens", param="trace")
    return TraceRequest(at_s, length, output, hash_ids)


@dataclass(frozen=True)
class Mixture:
    """A trace to generate: conversations whose turns grow, and a share of requests with one hot prefix.

    Arrivals are Poisson. `hot_share` of the requests begin with the same `hot_blocks` blocks and end in their own;
    the others are turns of `num_conversations` conversations, each with what was said before as its prefix.
    """

    num_requests: int = 2000
    rate: float = 20.0
    seed: int = 0
    hot_share: float = 0.0
    hot_blocks: int = 4
    num_conversations: int = 200
    turn_blocks: int = 1
    most_blocks: int = 16
    output_tokens: int = 64

    def requests(self) -> list[TraceRequest]:
        rng, ids = random.Random(self.seed), iter(range(1, 1 << 30))
        hot = [next(ids) for _ in range(self.hot_blocks)]
        said: list[list[int]] = [[] for _ in range(self.num_conversations)]
        found, at_s = [], 0.0
        for _ in range(self.num_requests):
            at_s += rng.expovariate(self.rate)
            blocks = [*hot, next(ids)] if rng.random() < self.hot_share else self._turn(said, rng, ids)
            length = len(blocks) * TRACE_BLOCK - rng.randrange(TRACE_BLOCK // 2)
            output = max(int(rng.expovariate(1 / self.output_tokens)), 1)
            found.append(TraceRequest(at_s, length, output, tuple(blocks)))
        return found

    def _turn(self, said: list[list[int]], rng: random.Random, ids: Iterator[int]) -> list[int]:
        """The next turn of some conversation, which begins anew when it is long."""
        number = rng.randrange(len(said))
        if len(said[number]) >= self.most_blocks:
            said[number] = []
        said[number] = [*said[number], *(next(ids) for _ in range(self.turn_blocks))]
        return said[number]


class Tokens:
    """Token ids and prefix hashes of a trace's requests. Blocks are made once for all that begin alike."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._chains: dict[tuple[bytes, int], list[bytes]] = {}

    @staticmethod
    def of(request: TraceRequest) -> tuple[int, ...]:
        ids = [(h * TRACE_BLOCK + j) % _TOKEN_LIMIT for h in request.hash_ids for j in range(TRACE_BLOCK)]
        return tuple(ids[: request.input_tokens])

    def chain(self, request: TraceRequest, token_ids: Sequence[int]) -> list[bytes]:
        """The hashes of all whole units, after the root."""
        chain = [self._root]
        for i, hash_id in enumerate(request.hash_ids[: request.input_tokens // TRACE_BLOCK]):
            key = (chain[-1], hash_id)
            hashes = self._chains.get(key)
            if hashes is None:
                block = [chain[-1]]
                extend_chain(block, token_ids[i * TRACE_BLOCK : (i + 1) * TRACE_BLOCK])
                hashes = self._chains[key] = block[1:]
            chain += hashes
        extend_chain(chain, token_ids)
        return chain


def best_hit_rate(requests: Sequence[TraceRequest]) -> float:
    """Of one cache that forgets nothing: the share of prompt tokens that some request before has had."""
    seen: dict[int, int] = {}  # a prefix that ends in some block -> the most tokens of that block that anybody had
    hits = total = 0
    for request in requests:
        total += request.input_tokens
        key, found, known = 0, 0, True
        for i, hash_id in enumerate(request.hash_ids):
            key = hash((key, hash_id))
            own, had = min(request.input_tokens - i * TRACE_BLOCK, TRACE_BLOCK), seen.get(key, 0)
            if known:
                found += min(own, had)
                known = had == TRACE_BLOCK
            seen[key] = max(own, had)
        hits += min(found, request.input_tokens - 1) // UNIT * UNIT
    return hits / max(total, 1)
