"""The engine process: `python -m common.engine.process FD PARENT_PID`, started by `ProcessEngine` only.

    Setup -> build (EngineProgress ...) -> EngineReady -> loop until Shutdown, end of the socket, or a fatal error

One thread runs everything; the transport has threads of its own that never hold the GIL. When there is
nothing to do the loop sleeps in poll() on the socket and on the transport's descriptor. While the parent reads
nothing and the channel is congested, messages are still taken, but no step is made.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from functools import partial

import msgspec

from common.config import LogConfig, WorkerConfig
from common.engine.build import BuiltEngine, build_engine
from common.engine.channel import EngineChannel
from common.engine.engine import IDLE_WAIT_S, sleep_until
from common.engine.messages import EngineFatal, EngineProgress, Setup, Shutdown, ToEngine
from common.engine.rank import Fleet
from common.errors import NanoDeployError, RankLostError
from common.kernels.late import late_kernels
from common.parallel.lifeline import die_with_parent
from common.telemetry import configure_logging, get_logger
from common.types import Clock, Failure, MonotonicClock, Role

log = get_logger(__name__)

BEAT_S = 1.0
LISTEN_S = 1e-4
SWITCH_S = 2e-4  # a thread beside the loop gives the interpreter back this soon: the device waits for the loop
LEAVE_S = 5.0


def main() -> int:
    """Serve one parent; the exit code is 0 for a shutdown, 1 for a failure that was reported."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    channel = EngineChannel(socket.socket(fileno=fd), msgspec.msgpack.Decoder(ToEngine))
    messages: list[ToEngine] = []
    while not messages and not channel.closed:
        messages = channel.wait(60.0)
    if channel.closed:
        return 0
    setup = messages.pop(0)
    assert isinstance(setup, Setup)
    sys.setswitchinterval(SWITCH_S)
    configure_logging(LogConfig.model_validate_json(setup.log_json), f"{setup.role}-engine")
    try:
        built = _build(setup, channel)
    except NanoDeployError as error:
        channel.send([EngineFatal(Failure.of(error))])
        return 1
    except Exception as error:
        log.exception("engine start failed")
        channel.send([EngineFatal(Failure("internal", f"{type(error).__name__}: {error}"))])
        return 1
    try:
        return serve(built, channel, messages)
    except RankLostError as error:
        channel.send([EngineFatal(Failure.of(error))])
        return 1
    finally:
        built.close()


def _build(setup: Setup, channel: EngineChannel) -> BuiltEngine:
    config = WorkerConfig.model_validate_json(setup.worker_json)

    def progress(stage: str, done: int, total: int) -> None:
        channel.send([EngineProgress(stage, done, total)])

    built = build_engine(config, Role(setup.role), MonotonicClock(), progress)
    for fd in built.wakeup_fds:
        channel.watch(fd)
    gc.collect()
    gc.freeze()  # a full collection that looks through model and libraries would hold a step up for 0.1 s
    if built.fleet is not None:
        built.fleet.ranks.on_lost = partial(_abort, built.fleet)
    channel.send([built.ready])
    late_kernels.watch()
    built.parts.runner.on_progress = _Beat(channel, built.clock)
    return built


def _abort(fleet: Fleet) -> None:
    """Whoever noticed that a rank is lost goes on: the loop says why it ends, if it can."""
    threading.Thread(target=_leave, name="leave", daemon=True).start()
    fleet.abort()


def _leave() -> None:
    """A step on a GPU may wait for a lost rank for ever, and the loop for the step."""
    time.sleep(LEAVE_S)
    log.error("a step waits for a lost rank")
    os._exit(1)


class _Beat:
    """Called all along a step: tells the parent now and then that it is under way."""

    def __init__(self, channel: EngineChannel, clock: Clock) -> None:
        self._channel = channel
        self._clock = clock
        self._next = 0.0

    def __call__(self) -> None:
        now = self._clock.now()
        if now >= self._next:
            self._next = now + BEAT_S
            self._channel.send([EngineProgress("step", 0, 0)])


def serve(built: BuiltEngine, channel: EngineChannel, messages: list[ToEngine]) -> int:
    """Run the engine until Shutdown or the channel's end; `messages` came before. Returns the exit code."""
    engine, clock = built.engine, built.clock
    stopping = False

    def handle(some: list[ToEngine]) -> None:
        nonlocal stopping
        for message in some:
            if isinstance(message, Shutdown):
                stopping = True
            elif not stopping:
                engine.handle(message)

    def send() -> None:
        if sent := engine.drain():
            channel.send(sent)

    def listen() -> None:
        """While the device computes: messages are handled and answered, and read ones leave at once."""
        arrived = [] if channel.congested or channel.closed else channel.wait(0.0)
        handle(arrived)
        built.check()
        send()
        if not arrived:
            time.sleep(LISTEN_S)

    engine.while_waiting, engine.on_awaited = listen, send
    while not channel.closed:
        handle(messages)
        if stopping:
            return 0
        built.check()
        if channel.congested:
            engine.settle()  # ranks that wait for the end of a step would pass for hung
            messages = channel.wait(IDLE_WAIT_S)
            continue
        engine.step()
        channel.send(engine.drain())
        messages = channel.wait(0.0 if stopping else sleep_until(engine, clock.now()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
