"""A cluster of separate processes under a mixed load for minutes: nothing is wrong, stuck, left over or growing.

    round: load of every kind for a while, in the second test with somebody killed meanwhile -> 200 streams cut at
           once -> quiet: within two seconds each KV ledger has nothing but free and cached blocks

NANODEPLOY_SOAK_S is the time of both tests together (600), NANODEPLOY_SOAK_SEED draws another load and other faults.
A run of at least 600 s writes benchmarks/results/soak-<date>-<test>.{json,md,png}, a shorter one into pytest's folder.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import soak_report
import tiny_models
from cluster_support import RunningCluster, fetch_ledgers, run_cluster
from soak_book import Book, bad_questions, write_book
from soak_client import Asker, Outcome, Tally, flood
from soak_faults import Fault, Targets, kill, schedule
from soak_watch import Watch, explained, read_logs

from benchmarks import report
from common.errors import NanoDeployError

pytestmark = pytest.mark.soak

FULL_S = 600.0
SECONDS = float(os.environ.get("NANODEPLOY_SOAK_S", FULL_S))
SEED = int(os.environ.get("NANODEPLOY_SOAK_SEED", "1"))
CLIENTS = 12
FLOOD = 200
QUIET_S = 2.0
SETTLED_S = 6.0  # longer than leases and detached requests live, below
LEASE_S = 4.0
SEGMENTS = Path("/dev/shm")  # a killed process leaves none of its shared memory
WORKERS = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
WORKER: dict[str, Any] = {"reattach_s": LEASE_S, "drain_grace_s": 5.0}
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,  # a long prompt is several chunks
    "kv_cache_memory_bytes": 1 << 20,  # too little for all that come: some are preempted
    "num_threads": 1,
    "lease_ttl_s": LEASE_S,
    "max_restarts": 100,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_llama(tmp_path_factory.mktemp("model"), seed=SEED)


@pytest.fixture(scope="module")
def book(folder: Path) -> Book:
    return write_book(folder, SEED)


@dataclass
class Soak:
    """One test's run: what was asked, who was killed, how long it took to be quiet."""

    cluster: RunningCluster
    book: Book
    watch: Watch
    tally: Tally = field(default_factory=Tally)
    faults: list[Fault] = field(default_factory=list)
    quiet_s: list[float] = field(default_factory=list)
    floods: int = 0
    load_s: float = 0.0
    broken: str = ""  # what ended it early

    async def round(self, number: int, load_s: float, targets: Targets = ()) -> None:
        """Load for at least `load_s`; with `targets`, until the cluster has settled after their death."""
        url, model = self.cluster.url, self.cluster.model
        asker, rng = Asker(url, model, self.book, self.tally), random.Random(f"{SEED}/{number}")
        bad, ending = bad_questions(model), asyncio.Event()
        began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for client in range(CLIENTS):
                    group.create_task(_ask_on(asker, random.Random(f"{SEED}/{number}/{client}"), bad, ending))
                try:
                    await asyncio.sleep(rng.uniform(0.2, 0.5) * load_s)
                    if targets:
                        self.faults.append(await kill(self.cluster, targets))
                        await asyncio.sleep(SETTLED_S)
                    await asyncio.sleep(max(0.0, began + load_s - time.monotonic()))
                finally:
                    ending.set()
            self.load_s += time.monotonic() - began
            self.floods += await flood(url, model, FLOOD, rng)
        finally:
            await asker.close()
        await self._until_quiet(number)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(self.watch.look_quiet)

    async def _until_quiet(self, number: int) -> None:
        began = time.monotonic()
        while not await self._is_quiet():
            assert time.monotonic() - began < QUIET_S, f"not quiet within {QUIET_S} s in round {number}"
            await asyncio.sleep(0.05)
        self.quiet_s.append(time.monotonic() - began)

    async def _is_quiet(self) -> bool:
        """Every worker answers, and each of its blocks is free or cached."""
        try:
            ledgers = await fetch_ledgers(self.cluster.state.controller)
        except NanoDeployError:
            return False
        for group in (group for ledger in ledgers for group in ledger.groups):
            assert group.free + group.cached + group.live + group.leased + group.in_flight == group.total, group
            if group.free + group.cached != group.total:
                return False
        return len(ledgers) == len(WORKERS)

    # -- verdict -------------------------------------------------------------------------------------

    def problems(self, logs: Path) -> list[str]:
        """All that must not have been."""
        found = [self.broken] if self.broken else []
        found += [f"{o.kind}: {o.result} {o.detail}" for o in self.tally.outcomes if o.result in ("wrong", "stuck")]
        found += [f"{o.kind}: {o.result}, unexplained: {o.detail}" for o in self.tally.outcomes if self._is_odd(o)]
        windows = [fault.window for fault in self.faults]
        lines, _ = read_logs(logs)
        found += [f"log of {line.service}: {line.text}" for line in lines if not explained(line.at, windows)]
        killed = Counter(target for fault in self.faults for target in fault.targets)
        killed.update({f"{worker}/engine": killed[worker] for worker in WORKERS})
        found += [f"{name} died by itself {times} times" for name, times in (self.watch.deaths() - killed).items()]
        return found + [fault for growth in self.watch.growths() for fault in growth.faults]

    def _is_odd(self, outcome: Outcome) -> bool:
        """An error that no fault explains; a lost connection only the router's death does."""
        if outcome.result not in ("error", "lost"):
            return False
        near = [f for f in self.faults if outcome.began <= f.window[1] and outcome.ended >= f.window[0]]
        return not any("router" in f.targets or (f.visible and outcome.result == "error") for f in near)

    def result(self, environment: dict[str, object], logs: Path) -> dict[str, Any]:
        outcomes = self.tally.outcomes
        return {
            "environment": environment,
            "seed": SEED,
            "load_s": round(self.load_s),
            "requests_per_s": round(len(outcomes) / max(self.load_s, 1.0), 1),
            "longest_request_s": round(max((o.ended - o.began for o in outcomes), default=0.0), 2),
            "flooding_streams_that_had_spoken": self.floods,
            "slowest_quiet_s": round(max(self.quiet_s, default=0.0), 2),
            **{name: self.tally.totals[name] for name in sorted(self.tally.totals)},
            "fallbacks": dict(self.tally.fallbacks),
            "requests": soak_report.by_kind(outcomes),
            "faults": soak_report.fault_rows(self.faults, outcomes),
            "processes": soak_report.growth_rows(self.watch.growths()),
            "warnings": dict(read_logs(logs)[1]),
        }


async def _ask_on(asker: Asker, rng: random.Random, bad: Any, ending: asyncio.Event) -> None:
    while not ending.is_set():
        outcome = await asker.ask(rng, bad)
        if outcome.result in ("error", "lost"):
            await asyncio.sleep(0.2)  # as a client that tries again would


@contextmanager
def _soaking(name: str, tmp: Path, folder: Path, book: Book) -> Iterator[Soak]:
    """A soak to drive; afterwards its table is written, and nothing may have been amiss."""
    environment = report.environment("torch", "grpcio", "libucx-cu13", model="3 layers, random, float32")
    flags = ("--prefill", "2", "--decode", "2")
    segments = set(SEGMENTS.glob("ucx_*"))
    with run_cluster(tmp, folder, *flags, worker=WORKER, **ENGINE) as cluster:
        with Watch(cluster) as watch:
            soak = Soak(cluster, book, watch)
            try:
                yield soak
            except (AssertionError, TimeoutError, OSError, ExceptionGroup) as error:
                soak.broken = "".join(traceback.format_exception(error))
        logs = tmp / "state" / "default" / "logs"
        target = report.RESULTS if SECONDS >= FULL_S else tmp
        path = target / f"soak-{datetime.now(UTC):%Y-%m-%d}-{name}"
        title = f"Soak, {name}: {soak.load_s:.0f} s of load in {len(soak.quiet_s)} rounds"
        soak_report.write(path, title, soak.result(environment, logs), watch.lives)
        print(path.with_suffix(".md").read_text())
        problems = soak.problems(logs)
    problems += [f"left in {SEGMENTS}: {path.name}" for path in set(SEGMENTS.glob("ucx_*")) - segments]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:40])


async def test_soak_of_a_mixed_load_leaves_nothing_and_grows_nothing(tmp_path: Path, folder: Path, book: Book) -> None:
    ends = time.monotonic() + SECONDS / 2
    with _soaking("load", tmp_path, folder, book) as soak:
        number = 0
        while time.monotonic() < ends:
            await soak.round(number, max(4.0, SECONDS / 50))
            number += 1
    assert all(soak.tally.totals[name] > 0 for name in ("transferred_tokens", "cached_tokens", "preemptions"))


async def test_soak_with_processes_killed_answers_right_or_says_so(tmp_path: Path, folder: Path, book: Book) -> None:
    ends = time.monotonic() + SECONDS / 2
    with _soaking("faults", tmp_path, folder, book) as soak:
        for number, killed in enumerate(schedule(random.Random(SEED), WORKERS, 1000)):
            if time.monotonic() > ends:
                break
            await soak.round(number, 10.0, killed)
        await soak.round(len(soak.faults), 5.0)
