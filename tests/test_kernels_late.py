"""Kernels compiled while requests wait: Triton's own compiler tells; no GPU is needed to compile for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.kernels.late import LateKernels


def test_what_is_compiled_is_named_and_what_is_found_compiled_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = tmp_path / "doubling_kernel.py"
    source.write_text(
        "import triton.language as tl\n"
        "import triton\n"
        "def double(x_ptr, N: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from doubling_kernel import double  # type: ignore[import-not-found]

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    late = LateKernels()

    def build(n: int) -> None:
        function = triton.runtime.jit.JITFunction(double)
        made = ASTSource(function, {"x_ptr": "*fp32", "N": "constexpr"}, constexprs={"N": n})
        triton.compile(made, target=GPUTarget("cuda", 90, 32))

    build(16)
    assert late.count == 0, "before it watches nothing is late"
    late.watch()
    build(16)
    assert late.count == 0, "found compiled"
    with capture_logs() as logs:
        build(32)
    assert late.count == 1
    assert late.seconds > 0
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert line["kernel"] == "double"
    assert line["seconds"] == pytest.approx(late.seconds, abs=1e-3)
