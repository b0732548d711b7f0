"""Keeping an engine running: health, deaths, restarts, and what cannot be started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from rpc_support import eventually
from worker_support import ManualClock, ScriptedEngine, engine_load, engine_ready

from common.config import EngineConfig, WorkerConfig
from common.engine.messages import EngineFatal, EngineLoad, EngineProgress, EngineReady, FromEngine, PeerTraffic
from common.telemetry import Metrics
from common.types import Failure, WorkerLoad
from services.worker import host as host_module
from services.worker.app import _Gauges
from services.worker.host import PROGRESS_LIMIT_S, START_LIMIT_S, EngineHost, HostState


class Owner:
    def __init__(self) -> None:
        self.lost: list[str] = []

    def on_engine(self, message: FromEngine) -> None: ...

    def on_engine_ready(self, ready: EngineReady) -> None: ...

    def on_engine_lost(self, reason: str) -> None:
        self.lost.append(reason)


class Refusing(ScriptedEngine):
    """No process can be made: out of memory, or of pids."""

    async def start(self, on_message: Callable[[FromEngine], None], on_death: Callable[[str], None]) -> None:
        raise OSError("Cannot allocate memory")


def host(*engines: ScriptedEngine, max_restarts: int = 5) -> tuple[EngineHost, Owner, ManualClock]:
    clock, left = ManualClock(), list(engines)
    config = WorkerConfig(engine=EngineConfig(model="tiny", max_restarts=max_restarts))
    return EngineHost(config, lambda: left.pop(0), clock), Owner(), clock


async def test_healthy_is_what_makes_progress() -> None:
    engine = ScriptedEngine(None)
    made, owner, clock = host(engine)
    await made.start(owner)
    clock.advance(START_LIMIT_S - 1)
    engine.say(EngineProgress("loading weights", 1, 2))
    clock.advance(START_LIMIT_S - 1)
    assert made.health() == (True, "loading weights: 50 %")
    clock.advance(2)
    assert made.health()[0] is False
    engine.say(engine_ready())
    assert made.health() == (True, "ready")
    clock.advance(5.5)
    assert made.health()[0] is False
    engine.say(engine_load())
    assert made.health()[0] is True


async def test_an_engine_that_cannot_be_started_again_is_tried_until_the_worker_gives_up() -> None:
    first = ScriptedEngine(engine_ready())
    made, owner, _ = host(first, Refusing(None), Refusing(None), max_restarts=2)
    await made.start(owner)
    epoch = made.epoch
    first.die("SIGKILL")
    assert made.state is HostState.STARTING
    await eventually(lambda: made.state is HostState.FAILED)
    assert owner.lost[0] == "SIGKILL"
    assert "Cannot allocate memory" in made.reason
    assert made.epoch != epoch
    assert made.health()[0] is False


async def test_an_engine_that_says_why_it_cannot_start_is_not_started_again() -> None:
    engine = ScriptedEngine(None)
    made, owner, _ = host(engine)
    await made.start(owner)
    engine.say(EngineFatal(Failure("config", "no such folder")))
    engine.die("exit code 1")
    assert (made.state, made.reason, made.restarts) == (HostState.FAILED, "no such folder", 0)
    assert made.failed.is_set()
    assert made.failure == Failure("config", "no such folder")


def test_peers_of_the_past_leave_the_metrics() -> None:
    metrics = Metrics(with_process=False)
    gauges = _Gauges(metrics)
    for peer in range(1, 50):
        gauges.apply(EngineLoad(WorkerLoad(), (PeerTraffic(peer, "ucx/cma", 10, 1, 0),)))
    shown = metrics.render().decode()
    assert shown.count("kv_transfer_peer_bytes{") == 1
    assert 'peer="49"' in shown


async def test_a_silent_engine_is_not_chosen_until_it_speaks() -> None:
    engine = ScriptedEngine(engine_ready())
    made, owner, clock = host(engine)
    changes: list[bool] = []
    await made.start(owner)
    made.on_change = lambda: changes.append(made.serving)
    clock.advance(PROGRESS_LIMIT_S - 0.5)
    assert made.look() == 0.5
    assert made.serving
    clock.advance(0.5)
    assert made.look() == PROGRESS_LIMIT_S  # it may speak and fall silent again meanwhile
    assert not made.serving
    engine.say(EngineProgress("step", 0, 0))
    assert (made.serving, made.state, made.reason) == (True, HostState.READY, "ready")
    assert changes == [False, True]
    assert owner.lost == []


async def test_a_hung_engine_is_killed_and_started_again() -> None:
    first = ScriptedEngine(engine_ready())
    made, owner, clock = host(first, ScriptedEngine(engine_ready()))
    await made.start(owner)
    for _ in range(20):  # one step that is long, layer by layer
        clock.advance(30)
        made.look()
        first.say(EngineProgress("step", 0, 0))
    assert made.restarts == 0
    epoch = made.epoch
    clock.advance(EngineConfig().hang_timeout_s)
    made.look()
    assert owner.lost == ["the engine made no progress for 60 s and was killed"]
    await eventually(lambda: made.serving)
    assert (made.restarts, made.epoch == epoch) == (1, False)
    clock.advance(1)
    assert made.look() == PROGRESS_LIMIT_S - 1  # the new one is not judged by the old one's silence


async def test_a_loop_that_stood_still_takes_nobody_for_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "PROGRESS_LIMIT_S", 0.05)
    made, owner, clock = host(ScriptedEngine(engine_ready()))
    await made.start(owner)
    await asyncio.sleep(0)
    clock.advance(100)  # as after SIGSTOP and SIGCONT to this process
    await asyncio.sleep(0.2)
    assert owner.lost == []
    assert made.serving
    await made.stop(1.0)


async def test_a_start_without_a_word_ends_too() -> None:
    made, owner, clock = host(ScriptedEngine(None), ScriptedEngine(engine_ready()))
    await made.start(owner)
    clock.advance(START_LIMIT_S)
    made.look()
    await eventually(lambda: made.serving)
    assert "no progress for 600 s" in owner.lost[0]


async def test_silence_is_noticed_in_time_after_a_long_start() -> None:
    engine = ScriptedEngine(None)
    made, owner, clock = host(engine)
    await made.start(owner)
    clock.advance(PROGRESS_LIMIT_S + 1)  # importing and loading says nothing for long
    assert made.look() <= PROGRESS_LIMIT_S
    engine.say(engine_ready())
    clock.advance(PROGRESS_LIMIT_S)
    made.look()
    assert not made.serving
    assert owner.lost == []


async def test_a_later_engine_that_cannot_start_is_tried_again() -> None:
    first, second, third = ScriptedEngine(engine_ready()), ScriptedEngine(None), ScriptedEngine(engine_ready())
    made, owner, _ = host(first, second, third)
    await made.start(owner)
    first.die("SIGKILL")
    await eventually(lambda: second.alive)
    second.say(EngineFatal(Failure("internal", "out of memory")))
    assert not made.failed.is_set()
    second.die("exit code 1")
    await eventually(lambda: made.serving)
    assert owner.lost == ["SIGKILL", "out of memory"]
