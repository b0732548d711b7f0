"""Kernels that Triton compiles while requests wait: each holds up all that run, so each is named.

An engine computes what it can meet before it is ready. A kernel that is compiled after that belongs to a shape which
was forgotten there, or to one that only some requests have. What lies compiled in Triton's cache is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.kernels import gpu
from common.telemetry import get_logger

_log = get_logger(__name__)


@dataclass
class LateKernels:
    """Of this process, since `watch`. `seconds`: spent compiling."""

    count: int = 0
    seconds: float = 0.0

    def watch(self) -> None:
        """From now on every kernel that is compiled is late."""
        if not gpu.unavailable():
            import triton

            triton.knobs.compilation.listener = self.heard

    def heard(self, *, src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
        """Triton's `CompilationListener`; `times` are microseconds."""
        if cache_hit:
            return
        seconds = times.total / 1e6
        self.count += 1
        self.seconds += seconds
        _log.warning("a kernel was compiled while requests waited", kernel=metadata["name"], seconds=round(seconds, 3))


late_kernels = LateKernels()
