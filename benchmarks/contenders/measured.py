"""The parent's side: contenders that take turns on the same prompts.

    start (loads, warms up) -> run* -> stop;   one that cannot start says why and is left out

An offline contender is a child process behind a pipe; a served one is a whole cluster and the load of
`nanodeploy bench`. Between their turns all of them wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from benchmarks import cluster
from benchmarks.report import Load
from services.cli.bench.client import BenchClient
from services.cli.bench.load import LoadOptions, run_load
from services.cli.bench.stats import summarise
from services.cli.process import tail

START_LIMIT_S = 240.0
RUN_LIMIT_S = 600.0


@dataclass(frozen=True)
class Work:
    """Every prompt gets `max_tokens` tokens, `concurrency` prompts at a time."""

    prompts: list[list[int]]
    max_tokens: int
    concurrency: int

    @property
    def num_tokens(self) -> int:
        return len(self.prompts) * self.max_tokens

    @classmethod
    def draw(
        cls, seed: str, token_ids: Sequence[int], lengths: tuple[int, int], max_tokens: int, concurrency: int
    ) -> Work:
        """Prompts of random tokens, at least two; their lengths are spread evenly over `lengths` for every seed."""
        low, high = lengths
        count = max(2, concurrency)
        random = Random(seed)
        sizes = [low + (high - low) * i // (count - 1) for i in range(count)]
        random.shuffle(sizes)
        return cls([random.choices(token_ids, k=size) for size in sizes], max_tokens, concurrency)


@dataclass(frozen=True)
class Measurement:
    """One run. `cpu_s` is the contender's own; `others` the share of the machine that was busy otherwise."""

    seconds: float
    tokens_per_s: float
    cpu_s: float
    others: float
    token_ids: list[list[int]] | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    name: str

    def start(self) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Running inside; what is to be said about it. Raises RuntimeError when it cannot run here."""

    def run(self, work: Work) -> Measurement: ...


class Offline:
    """A script beside this file that talks as `child.serve` does."""

    def __init__(self, name: str, python: str | Path, script: str, arguments: Sequence[str], threads: int) -> None:
        self.name = name
        self._command = [str(python), str(Path(__file__).parent / script), *arguments]
        self._threads = str(threads)
        self._process: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def start(self) -> Iterator[dict[str, Any]]:
        environ = os.environ | {"OMP_NUM_THREADS": self._threads, "MKL_NUM_THREADS": self._threads}
        with tempfile.NamedTemporaryFile(prefix="nanodeploy-bench-") as errors:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=errors, env=environ, text=True
            )
            try:
                ready = self._receive(START_LIMIT_S)
                if "about" not in ready:
                    raise RuntimeError(ready.get("error") or tail(Path(errors.name)) or "it ended without a word")
                yield ready["about"]
            finally:
                self._process.kill()
                self._process.communicate()

    def run(self, work: Work) -> Measurement:
        assert self._process is not None
        assert self._process.stdin is not None
        asked = {"prompts": work.prompts, "max_tokens": work.max_tokens, "concurrency": work.concurrency}
        load = Load()
        with contextlib.suppress(BrokenPipeError):  # it ended: the answer is missing, too
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        got = self._receive(RUN_LIMIT_S)
        if "seconds" not in got:
            raise RuntimeError(f"{self.name} ended in mid-run")
        others = load.others(got["cpu_s"])
        rows: list[list[int]] = got["token_ids"]
        if [len(row) for row in rows] != [work.max_tokens] * len(work.prompts):
            raise RuntimeError(f"{self.name} gave {sum(map(len, rows))} tokens, not {work.num_tokens}")
        return Measurement(got["seconds"], work.num_tokens / got["seconds"], got["cpu_s"], others, rows)

    def _receive(self, limit_s: float) -> dict[str, Any]:
        """The next line of the child; it is killed when it says nothing for so long."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        watchdog = threading.Timer(limit_s, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            return {}
        message: dict[str, Any] = json.loads(line)
        return message


class Served:
    """A cluster with so many prefill workers, asked over HTTP with streams by a closed loop of clients."""

    def __init__(self, name: str, num_prefill: int, flags: Sequence[str]) -> None:
        self.name = name
        self._flags = ["--prefill", str(num_prefill), *flags]
        self._cluster: cluster.Cluster | None = None

    @contextlib.contextmanager
    def start(self) -> Iterator[dict[str, Any]]:
        with cluster.running(self._flags, limit_s=START_LIMIT_S) as running:
            self._cluster = running
            self.run(Work([[5] * 64, [7] * 80], 8, 2))
            flags = [Path(word).name if word.startswith("/") else word for word in self._flags]
            yield {"processes": len(running.processes()), "flags": " ".join(flags)}

    def run(self, work: Work) -> Measurement:
        assert self._cluster is not None
        options = LoadOptions(
            model=self._cluster.state.model,
            num_prompts=len(work.prompts),
            concurrency=work.concurrency,
            request_rate=0.0,
            input_len=0,
            output_len=work.max_tokens,
        )
        bodies = [
            {
                "model": options.model,
                "prompt": prompt,
                "max_tokens": work.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for prompt in work.prompts
        ]
        load, cpu, own = Load(), self._cluster.cpu_s(), time.process_time()
        result = asyncio.run(_send(self._cluster.url, options, bodies))
        cpu_s = self._cluster.cpu_s() - cpu + time.process_time() - own
        if result["failed"] or result["completion_tokens"] != work.num_tokens:
            raise RuntimeError(f"{self.name}: {result['completion_tokens']} tokens came; {result['errors']}")
        more = {key: result[key] for key in ("ttft_ms", "tpot_ms", "gap_ms", "cached_tokens")}
        return Measurement(result["duration_s"], result["output_tokens_per_s"], cpu_s, load.others(cpu_s), more=more)


async def _send(url: str, options: LoadOptions, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    client = BenchClient(url)
    try:
        samples, seconds = await run_load(client, options, bodies, lambda: None)
    finally:
        client.close()
    return summarise(samples, seconds)
