"""The engine's end of its socket: frames, and a parent that reads nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvloop
from engine_support import greedy, llama, make_engine

from common.config import EngineConfig, LogConfig, WorkerConfig
from common.engine.channel import EngineChannel, FrameDecoder, frame
from common.engine.client import ProcessEngine
from common.engine.messages import Cancel, Deltas, EngineLoad, FromEngine, Shutdown, Submit, ToEngine
from common.engine.process import _abort, serve
from common.kvtransfer.memory import MemoryNetwork
from common.types import GenerationRequest, MonotonicClock, Role

__all__ = ["llama"]

BACKLOG = 16 << 10


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends that hold little by themselves."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.settimeout(20)
        yield ours, theirs


def receive(sock: socket.socket, frames: FrameDecoder, decoder: msgspec.msgpack.Decoder[Any]) -> list[Any]:
    return [decoder.decode(raw) for raw in frames.feed(sock.recv(1 << 20))]


def test_a_congested_channel_sleeps_until_there_is_room(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = EngineChannel(theirs, msgspec.msgpack.Decoder(ToEngine), BACKLOG)
    watched = os.eventfd(1)
    channel.watch(watched)
    assert channel.wait(10) == [], "a watched descriptor ends the wait"
    sent = 0
    while not channel.congested:
        channel.send([Deltas(sent)])
        sent += 1
    before = time.monotonic()
    assert channel.wait(0.2) == []
    assert time.monotonic() - before > 0.15
    ours.sendall(frame(msgspec.msgpack.encode(Shutdown())))
    assert channel.wait(10) == [Shutdown()], "the parent is heard all the same"
    frames, decoder, steps = FrameDecoder(), msgspec.msgpack.Decoder(FromEngine), []
    while len(steps) < sent:
        steps += [m.step for m in receive(ours, frames, decoder)]
        channel.wait(0)
    assert steps == list(range(sent))
    assert not channel.congested
    os.close(watched)


def test_an_engine_makes_nothing_for_a_parent_that_reads_nothing(
    pair: tuple[socket.socket, socket.socket], llama: Path
) -> None:
    """It stops at the limit, takes cancels meanwhile, and goes on where it was when it is read again."""
    ours, theirs = pair
    built = make_engine(llama, Role.DECODE, MemoryNetwork(MonotonicClock()), MonotonicClock(), check_ledger=False)
    channel = EngineChannel(theirs, msgspec.msgpack.Decoder(ToEngine), BACKLOG)
    for fd in built.wakeup_fds:
        channel.watch(fd)
    count, slots = 120, range(1, 9)

    def say(message: ToEngine) -> None:
        ours.sendall(frame(msgspec.msgpack.encode(message)))

    thread = threading.Thread(target=serve, args=(built, channel, []), daemon=True)
    thread.start()
    for slot in slots:
        params = greedy(count, ignore_eos=True, logprobs=20)
        say(Submit(slot, GenerationRequest(request_id=f"r{slot}", model="m", prompt_token_ids=(5,), sampling=params)))
    deadline = time.monotonic() + 30
    while not channel.congested:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    steps = built.engine.steps
    say(Cancel((slots[-1],)))
    time.sleep(0.3)
    assert 0 < steps < count
    assert built.engine.steps == steps
    frames, decoder = FrameDecoder(), msgspec.msgpack.Decoder(FromEngine)
    tokens: dict[int, int] = dict.fromkeys(slots, 0)
    ended: set[int] = set()
    while len(ended) < len(slots):
        for message in receive(ours, frames, decoder):
            for row in message.rows if isinstance(message, Deltas) else ():
                assert row.delta.position == tokens[row.slot]
                tokens[row.slot] += len(row.delta.token_ids)
                ended |= {row.slot} if row.delta.finish is not None else set()
    assert [tokens[slot] for slot in slots[:-1]] == [count] * (len(slots) - 1)
    assert tokens[slots[-1]] < count
    say(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    built.close()


async def test_an_engine_that_takes_nothing_is_ended(llama: Path) -> None:
    config = WorkerConfig(engine=EngineConfig(model=str(llama), dtype="float32", num_threads=1))
    client = ProcessEngine(Role.DECODE, config, LogConfig(), os.environ, 64 << 10)
    deaths: list[str] = []
    ended, alive = asyncio.Event(), asyncio.Event()

    def died(reason: str) -> None:
        deaths.append(reason)
        ended.set()

    await client.start(lambda message: alive.set() if isinstance(message, EngineLoad) else None, died)
    await asyncio.wait_for(alive.wait(), 60)
    os.kill(client.pid, signal.SIGSTOP)
    for _ in range(2000):
        client.send(Cancel(tuple(range(100))))
    await asyncio.wait_for(ended.wait(), 20)
    assert "SIGKILL" in deaths[0]
    assert not client.alive


async def test_an_engine_that_cannot_be_ended_is_still_reported(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one in an uninterruptible call of a driver: it closed its socket, and no signal ends it."""
    monkeypatch.setattr("common.engine.client.EXIT_S", 0.1)
    monkeypatch.setattr("common.engine.client.KILL_S", 0.1)
    config = WorkerConfig(engine=EngineConfig(model=str(llama), dtype="float32", num_threads=1))
    client = ProcessEngine(Role.DECODE, config, LogConfig(), os.environ)
    deaths: list[str] = []
    await client.start(lambda message: None, deaths.append)
    process, task = client._process, client._task
    assert process is not None
    assert task is not None
    monkeypatch.setattr(process, "kill", lambda: None)
    os.kill(process.pid, signal.SIGSTOP)
    assert client._writer is not None
    client._writer.close()
    await asyncio.wait_for(task, 10)
    await asyncio.wait_for(client.stop(0.1), 10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert deaths == [f"engine process {process.pid} went silent and cannot be ended"]


def test_who_notices_a_lost_rank_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the loop itself, which has to say why the engine ends; it is ended if it cannot."""
    ended = threading.Event()
    monkeypatch.setattr("common.engine.process.LEAVE_S", 0.3)
    monkeypatch.setattr("common.engine.process.os._exit", lambda code: ended.set())
    aborted: list[bool] = []
    _abort(SimpleNamespace(abort=lambda: aborted.append(ended.is_set())))  # type: ignore[arg-type]
    assert aborted == [False]
    assert not ended.is_set()
    assert ended.wait(10)


@pytest.mark.parametrize("turns", range(4))
def test_what_is_sent_to_an_engine_that_has_just_ended_is_for_nobody(llama: Path, turns: int) -> None:
    """uvloop, which workers run on, raises where its socket is closed and the reader has not heard of it yet."""

    async def run() -> list[str]:
        deaths: list[str] = []
        config = WorkerConfig(engine=EngineConfig(model=str(llama), dtype="float32", num_threads=1))
        client = ProcessEngine(Role.DECODE, config, LogConfig(), os.environ)
        await client.start(lambda message: None, deaths.append)
        client.kill()
        assert client._process is not None
        client._process.wait(20)  # nothing of the loop runs meanwhile
        async with asyncio.timeout(20):
            while not deaths:
                for _ in range(turns):
                    client.send(Cancel((1,)))
                await asyncio.sleep(0)
        client.send(Cancel((1,)))
        return deaths

    (reason,) = uvloop.run(run())
    assert "SIGKILL" in reason
