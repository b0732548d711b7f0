"""Results beside limits and vLLM's figures: rows of plain data, their tables and their chart.

vLLM's figures are of another machine (`targets.json` says which). A second column scales them by
what both machines' limits measured: steps and tokens by the copy, prefill by the matrix product.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Results = Mapping[str, Any]
SAME_EXPERTS = "moonlight-same-experts"
TIMES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "gap_p99_ms")
MODELS = ("qwen3-8b", "qwen3-0.6b", "qwen3-30b-a3b", "moonlight-16b-a3b")
ALONE = {"ms": "median", "best_ms": "best", "sustained_ms": "without a pause"}  # times of one prompt


@dataclass(frozen=True)
class Row:
    """`lower`: less is better. `scale`: this machine's limit over that of vLLM's machine. `limit`: of this machine.

    `wanted`: a ratio to vLLM's scaled figure that ours is to reach, `wanted_of_limit` one to the limit, `most` a bound.
    """

    group: str
    what: str
    unit: str
    ours: float
    vllm: float | None = None
    scale: float = 1.0
    limit: float | None = None
    lower: bool = False
    wanted: float | None = None
    wanted_of_limit: float | None = None
    most: float | None = None

    @property
    def scaled(self) -> float | None:
        if self.vllm is None:
            return None
        return self.vllm / self.scale if self.lower else self.vllm * self.scale

    @property
    def of_vllm(self) -> float | None:
        return self._ratio(self.scaled)

    @property
    def of_limit(self) -> float | None:
        return self._ratio(self.limit)

    def _ratio(self, other: float | None) -> float | None:
        if not other or not self.ours:
            return None
        return other / self.ours if self.lower else self.ours / other

    @property
    def met(self) -> bool | None:
        """None where nothing was wanted that can be judged."""
        judged = [
            got >= want
            for got, want in ((self.of_vllm, self.wanted), (self.of_limit, self.wanted_of_limit))
            if got is not None and want is not None
        ]
        judged += [self.ours <= self.most] if self.most is not None else []
        return all(judged) if judged else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"of_vllm": self.of_vllm, "of_limit": self.of_limit, "met": self.met}


def device(dry_run: bool) -> str:
    """The cards by their driver's word, without a context on them."""
    if dry_run or not shutil.which("nvidia-smi"):
        return "cpu"
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    cards = [line.strip() for line in lines if line.strip()]
    return f"{len(cards)} x {cards[0]}" if cards else "cpu"


def errors(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a stage, or of its parts."""
    if "error" in found:
        return [("stage", found["error"])]
    parts = [(name, part) for name, part in found.items() if isinstance(part, dict)]
    return [(name, str(part[key])) for name, part in parts for key in ("error", "errors") if key in part]


def lacks(results: Results, stage: str) -> bool:
    """Has the stage not run, or not run well?"""
    return stage not in results or bool(errors(results[stage]))


def good(results: Results, stage: str, part: str) -> Mapping[str, Any]:
    """A part's figures; empty if it did not run or failed."""
    found = results.get(stage, {}).get(part, {})
    return found if isinstance(found, dict) and "error" not in found else {}


def with_measured(targets: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """`targets` with the figures of vLLM on this machine that `folder` has; they are not scaled."""
    offline = dict(targets["offline"])
    for model in offline if folder else ():
        path = folder / f"vllm-{model}.json" if folder else Path()
        if path.is_file():
            offline[model] |= json.loads(path.read_text(encoding="utf-8")) | {"here": True}
    return dict(targets) | {"offline": offline}


def rows(results: Results, targets: Mapping[str, Any]) -> list[Row]:
    limits = results.get("limits", {})
    copy, product = limits.get("copy_gbps"), limits.get("bf16_tflops")
    by_copy = copy / targets["limits"]["copy_gbps"] if copy else 1.0
    by_product = product / targets["limits"]["bf16_tflops"] if product else 1.0
    found = [
        Row("limits", name, name.split("_")[-1], limits[name], vllm=value)
        for name, value in targets["limits"].items()
        if limits.get(name)
    ]
    for model in MODELS:
        found += _offline(results, model, targets, copy, product, by_copy, by_product)
    found += _offline(results, SAME_EXPERTS, targets, None, None, by_copy, by_product)
    for stage, label in (("deterministic", "deterministic"), ("tp1", "TP 1"), ("tp2", "TP 2"), ("tp4", "TP 4")):
        found += _steps(results, stage, f"qwen3-8b, {label}", {}, copy, by_copy, None, None)
    found += _deterministic(results)
    found += _start(results, targets) + _http(results, targets, by_copy, by_product) + _kv(results, targets)
    return found + list(_apart(results, targets)) + _transfer(results)


def _offline(
    results: Results,
    model: str,
    targets: Mapping[str, Any],
    copy: float | None,
    product: float | None,
    by_copy: float,
    by_product: float,
) -> list[Row]:
    theirs, wanted = targets["offline"][model], targets["wanted"]
    by_copy, by_product = (1.0, 1.0) if theirs.get("here") else (by_copy, by_product)
    found = []
    for part, what, answer in (("nano", "nano", 1.0), ("batch", "512 x (1024 in, 256 out)", 4.0)):
        figures = good(results, model, part)
        if figures:
            rate = theirs[part]
            scale = _mixed(by_copy, by_product, rate * answer / theirs["prefill"])
            found.append(Row(model, what, "tok/s", figures["tokens_per_s"], rate, scale, wanted=wanted["of_vllm"]))
    aim = wanted["step_of_limit"] if model == "qwen3-8b" else None
    found += _steps(results, model, model, theirs["step_ms"], copy, by_copy, wanted["of_vllm"], aim)
    for name, figures in good(results, model, "prefill").items():
        rate, flops = figures["tokens_per_s"], figures["tflops"]
        limit = rate * product / flops if product and flops else None
        what = f"prefill, {figures['prompts']} x {figures['length']}"
        vllm = theirs.get({"many": "prefill", "long": "prefill_4096"}[name])
        aim = wanted["prefill_of_limit"] if model == "qwen3-8b" else None
        found.append(Row(model, what, "tok/s", rate, vllm, by_product, limit, wanted=1.0, wanted_of_limit=aim))
    return found


def _mixed(by_copy: float, by_product: float, share: float) -> float:
    """What a rate is multiplied by on another machine, where `share` of the time goes to prompts."""
    return 1.0 / ((1.0 - share) / by_copy + share / by_product)


def _steps(
    results: Results,
    stage: str,
    group: str,
    theirs: Mapping[str, float],
    copy: float | None,
    by_copy: float,
    wanted: float | None,
    of_limit: float | None,
) -> list[Row]:
    return [
        Row(
            group,
            f"step at batch {batch}",
            "ms",
            step["mean"],
            theirs.get(batch),
            by_copy,
            limit=step["nbytes"] / copy / 1e6 if copy else None,
            lower=True,
            wanted=wanted,
            wanted_of_limit=of_limit if batch in ("1", "256") else None,
        )
        for batch, step in good(results, stage, "decode").items()
    ]


def _deterministic(results: Results) -> list[Row]:
    """Its throughput beside that of the same engine without."""
    plain, fixed = good(results, "qwen3-8b", "batch"), good(results, "deterministic", "batch")
    if not plain or not fixed:
        return []
    return [Row("deterministic", "batch, limit: without", "tok/s", fixed["tokens_per_s"], limit=plain["tokens_per_s"])]


def _start(results: Results, targets: Mapping[str, Any]) -> list[Row]:
    most, low = targets["wanted"]["start_s"], targets["start_s"][0]
    found = []
    for model in MODELS:
        figures = good(results, model, "ready")
        if figures:
            found.append(Row("start", f"{model}, engine", "s", figures["engine_s"], low, lower=True))
    for stage, what, aim in (("long", "qwen3-8b, kernels built", most), ("tp1", "qwen3-8b, engine", None)):
        figures = good(results, stage, "ready")
        if figures:
            found.append(Row("start", what, "s", figures["engine_s"], low, lower=True, most=aim))
    ready = results.get("http", {}).get("ready_s")
    return found + ([Row("start", "qwen3-8b, `nanodeploy up`", "s", ready, lower=True)] if ready else [])


def _http(results: Results, targets: Mapping[str, Any], by_copy: float, by_product: float) -> list[Row]:
    """Prompts have 1024 tokens, answers 128; first tokens wait for prompts, the others for steps."""
    found, prefill = [], targets["offline"]["qwen3-8b"]["prefill"]
    for clients, theirs in targets["http"].items():
        ours = good(results, "http", clients)
        if ours:
            group, wanted = f"HTTP, {clients} at once", targets["wanted"]["of_vllm"]
            rate = theirs["tokens_per_s"]
            scale = _mixed(by_copy, by_product, 8.0 * rate / prefill)
            found.append(Row(group, "output", "tok/s", ours["tokens_per_s"], rate, scale, wanted=wanted))
            for name, by, aim in (("ttft_p50_ms", by_product, 1.0), ("tpot_p50_ms", by_copy, None)):
                found.append(Row(group, name[:8], "ms", ours[name], theirs[name], by, lower=True, wanted=aim))
    return found


def _kv(results: Results, targets: Mapping[str, Any]) -> list[Row]:
    found = []
    pairs = (("qwen3-8b", "long", "long-fp8"), ("moonlight-16b-a3b", "moonlight-16b-a3b", "moonlight-fp8"))
    for model, plain, small in pairs:
        a, b = good(results, plain, "ready"), good(results, small, "ready")
        if a and b:
            ratio = b["memory"]["kv_blocks"] / a["memory"]["kv_blocks"]
            aim = targets["wanted"]["fp8_kv_blocks"][model]
            found.append(Row("fp8 KV", f"{model}, blocks to those of bf16", "x", ratio, limit=aim, wanted_of_limit=1.0))
    for kind in ("latent", "heads"):
        figures = good(results, "fp8-accuracy", kind)
        if figures:
            what = f"{figures['model']}, perplexity to that of bf16"
            aim = targets["wanted"]["fp8_kv_perplexity"]
            found.append(Row("fp8 KV", what, "x", figures["ratio"], lower=True, most=aim))
    for stage in ("long", "long-fp8"):
        step = good(results, stage, "long_context")
        if step:
            what = f"{stage}: step, {step['batch']} sequences at {step['context']}"
            found.append(Row("fp8 KV", what, "ms", step["mean"], lower=True))
    return found


def _apart(results: Results, targets: Mapping[str, Any]) -> Iterator[Row]:
    wanted, theirs, ours = targets["wanted"], targets["separation"], results.get("apart", {})
    plain, one = good(results, "apart", "plain, one at a time"), good(results, "apart", "one at a time")
    if plain and one:
        cost = one["ttft_p50_ms"] - plain["ttft_p50_ms"]
        yield Row("apart", "hand-off adds to TTFT p50", "ms", cost, lower=True, most=wanted["handoff_ms"])
    for load, figures in ours.items():
        if not isinstance(figures, dict) or "ttft_p50_ms" not in figures:
            continue
        for name in TIMES:
            ideal = figures.get("ideal_" + name[5:])
            yield Row(
                f"apart, {load}",
                name.replace("_ms", "").replace("_", " "),
                "ms",
                figures[name],
                theirs.get(f"vLLM over NIXL, {load}", {}).get(name),
                limit=ideal if name.startswith("ttft") else None,
                lower=True,
                most=_bound(name, load, ideal, wanted),
            )
        for name, vllm in theirs.get(f"vLLM, two plain replicas, {load}", {}).items():
            what = name.replace("_ms", "").replace("_", " ")
            yield Row(f"the same, vLLM: 2 replicas, {load}", what, "ms", figures[name], vllm, lower=True)


def _transfer(results: Results) -> list[Row]:
    """KV between two GPUs beside a plain copy between them."""
    found, limit = results.get("transfer", {}), results.get("limits", {}).get("peer_copy_gbps")
    return [
        Row("transfer", f"{row['blocks']} blocks {row['placed']}, verified", "GB/s", row["verified_gbps"], limit=limit)
        for row in found.get("rows", ())
    ]


def _bound(name: str, load: str, ideal: float | None, wanted: Mapping[str, float]) -> float | None:
    if load != "8/s":
        return None
    if name == "gap_p99_ms":
        return wanted["gap_p99_ms"]
    return ideal + wanted["ttft_over_ideal_ms"] if ideal is not None and name.startswith("ttft") else None


def tables(
    console: Console, found: Sequence[Row], results: Results, targets: Mapping[str, Any], environment: Mapping[str, Any]
) -> None:
    console.print(
        f"\nOurs: {environment['device']}, commit {environment['commit']}, {environment['date']}", highlight=False
    )
    console.print(f"vLLM: {targets['source']}, {targets['date']}; {targets['settings']}", highlight=False)
    if here := [model for model, figures in targets["offline"].items() if figures.get("here")]:
        console.print(f"vLLM on this machine, not scaled: {', '.join(here)}", highlight=False)
    table = Table(title="'scaled': vLLM's figure by the two machines' limits; ratios above 1 are better than it")
    for column in ("", "what", "unit", "limit", "vLLM", "scaled", "ours", "of limit", "x scaled", "goal"):
        table.add_column(column, justify="left" if column in ("", "what", "unit") else "right", no_wrap=True)
    last = ""
    for row in found:
        if last not in ("", row.group):
            table.add_section()
        goal = {True: "met", False: "missed", None: ""}[row.met]
        cells = (_figure(row.limit), _figure(row.vllm), _figure(row.scaled), _figure(row.ours))
        ratios = (f"{row.of_limit:.0%}" if row.of_limit else "", f"{row.of_vllm:.2f}" if row.of_vllm else "")
        table.add_row("" if row.group == last else row.group, row.what, row.unit, *cells, *ratios, goal)
        last = row.group
    console.print(table)
    for stage in ("drafts", "drafts-mtp", "sparse", "dense"):
        _steps_table(console, stage, results.get(stage, {}))
    for row in results.get("speculation", {}).get("rows", ()):
        console.print("trained small model, {sampling}, {engine}: x {speed_up}, right {acceptance}".format(**row))
    for model in MODELS:
        memory = good(results, model, "ready").get("memory")
        if memory:
            parts = ", ".join(f"{key} {value:,.1f}" for key, value in memory.items())
            console.print(f"memory, {model} (GB): {parts}", highlight=False)
    for stage in ("tp1", "tp2", "tp4"):
        one = good(results, stage, "one_prompt")
        if one:
            times = ", ".join(f"{name} {one[key]:.1f}" for key, name in ALONE.items() if key in one)
            console.print(f"{stage}, a prompt of {one['length']} tokens alone (ms): {times}", highlight=False)
    for rate, load in results.get("apart", {}).items():
        if isinstance(load, Mapping) and "loaded_ideal_p50_ms" in load:
            queue = ", ".join(f"{q} {load[f'loaded_ideal_{q}_ms']:.0f}" for q in ("p50", "p99"))
            console.print(f"apart, {rate}, an ideal queue of prompts without a pause (ms): {queue}", highlight=False)
    for name, label in (("waterfall, plain", "one request"), ("waterfall", "one request apart")):
        for stamp in results.get("apart", {}).get(name, ()):
            figures = {
                key: value for key, value in stamp.items() if value and key.endswith(("_ms", "gbps", "transport"))
            }
            console.print(f"{label}: {figures}", highlight=False)
    if results.get("tests"):
        console.print(f"tests of the GPU: {results['tests']}", highlight=False, markup=False)


def _steps_table(console: Console, stage: str, found: Mapping[str, Any]) -> None:
    """Milliseconds of a step by number of drafts, or by context."""
    for part in ("drafts", "by_context"):
        figures = good({stage: found}, stage, part)
        if figures:
            cells = [
                f"{key}: "
                + (f"{v['mean']:.2f}" if "mean" in v else ", ".join(f"batch {b} {s['mean']:.2f}" for b, s in v.items()))
                for key, v in figures.items()
            ]
            console.print(f"{stage}, ms of a step by {part.removeprefix('by_')}: " + "; ".join(cells), highlight=False)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(path: Path, found: Sequence[Row], environment: Mapping[str, Any]) -> None:
    """Ours over vLLM's scaled figure, and over the limit, a bar each."""
    bars = [(f"{row.group}: {row.what}", row.of_vllm, row.of_limit) for row in found if row.group != "limits"]
    bars = [bar for bar in bars if bar[1] or bar[2]]
    if not bars:
        return
    figure = Figure(figsize=(9.5, 1.2 + 0.28 * len(bars)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, index, title, line in (
        (panels[0], 1, "times vLLM's (scaled)", 1.15),
        (panels[1], 2, "of the limit", 0.85),
    ):
        values = [bar[index] or 0.0 for bar in bars]
        drawn = axes.barh(range(len(bars)), values, color="C0")
        axes.bar_label(drawn, [f"{value:.2f}" if value else "" for value in values], padding=3, fontsize=7)
        axes.axvline(line, color="black", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.15)
    panels[0].set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    panels[0].invert_yaxis()
    figure.suptitle(f"{environment['device']}, commit {environment['commit']}, {environment['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=120)
