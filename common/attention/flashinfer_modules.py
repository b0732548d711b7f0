"""FlashInfer's paged attention kernels: which modules there are, where they lie, how one is built and called.

A module is a shared library that FlashInfer's templates make for one set of types. Its name says the set (and, by a
digest, what of ours went into it), so a library that is there is the right one: it is loaded as it is, without ninja
or nvcc. Two folders are looked through:

    <flashinfer>/data/aot/NAME/NAME.so                                                    with the package
    $FLASHINFER_WORKSPACE_BASE/.cache/flashinfer/VERSION/ARCH/cached_ops/NAME/NAME.so     what was built here

The second is filled by `nanodeploy kernels build`, and by the first use of a module that is in neither. Only the
kernels of causal masks are compiled, a third of what FlashInfer's own modules hold.

    sources -> NAME.building/ (one process at a time, under a lock) -> renamed to NAME/NAME.so -> found, mapped

A process that maps a file that is still written dies of SIGBUS. So a library gets its name when it is complete, is not
written again, and one that ends before its last section (someone unpacks an archive) is not there yet.

Two kinds of paged kernels, `fa2` (any GPU that FlashInfer serves; query heads of a key head share a tile) and `fa3`
(Hopper; no split along the keys, no 8-bit keys). Strides of pages are honoured by both, and offsets are 64 bits wide:
`paged_kv_t::get_elem_offset` multiplies as size_t, `SparseCollectiveMainloop` as int64.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog
import torch

from common.errors import ConfigError

_log = structlog.stdlib.get_logger(__name__)

VERSION = "0.6.13"
"""What the arguments below and the arrays of `flashinfer_plan` were written for."""

BUILD_LIMIT_S = 3600.0
"""Longest wait for another process that compiles."""

SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3"}

# Mask kCustom is computed, not read: causal, and nothing below `first`. DefaultAttention has the window.
_VARIANT = """
#include<flashinfer/attention/variants.cuh>

template <bool closed, bool window>
struct FromFirst : DefaultAttention<false, window, false, false> {
  using Base = DefaultAttention<false, window, false, false>;
  template <typename Params>
  __device__ __host__ FromFirst(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr)
      : Base(params, batch_idx, smem_ptr) {}

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    bool mask = Base::LogitsMask(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx);
    if constexpr (closed) {
      mask &= kv_idx >= params.first && kv_idx + this->qo_len <= this->kv_len + qo_idx;
    }
    return mask;
  })
};
"""
_CAUSAL, _CLOSED = 1, 2  # FlashInfer's MaskMode: kCausal, kCustom
_HND = 1  # FlashInfer's QKVLayout: pages are [heads, tokens, width]
_LOCK_LOOK_S = 0.2  # flock(2) knows no time limit
_ELF = struct.Struct("<4s36xQ10xHH2x")  # magic; where the table of sections begins, the size and number of its entries


def missing() -> str:
    """Why FlashInfer cannot be used here, empty if it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "flashinfer needs a GPU of compute capability 8.0"
    try:
        import flashinfer
    except (ImportError, OSError, RuntimeError) as error:  # what it needs is missing, as apache-tvm-ffi
        return f"flashinfer cannot be loaded: {error!r}"
    if flashinfer.__version__ != VERSION:
        return f"flashinfer {flashinfer.__version__} is not {VERSION}"
    return ""


class Compiled(Protocol):
    """A module, of any kind."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path | None:
        """Its library, None if it was not built."""

    def sources(self) -> Any:
        """What is to be compiled: writes the sources, returns FlashInfer's JitSpec."""


def find(name: str) -> Path | None:
    """The library of this name, None if it was not built, or not to its end."""
    from flashinfer.jit import env

    places = (env.FLASHINFER_AOT_DIR, env.FLASHINFER_JIT_DIR)
    return next((p for p in (d / name / f"{name}.so" for d in places) if _is_whole(p)), None)


def _is_whole(path: Path) -> bool:
    """Is it a library with all its sections? Their table lies at its end, and its place is at its beginning."""
    try:
        with path.open("rb") as file:
            magic, table_at, entry_nbytes, num_entries = _ELF.unpack(file.read(_ELF.size))
            nbytes = os.fstat(file.fileno()).st_size
    except (OSError, struct.error):
        return False
    return bool(magic == b"\x7fELF" and nbytes >= table_at + entry_nbytes * num_entries)


@dataclass(frozen=True)
class Module:
    """`first`: positions that hold nothing can be left out (fa2). Keys and values are of `kv_dtype`, others `dtype`."""

    kind: Literal["fa2", "fa3"]
    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    window: bool = False
    first: bool = False

    @property
    def name(self) -> str:
        own = hashlib.sha256(_VARIANT.encode()).hexdigest()[:8] if self.kind == "fa2" else "stock"
        types = f"{SHORT[self.dtype]}_{SHORT[self.kv_dtype]}_{self.head_dim}"
        flags = ("_window" if self.window else "") + ("_first" if self.first else "")
        return f"nanodeploy_paged_{self.kind}_{types}{flags}_{own}"

    @property
    def path(self) -> Path | None:
        """Its library, None if it was not built."""
        return find(self.name)

    def sources(self) -> Any:
        """What is to be compiled: writes the sources, returns FlashInfer's JitSpec."""
        spec = self._fa2() if self.kind == "fa2" else self._fa3()
        masks = [_CAUSAL, *([_CLOSED] if self.first else [])]
        kernels = "paged_kernel" if self.kind == "fa2" else "paged_sm90_kernel"
        wanted = {f"batch_prefill_{kernels}_mask_{m}.cu" for m in masks}
        return trimmed(spec, self.name, lambda file: "_kernel_mask_" not in file or file in wanted)

    def _fa2(self) -> Any:
        from flashinfer.jit.attention.modules import gen_customize_batch_prefill_module

        return gen_customize_batch_prefill_module(
            "fa2",
            self.name,
            self.dtype,
            self.kv_dtype,
            self.dtype,
            torch.int32,
            self.head_dim,
            self.head_dim,
            [],
            [],
            ["sm_scale", "v_scale", "first"],
            ["double", "double", "int64_t"],
            f"FromFirst<use_custom_mask, {str(self.window).lower()}>",
            _VARIANT,
            use_sliding_window=self.window,
        )

    def _fa3(self) -> Any:
        from flashinfer.jit.attention.modules import gen_batch_prefill_module

        return gen_batch_prefill_module(
            "fa3",
            self.dtype,
            self.kv_dtype,
            self.dtype,
            torch.int32,
            self.head_dim,
            self.head_dim,
            0,  # no rotation
            self.window,
            False,  # no soft cap
            False,  # scores are fp32
        )


def trimmed(spec: Any, name: str, keep: Callable[[str], bool]) -> Any:
    """A JitSpec of some of its sources; functions that it then lacks are looked for when they are called."""
    sources = [s for s in spec.sources if keep(Path(s).name)]
    return replace(spec, name=name, sources=sources, extra_ldflags=[*(spec.extra_ldflags or []), "-Wl,-z,lazy"])


def wanted(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, *, windows: bool, drafts: bool, hopper: bool
) -> list[Module]:
    """What a model's attention uses. `drafts`: has it a layer whose first positions hold nothing?"""
    dtype = dtype if kv_dtype == torch.float8_e4m3fn else kv_dtype
    kinds: list[Literal["fa2", "fa3"]] = ["fa2", "fa3"] if hopper and kv_dtype == dtype else ["fa2"]
    found = [Module(k, dtype, kv_dtype, head_dim, w) for k in kinds for w in ((False, True) if windows else (False,))]
    return found + ([Module("fa2", dtype, kv_dtype, head_dim, first=True)] if drafts else [])


def build_missing(modules: Sequence[Compiled]) -> None:
    """Compile those that are not there, with a line in the log. ConfigError if there is no compiler, or it fails."""
    missing = [m for m in modules if m.path is None]
    if not missing:
        return
    names = [m.name for m in missing]
    _log.warning("attention kernels are compiled now; `nanodeploy kernels build` does it beforehand", kernels=names)
    try:
        build(missing)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"attention kernels {', '.join(names)} are not built: {error}") from error


def load_library(module: Compiled) -> Any:
    """The module's library, compiled now if it was not before."""
    import tvm_ffi

    build_missing([module])
    path = module.path
    assert path is not None
    return tvm_ffi.load_module(str(path))


@functools.cache
def function(module: Any, name: str) -> Any:
    """Of the library of a module, which is hashable."""
    return getattr(_kept(module), name)


@functools.cache
def _kept(module: Any) -> Any:
    return load_library(module)


@functools.cache
def _overlaps_launches() -> bool:
    """Can a kernel begin while the one before ends (programmatic dependent launch)?"""
    return torch.cuda.get_device_capability() >= (9, 0)


def build(
    modules: Sequence[Compiled], num_jobs: int = 0, on_line: Callable[[str], None] = lambda _: None
) -> list[Compiled]:
    """Compile those that are not there, and return them. Processes that want the same wait for each other.

    `on_line`: each line that the compiler prints. RuntimeError, with the end of its output, if something does not
    compile; TimeoutError if another process compiles for longer than `BUILD_LIMIT_S`.
    """
    from flashinfer.jit import env

    folder: Path = env.FLASHINFER_JIT_DIR
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "nanodeploy.lock") as lock:
        missing = [m for m in modules if m.path is None]
        specs = [replace(m.sources(), name=f"{m.name}.building") for m in missing]
        if specs:
            _compile(folder, specs, lock, num_jobs, on_line)
        for module, spec in zip(missing, specs, strict=True):
            target = folder / module.name / f"{module.name}.so"
            target.parent.mkdir(exist_ok=True)
            os.replace(spec.jit_library_path, target)
    return missing


@contextlib.contextmanager
def alone(path: Path) -> Iterator[int]:
    """Hold the lock of this file, by a descriptor; a child that has the descriptor too holds it as long as it lives."""
    deadline = time.monotonic() + BUILD_LIMIT_S
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {path} for {BUILD_LIMIT_S:.0f} s") from None
                time.sleep(_LOCK_LOOK_S)
        yield file.fileno()


def _compile(folder: Path, specs: Sequence[Any], lock: int, num_jobs: int, on_line: Callable[[str], None]) -> None:
    """In parallel, all files of all modules in one run of ninja, which holds the lock even if this process ends."""
    for spec in specs:
        spec.write_ninja()
    top = folder / "nanodeploy.ninja"
    top.write_text("\n".join(["ninja_required_version = 1.3", *(f"subninja {s.ninja_path}" for s in specs), ""]))
    command = ["ninja", "-C", str(folder), "-f", str(top)]
    if num_jobs:
        command += ["-j", str(num_jobs)]
    output: list[str] = []
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, pass_fds=[lock], **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            on_line(line)
    if process.returncode:
        raise RuntimeError("kernels do not compile:\n" + "".join(output[-40:]))


@dataclass(frozen=True)
class Launch:
    """A module with its plan. `first` > 0 needs a module that has `first`. `ints`, `floats`: uint8 workspaces."""

    module: Module
    plan_info: Any
    ints: torch.Tensor
    floats: torch.Tensor
    window: int
    first: int

    def run(
        self,
        q_THD: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        out_THD: torch.Tensor,
        scale: float,
        v_scale: float,
    ) -> None:
        """`k`, `v`: [num_blocks, U, block_size, D] of equal strides, the last 1. `pages`: int32, of the queries'
        starts [S + 1], of the blocks' starts [S + 1], the blocks and the tokens in each last one [S].
        """
        mask = _CLOSED if self.first else _CAUSAL
        layout = (mask, _HND, self.window - 1, _overlaps_launches())
        extra: tuple[Any, ...] = (scale, v_scale, self.first)
        if self.module.kind == "fa3":
            assert v_scale == 1.0
            assert not self.first
            extra = (None, None, None, None, 0.0, scale, 1.0, 0)
        run = function(self.module, "paged_run")
        run(self.floats, self.ints, self.plan_info, q_THD, k, v, *pages, out_THD, None, *layout, *extra)
