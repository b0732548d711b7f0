"""The one face of an engine, wherever it runs: a process of its own (`common.engine.process`) or in-process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from common.engine.messages import FromEngine, ToEngine


class EngineClient(Protocol):
    """Life: start -> (EngineReady | EngineFatal) -> messages both ways -> stop.

    When the engine dies, `on_death(reason)` is called once after all its messages were delivered; the
    owner fails what was running and may `start` again. `send` never blocks and is a no-op on a dead engine.
    """

    def start(self, on_message: Callable[[FromEngine], None], on_death: Callable[[str], None]) -> None: ...

    def send(self, message: ToEngine) -> None: ...

    @property
    def alive(self) -> bool: ...

    async def stop(self, timeout_s: float) -> None: ...
