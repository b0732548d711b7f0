"""Cost of a decoded token by context, native sparse attention beside dense, in one layer of DeepSeek-V3.2's shape.

The layer is the attention of one transformer layer as the engine computes it: projections, the lightning indexer with
its exact top-k, and latent attention over what it selected (sparse) or over everything (dense). Head widths, latents,
top-k and the proportion of indexer heads to heads are the release's; heads and hidden size are fewer (`--heads`), so
that a figure takes seconds. The cache holds random rows. Sparse and dense take turns, so that noise meets both; each
figure is the least of the rounds: of CPU time with one thread, where others' work shows less, else of time.

Sparse attention itself costs the same for any context above top-k. What still grows is the indexer's scoring, which
reads 128 elements per position and has a fraction of the heads' work; it is also timed by itself.

    python benchmarks/sparse_attention.py [--threads 1] [--dtype bfloat16] [--quick]

Writes benchmarks/results/sparse_attention.json and .png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from common.attention.context import DTYPES, AttentionContext, GroupTables  # noqa: E402
from common.attention.cpu import CpuBackend  # noqa: E402
from common.kernels import native  # noqa: E402
from common.kvcache.layout import KVPlace  # noqa: E402
from common.layers.base import Build, Layer  # noqa: E402
from common.layers.indexer import Indexer  # noqa: E402
from common.layers.mla import MLA  # noqa: E402
from common.layers.mla_spec import IndexerSpec, MLASpec  # noqa: E402
from common.layers.rope import Rope  # noqa: E402
from common.layers.rope_spec import RopeSpec  # noqa: E402
from common.layers.step import MAIN_ROPE, Step  # noqa: E402

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
HIDDEN, Q_LORA, TOP_K, BLOCK = 1024, 512, 2048, 16
SPEC = MLASpec(q_lora_rank=Q_LORA, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128, scale=192**-0.5)
PLACE, KEYS = KVPlace("mla_latent", "full", 0), KVPlace("indexer_key", "full", 0)


class Row(msgspec.Struct):
    """Milliseconds of one token in one layer."""

    context: int
    sparse_ms: float
    dense_ms: float
    indexer_ms: float  # its scoring and choosing, part of sparse
    rounds: int


@dataclass(frozen=True)
class Cache:
    """A pool of random rows. Blocks of the sequence lie in random order."""

    pools: dict[str, Tensor]
    table_1B: Tensor

    @classmethod
    def of(cls, context: int, dtype: torch.dtype, index_dim: int) -> Cache:
        num_blocks = -(-context // BLOCK)
        widths = {PLACE.region: SPEC.row_dim, KEYS.region: index_dim}
        pools = {name: torch.randn(num_blocks, 1, 1, 1, BLOCK, width).to(dtype) for name, width in widths.items()}
        return cls(pools, torch.randperm(num_blocks, dtype=torch.int32)[None])

    def region(self, name: str) -> Tensor:
        return self.pools[name]


class Bench:
    """One layer, sparse and dense: the dense one computes with the same weights."""

    def __init__(self, dtype: torch.dtype, heads: int, max_context: int) -> None:
        self.dtype = dtype
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        build = Build(dtype, torch.device("cpu"))
        self.spec = IndexerSpec(heads // 2, 128, TOP_K, SPEC.rope_dim, False, (True,))
        self.sparse = self._layer(build, heads, Indexer(build, HIDDEN, Q_LORA, self.spec, KEYS))
        self.dense = self._layer(build, heads, None)
        self.rope = Rope(build, RopeSpec(), SPEC.rope_dim, max_context)
        self.backend = CpuBackend()

    def _layer(self, build: Build, heads: int, indexer: Indexer | None) -> MLA:
        layer = MLA(build, HIDDEN, heads, SPEC, PLACE, indexer=indexer, top_k=TOP_K if indexer else 0)
        _draw(layer)
        return layer

    def context(self, cache: Cache, context: int) -> AttentionContext:
        last = int(cache.table_1B[0, (context - 1) // BLOCK]) * BLOCK + (context - 1) % BLOCK
        return AttentionContext(
            query_starts_S1=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens_S=torch.tensor([context], dtype=torch.int32),
            max_query_len=1,
            max_seq_len=context,
            groups={PLACE.group: GroupTables(cache.table_1B, torch.tensor([last]), BLOCK)},
            kv=cache,
            backend=self.backend,
        )

    def measure(self, context: int, seconds: float) -> Row:
        cache = Cache.of(context, self.dtype, self.spec.head_dim)
        x_1D = torch.randn(1, HIDDEN).to(self.dtype)
        position = torch.tensor([context - 1])
        q_1HD = torch.randn(1, self.spec.num_heads, self.spec.head_dim).to(self.dtype)
        weights_1H = torch.randn(1, self.spec.num_heads)
        keys = cache.region(KEYS.region)[:, 0, 0, 0]

        def token(layer: MLA) -> float:
            step = Step(position, position, self.context(cache, context), {MAIN_ROPE: self.rope(position)})
            return self._timed(lambda: layer(x_1D, step))

        def choose() -> float:
            if context <= TOP_K:
                return 0.0
            ctx = self.context(cache, context)
            tables = ctx.groups[PLACE.group]
            return self._timed(lambda: self.backend.select(q_1HD, weights_1H, keys, tables, ctx, 128**-0.5, TOP_K))

        kinds: tuple[Callable[[], float], ...] = (lambda: token(self.sparse), lambda: token(self.dense), choose)
        rounds: list[list[float]] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until or len(rounds) < 5:
            rounds.append([1e3 * kind() for kind in kinds])
        sparse, dense, indexer = (min(column) for column in zip(*rounds, strict=True))
        return Row(context, sparse, dense, indexer, len(rounds))

    def _timed(self, call: Callable[[], object]) -> float:
        began = self.clock()
        call()
        return self.clock() - began


def _draw(layer: Layer) -> None:
    for slot in layer.slots():
        slot.target.normal_(0.0, 0.02)
    layer.derive()


def show(rows: list[Row]) -> None:
    table = Table(title=f"One token in one layer, ms; top-k is {TOP_K}")
    for name in ("context", "sparse", "dense", "indexer", "dense / sparse"):
        table.add_column(name, justify="right")
    for r in rows:
        figures = (r.sparse_ms, r.dense_ms, r.indexer_ms, r.dense_ms / r.sparse_ms)
        table.add_row(str(r.context), *(f"{x:.2f}" for x in figures))
    Console().print(table)


def draw(rows: list[Row], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    contexts = [r.context for r in rows]
    axes.plot(contexts, [r.dense_ms for r in rows], marker="o", label="dense")
    axes.plot(contexts, [r.sparse_ms for r in rows], marker="o", label="sparse, indexer included")
    chosen = [r for r in rows if r.indexer_ms]
    label = "indexer alone: scoring and choosing"
    axes.plot([r.context for r in chosen], [r.indexer_ms for r in chosen], marker=".", linestyle="--", label=label)
    axes.axvline(TOP_K, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{c // 1024}k" for c in contexts])
    axes.set_xlabel(f"context, tokens (dotted: top-k of {TOP_K})")
    axes.set_ylabel("ms for one token in one layer")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=64, help="query heads; the indexer has half as many")
    parser.add_argument("--seconds", type=float, default=5.0, help="per context")
    parser.add_argument("--quick", action="store_true", help="short contexts, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = {"heads": arguments.heads, "hidden": HIDDEN, "top_k": TOP_K, "threads": arguments.threads}
    about = report.environment("torch", dtype=arguments.dtype, instructions=native.cpu_features(), **shape)
    contexts, seconds = (CONTEXTS[:3], 0.3) if arguments.quick else (CONTEXTS, arguments.seconds)
    load, began = report.Load(), time.process_time()
    bench = Bench(DTYPES[arguments.dtype], arguments.heads, max(contexts))
    rows = [bench.measure(context, seconds) for context in track(contexts, "contexts", transient=True)]
    about["others"] = round(load.others(time.process_time() - began), 3)
    show(rows)
    if not arguments.quick:
        report.write_json("sparse_attention", {"environment": about, "rows": [msgspec.structs.asdict(r) for r in rows]})
        title = f"Sparse and dense attention by context: {arguments.heads} heads, {arguments.dtype}, "
        draw(rows, title + f"{arguments.threads} thread(s)", report.RESULTS / "sparse_attention.png")


if __name__ == "__main__":
    main()
