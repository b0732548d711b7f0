"""`LLM` with ranks beside it, in the caller's own process: lost ranks and Ctrl-C end what they must."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from engine_support import greedy, llama, prompts, reference_tokens

from common.engine.runner import ModelRunner
from common.errors import InternalError, RankLostError
from nanodeploy import LLM

__all__ = ["llama"]

OPTIONS = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 8 << 20, "tensor_parallel_size": 2}
HANG_S = 3.0
BOUND_S = HANG_S + 6.0


@pytest.fixture
def llm(llama: Path) -> Iterator[LLM]:
    made = LLM(llama, hang_timeout_s=HANG_S, **OPTIONS)
    yield made
    began = time.monotonic()
    made.close()
    assert time.monotonic() - began < BOUND_S


def rank() -> psutil.Process:
    """The other one."""
    (found,) = [p for p in psutil.Process().children() if "common.engine.rank" in p.cmdline()]
    return found


def kill() -> None:
    rank().kill()


def stop() -> None:
    os.kill(rank().pid, signal.SIGSTOP)


@pytest.mark.parametrize("harm", [kill, stop])
def test_a_lost_rank_is_an_error_that_names_it(llm: LLM, harm: Callable[[], None]) -> None:
    (prompt,) = prompts(31, (20,))

    def after_a_step(done: int, total: int) -> None:
        if not began:
            began.append(time.monotonic())
            harm()

    began: list[float] = []
    with pytest.raises(RankLostError, match="rank 1 "):
        llm.generate([prompt], greedy(400), progress=after_a_step)
    assert time.monotonic() - began[0] < BOUND_S
    with pytest.raises(RankLostError, match="rank 1 "):
        llm.generate([prompt], greedy(1))


def test_a_device_that_waits_for_a_lost_rank_for_ever_is_not_waited_for(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, never = threading.Event(), threading.Event()

    def is_done(self: ModelRunner, pending: object) -> bool:
        waiting.set()
        return False

    monkeypatch.setattr(ModelRunner, "is_done", is_done)
    monkeypatch.setattr(ModelRunner, "collect", lambda self, pending: never.wait(2 * BOUND_S))
    threading.Thread(target=lambda: waiting.wait(BOUND_S) and kill(), daemon=True).start()
    began = time.monotonic()
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        llm.generate(prompts(32, (20,)), greedy(4))
    assert time.monotonic() - began < BOUND_S


def test_ctrl_c_waits_for_the_step_and_pressed_again_ends_the_engine(
    llm: LLM, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ModelRunner.forward
    times = [1]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored

    def press(self: ModelRunner, batch: object) -> object:
        for _ in range(times[0]):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)  # type: ignore[arg-type]

    (prompt,) = prompts(33, (20,))
    monkeypatch.setattr(ModelRunner, "forward", press)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt], greedy(400))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    times[0] = 0
    (output,) = llm.generate([prompt], greedy(6))
    assert output.outputs[0].token_ids == reference_tokens(llama, prompt, 6)
    times[0] = 2
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt], greedy(400))
    with pytest.raises(InternalError, match="interrupted inside a step"):
        llm.generate([prompt], greedy(6))


def test_ranks_outlive_the_thread_that_made_the_engine(llama: Path) -> None:
    """They end with the process. Linux tells of a parent's end by its thread."""
    made: list[LLM] = []
    thread = threading.Thread(target=lambda: made.append(LLM(llama, hang_timeout_s=HANG_S, **OPTIONS)))
    thread.start()
    thread.join()
    (prompt,) = prompts(34, (20,))
    with made[0] as llm:
        (output,) = llm.generate([prompt], greedy(6))
    assert output.outputs[0].token_ids == reference_tokens(llama, prompt, 6)
