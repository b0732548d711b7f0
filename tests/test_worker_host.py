"""Keeping an engine running: health, deaths, restarts, and what cannot be started."""

from __future__ import annotations

from collections.abc import Callable

from rpc_support import eventually
from worker_support import ManualClock, ScriptedEngine, engine_load, engine_ready

from common.config import EngineConfig, WorkerConfig
from common.engine.messages import EngineFatal, EngineLoad, EngineProgress, EngineReady, FromEngine, PeerTraffic
from common.telemetry import Metrics
from common.types import Failure, WorkerLoad
from services.worker.app import _Gauges
from services.worker.host import START_LIMIT_S, EngineHost, HostState


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
    assert made.health() == (True, "loading weights: 1 of 2")
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


def test_peers_of_the_past_leave_the_metrics() -> None:
    metrics = Metrics(with_process=False)
    gauges = _Gauges(metrics)
    for peer in range(1, 50):
        gauges.apply(EngineLoad(WorkerLoad(), (PeerTraffic(peer, "ucx/cma", 10, 1, 0),)))
    shown = metrics.render().decode()
    assert shown.count("kv_transfer_peer_bytes{") == 1
    assert 'peer="49"' in shown
