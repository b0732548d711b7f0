"""What keeps an engine in the caller's process whole, and ends every wait for it.

A step, and the ranks that compute it together, cannot be left in the middle: what other ranks then add up would belong
to another step than ours. So Ctrl-C waits for a step's end, and an engine that was left in one is at its end.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.engine.build import BuiltEngine
from common.errors import InternalError, NanoDeployError, RankLostError

LOOK_S = 1e-4  # between looks at the ranks while the device computes


class EngineGuard:
    """`ended`: why the engine can compute nothing any more, None while it can."""

    def __init__(self, built: BuiltEngine) -> None:
        self.ended: NanoDeployError | None = None
        self._built = built
        if built.fleet is not None:
            built.engine.while_waiting = self._look

    def _look(self) -> None:
        """A device may wait for a lost rank for ever; who waits for the device does not."""
        self._built.check()
        time.sleep(LOOK_S)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What the engine cannot go on from if it is left."""
        try:
            yield
        except RankLostError as error:
            self.ended = error
            raise
        except Exception:
            raise
        except BaseException:
            self.ended = InternalError("the engine was interrupted inside a step: make another LLM")
            raise


@contextmanager
def interrupts_held_back() -> Iterator[Callable[[], None]]:
    """Ctrl-C is raised by the next call of what is yielded, or at the end; pressed again, at once.

    In another thread than the main one, and where somebody else handles the signal, it stays as it is.
    """
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def look() -> None:
        if pressed:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield look
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    look()
