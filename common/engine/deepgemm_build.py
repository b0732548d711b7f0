"""`python -m common.engine.deepgemm_build`: compiles all of DeepGEMM's kernels for some products, in parallel.

DeepGEMM chooses a kernel by a product's sizes and by the GPU, and calls the compiler of DG_JIT_NVCC_COMPILER, one
kernel at a time. Here that is a script of ours, the *stand-in*, beside a folder, the *shelf*:

    every product with every number of rows that matters -> the stand-in puts the source on the shelf, and fails
    -> nvcc compiles all that lies there, as many at once as there are cores
    -> the products that failed once more -> the stand-in hands over what lies there -> DeepGEMM keeps it

What DeepGEMM keeps is just what it would have compiled itself: its names are made of the source, the flags and the
version that `nvcc --version` prints. Processes that want the same wait for each other by a lock.

Reads a `Request` in JSON; each line of the output is JSON: {"done", "total"} while nvcc works, then {"built"}, how many
kernels, or {"error"}. A GPU is needed: of the kind that will run them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch

from common.attention.flashinfer_modules import alone
from common.kernels.gpu import deepgemm
from common.parallel.lifeline import die_with_parent

Progress = Callable[[int, int], None]
"""(kernels compiled, kernels in all)."""

NVCC_LIMIT_S = 300.0
_ROW_STEP = 64  # the least common multiple of the rows of DeepGEMM's larger tiles
_FEW_ROWS = (16, 32)  # up to here it has smaller ones
_VERSION = 1

STAND_IN = """#!/bin/sh
nvcc={nvcc} shelf={shelf}
if [ "$1" = --version ]; then exec "$nvcc" --version; fi
for arg; do
  case "$arg" in *.cu) source=$arg ;; esac
  if [ "$last" = -o ]; then out=$arg; fi
  last=$arg
done
key=$(sha256sum < "$source" | cut -c 1-64)
if [ -f "$shelf/$key.cubin" ]; then exec cp "$shelf/$key.cubin" "$out"; fi
cp "$source" "$shelf/$key.cu"
for arg; do printf '%s\\n' "$arg"; done > "$shelf/$key.args"
rm -f "$source"
rmdir "${{source%/*}}"
exit 1
"""


@dataclass(frozen=True)
class Shelf:
    """KEY.cu and KEY.args, put there by the stand-in; KEY.cubin beside them, made by `nvcc`."""

    folder: Path
    nvcc: str

    def open(self) -> Path:
        """The stand-in, ready to be called."""
        stand_in = self.folder / "nvcc"
        stand_in.write_text(STAND_IN.format(nvcc=shlex.quote(self.nvcc), shelf=shlex.quote(str(self.folder))))
        stand_in.chmod(0o700)
        return stand_in

    def missing(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.cu") if not path.with_suffix(".cubin").exists())

    def compile(self, source: Path) -> None:
        """By the arguments that the stand-in was given for it. RuntimeError with what nvcc says."""
        args = source.with_suffix(".args").read_text().splitlines()
        building = source.with_suffix(".building")
        args[args.index("-o") + 1] = str(building)
        command = [self.nvcc, *(str(source) if arg.endswith(".cu") else arg for arg in args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVCC_LIMIT_S, cwd=self.folder)
        if done.returncode:
            raise RuntimeError(f"a kernel does not compile: {done.stderr[-2000:]}")
        building.replace(source.with_suffix(".cubin"))


@dataclass(frozen=True)
class Product:
    """Rows in bf16, as a step has them, times a weight [N, K] in FP8, or each row times one of [E, N, K]."""

    n: int
    k: int
    experts: int = 0
    top_k: int = 0

    @property
    def can(self) -> bool:
        """Does DeepGEMM multiply by it? (`common.kernels.gpu.fp8` and `.experts` say the same.)"""
        return self.k % 128 == 0 and self.n % (128 if self.experts else 64) == 0

    def rows(self, tokens: int) -> list[int]:
        """Numbers of rows in steps of up to `tokens` tokens, of all that are multiplied alike the largest."""
        if not self.experts:
            few = [n for n in _FEW_ROWS if n < tokens + _FEW_ROWS[0]]
            return [*few, *range(_ROW_STEP, tokens + _ROW_STEP, _ROW_STEP)]
        tile, pairs = deepgemm.GROUP_ROWS, tokens * self.top_k
        return [tile * (self.experts + n) for n in range(pairs // tile + 1)] if pairs >= self.experts else []


@dataclass(frozen=True)
class Request:
    """`parent`: the process with which this one ends. `device`: number of the GPU. `jobs`: 0 is the cores there are."""

    products: list[Product]
    tokens: int
    device: int
    parent: int
    jobs: int = 0

    def is_done(self, card: str) -> bool:
        """Was it done before on this kind of card, for as many tokens?"""
        try:
            return int(self._mark(card).read_text()) >= self.tokens
        except (OSError, ValueError):
            return False

    def set_done(self, card: str) -> None:
        mark = self._mark(card)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.with_suffix(".new").write_text(str(self.tokens))
        mark.with_suffix(".new").replace(mark)

    def _mark(self, card: str) -> Path:
        what = [_VERSION, deepgemm.version(), card, sorted(str(product) for product in self.products)]
        return deepgemm.folder() / "nanodeploy" / hashlib.sha256(orjson.dumps(what)).hexdigest()[:32]


def main() -> int:
    """The exit code: 0, or 1 after an error was said."""
    values: dict[str, Any] = orjson.loads(sys.stdin.buffer.read())
    request = Request(**values | {"products": [Product(**product) for product in values["products"]]})
    die_with_parent(request.parent)
    say = _only_ours()
    try:
        say({"built": _build(request, lambda done, total: say({"done": done, "total": total}))})
    except Exception as error:  # noqa: BLE001  the edge of this process: what failed is said in its one way
        say({"error": str(error)})
        return 1
    return 0


def _only_ours() -> Callable[[dict[str, Any]], None]:
    """Writes a line to what was the standard output, which what DeepGEMM prints of failures no longer reaches."""
    ours = os.dup(1)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)

    def say(what: dict[str, Any]) -> None:
        os.write(ours, orjson.dumps(what, option=orjson.OPT_APPEND_NEWLINE))

    return say


def _build(request: Request, progress: Progress) -> int:
    """How many kernels were not there. TimeoutError if another process compiles for too long."""
    folder = deepgemm.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "nanodeploy.lock"), _emptied(folder / "nanodeploy-shelf") as place:
        shelf = Shelf(place, deepgemm.compiler())
        deepgemm.compile_with(shelf.open())
        if torch.cuda.is_available():
            torch.cuda.set_device(request.device)
        reason = deepgemm.unavailable()  # imports it, with the stand-in in place
        if reason:
            raise RuntimeError(reason)
        if request.is_done(torch.cuda.get_device_name()):  # by the process that had the lock before
            return 0
        num = compile_all(lambda: _calls(request), shelf, request.jobs, progress)
        torch.cuda.synchronize()
        request.set_done(torch.cuda.get_device_name())
    return num


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A new folder, for so long; what a process that was killed has left there goes too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _calls(request: Request) -> Iterator[Callable[[], None]]:
    """One for each product and number of rows. A product's tensors are there while its calls are."""
    for product in request.products:
        rows = product.rows(request.tokens)
        multiply = deepgemm.idle_product(product.n, product.k, product.experts, max(rows, default=0))
        yield from (partial(multiply, some) for some in rows)


def compile_all(calls: Callable[[], Iterator[Callable[[], None]]], shelf: Shelf, jobs: int, progress: Progress) -> int:
    """Call all, compile what lies on the shelf for it, and call all again: how many kernels that was.

    RuntimeError, with what nvcc says, if one does not compile; and whatever a call raises with its kernel there.
    """
    for call in calls():
        with contextlib.suppress(RuntimeError):  # of the stand-in; another comes again below
            call()
    sources = shelf.missing()
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        waiting = [pool.submit(shelf.compile, source) for source in sources]
        try:
            for done, one in enumerate(as_completed(waiting), 1):
                one.result()
                progress(done, len(sources))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for call in calls() if sources else ():
        call()
    return len(sources)


if __name__ == "__main__":
    sys.exit(main())
