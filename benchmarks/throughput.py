"""Output tokens per second of the demo model: ours offline and served, beside transformers and llama.cpp.

Every contender gets the same prompts (64 to 256 random tokens of English) and gives 64 tokens to each, greedily,
whatever token comes: 16 and 64 requests at once, or two one after the other. The clock runs from the prompts as
token ids to the last token, so prompt processing counts. Contenders are processes of their own with the same number
of threads, loaded once; they take turns in rounds, in another order each round, so that noise meets all of them.

    nanodeploy       offline, `from nanodeploy import LLM`, in bf16 and fp32
    served           `nanodeploy up` with --prefill 0 and 1 in bf16, streams over HTTP from a closed loop of clients
    transformers     `generate` on one static batch, left-padded, in bf16 and fp32
    llama.cpp        low-level batches on the demo model's GGUF file (Q4_1: 4-bit weights), where installed

    python benchmarks/throughput.py [--concurrency 1 16 64] [--rounds 3] [--without NAME ...] [--append]
    python benchmarks/throughput.py --install-llama

Rounds stop early when another would pass --budget-s. --append adds rounds to the results of the same commit and
machine, so that a long comparison is made of short runs. Writes benchmarks/results/<--name>.json and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cluster, report  # noqa: E402
from benchmarks.contenders import llama_env  # noqa: E402
from benchmarks.contenders.measured import Contender, Offline, Served, Work  # noqa: E402
from benchmarks.contenders.nanodeploy_llm import KV_BYTES  # noqa: E402
from services.cli.demo_model import ensure_demo_model  # noqa: E402
from services.cli.state import cache_root  # noqa: E402

NAME = "throughput"
LENGTHS = (64, 256)  # tokens of the shortest and the longest prompt
MAX_TOKENS = 64
OURS, SEPARATED, TOGETHER, THEIRS = "nanodeploy bf16", "served, 1 prefill", "served, no prefill", "transformers bf16"
OURS_FP32, THEIRS_FP32 = "nanodeploy fp32", "transformers fp32"
ALL = (OURS, TOGETHER, SEPARATED, OURS_FP32, THEIRS, THEIRS_FP32, "llama.cpp Q4_1")


@dataclass(frozen=True)
class Goal:
    """`ours` at `concurrency` is at least `wanted` times `theirs`, by the median of the rounds' ratios."""

    ours: str
    theirs: str
    concurrency: int
    wanted: float


GOALS = (Goal(OURS, THEIRS, 16, 1.5), Goal(TOGETHER, THEIRS, 16, 1.0), Goal(SEPARATED, THEIRS, 16, 1.0))

console = Console(width=None if sys.stdout.isatty() else 140)


def contenders(model: Path, names: Sequence[str], threads: int) -> list[Contender]:
    def offline(name: str, script: str, *arguments: str, python: str | Path = sys.executable) -> Offline:
        return Offline(name, python, script, [*arguments, str(threads)], threads)

    def served(name: str, num_prefill: int) -> Served:
        flags = ["--model", str(model), "--dtype", "bfloat16", "--kv-cache-memory-bytes", str(KV_BYTES)]
        return Served(name, num_prefill, flags)

    made: list[Contender] = []
    for name in names:
        dtype = "bfloat16" if name.endswith("bf16") else "float32"
        if name in (OURS, OURS_FP32):
            made.append(offline(name, "nanodeploy_llm.py", str(model), dtype))
        elif name in (THEIRS, THEIRS_FP32):
            made.append(offline(name, "transformers_generate.py", str(model), dtype))
        elif name in (TOGETHER, SEPARATED):
            made.append(served(name, int(name == SEPARATED)))
        elif llama_env.is_ready():
            made.append(offline(name, "llama_cpp_batch.py", str(llama_env.gguf()), python=llama_env.python()))
        else:
            console.print(f"{name} is left out: not installed, see --install-llama")
    return made


def measure(
    entrants: Sequence[Contender], arguments: argparse.Namespace, run: int, token_ids: Sequence[int], deadline: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the contenders say of themselves, and one sample a round, concurrency and contender."""
    about: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        ready = []
        for entrant in entrants:
            began = time.perf_counter()
            try:
                about[entrant.name] = stack.enter_context(entrant.start())
            except RuntimeError as error:
                about[entrant.name] = {"left_out": str(error)}
                console.print(f"{entrant.name} is left out: {error}", markup=False)
                continue
            console.print(f"{entrant.name} is ready after {time.perf_counter() - began:.1f} s", highlight=False)
            ready.append(entrant)
        longest = 0.0
        for number in range(arguments.rounds):
            began = time.perf_counter()
            if began + longest > deadline:
                console.print(f"{number} rounds fit the budget")
                break
            for concurrency in arguments.concurrency:
                work = Work.draw(f"{run}.{number}.{concurrency}", token_ids, LENGTHS, arguments.tokens, concurrency)
                turn = number % len(ready)
                samples += _one_cell([*ready[turn:], *ready[:turn]], work, run, number, about)
            longest = max(longest, time.perf_counter() - began)
    return about, samples


def _one_cell(
    ready: Sequence[Contender], work: Work, run: int, number: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """One turn each. What fails is noted in `about`; the others go on."""
    rows: dict[str, list[list[int]]] = {}
    samples = []
    for entrant in ready:
        try:
            got = entrant.run(work)
        except RuntimeError as error:
            about[entrant.name].setdefault("failed", []).append(f"{work.concurrency} at once: {error}")
            console.print(f"{entrant.name} failed: {error}", markup=False)
            continue
        if got.token_ids is not None:
            rows[entrant.name] = got.token_ids
        sample = {"run": run, "round": number, "concurrency": work.concurrency, "contender": entrant.name}
        figures = {key: value for key, value in asdict(got).items() if key not in ("token_ids", "more")}
        samples.append(sample | {key: round(value, 4) for key, value in figures.items()} | got.more)
        console.print(
            f"round {number + 1}, {work.concurrency:>2} at once: {entrant.name:<18} {got.tokens_per_s:7.1f} tokens/s "
            f"in {got.seconds:5.1f} s, {got.cpu_s:5.1f} s of CPU, others {got.others:.0%}",
            highlight=False,
        )
    if OURS_FP32 in rows and THEIRS_FP32 in rows:
        same = sum(a == b for a, b in zip(rows[OURS_FP32], rows[THEIRS_FP32], strict=True))
        console.print(f"fp32: {same} of {len(work.prompts)} answers are the same tokens as transformers'")
        samples[-1]["same_answers_fp32"] = [same, len(work.prompts)]
    return samples


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best and median of each contender at each concurrency, and its median ratio to transformers bf16."""
    rows = []
    for concurrency in sorted({s["concurrency"] for s in samples}):
        for name in ALL:
            speeds = _speeds(samples, name, concurrency)
            if not speeds:
                continue
            values = list(speeds.values())
            rows.append(
                {
                    "concurrency": concurrency,
                    "contender": name,
                    "best": round(max(values), 1),
                    "median": round(statistics.median(values), 1),
                    "rounds": len(values),
                    "of_transformers_bf16": ratio(samples, name, THEIRS, concurrency),
                    "of_best_transformers": _of_best(samples, name, concurrency),
                }
            )
    return rows


def _speeds(samples: Sequence[dict[str, Any]], name: str, concurrency: int) -> dict[tuple[int, int], float]:
    mine = [s for s in samples if s["contender"] == name and s["concurrency"] == concurrency]
    return {(s["run"], s["round"]): s["tokens_per_s"] for s in mine}


def ratio(samples: Sequence[dict[str, Any]], ours: str, theirs: str, concurrency: int) -> float | None:
    """Median over the rounds that both took part in; None without one."""
    a, b = _speeds(samples, ours, concurrency), _speeds(samples, theirs, concurrency)
    both = [a[key] / b[key] for key in a if key in b]
    return round(statistics.median(both), 3) if both else None


def _of_best(samples: Sequence[dict[str, Any]], name: str, concurrency: int) -> float | None:
    """The same against whichever of transformers' two types is faster here."""
    found = [r for theirs in (THEIRS, THEIRS_FP32) if (r := ratio(samples, name, theirs, concurrency)) is not None]
    return min(found) if found else None


def judge(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    judged = []
    for goal in GOALS:
        got = ratio(samples, goal.ours, goal.theirs, goal.concurrency)
        if got is not None:
            judged.append(asdict(goal) | {"got": got, "met": got >= goal.wanted})
    return judged


def show(summary: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Output tokens/s; ratios are medians over rounds")
    for column in ("at once", "contender", "best", "median", "rounds", "x transformers bf16", "x its better type"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    last = None
    for row in summary:
        if last not in (None, row["concurrency"]):
            table.add_section()
        last = row["concurrency"]
        ratios = (row["of_transformers_bf16"], row["of_best_transformers"])
        cells = [f"{r:.2f}" if r is not None else "-" for r in ratios]
        figures = (f"{row['best']:.1f}", f"{row['median']:.1f}", str(row["rounds"]))
        table.add_row(str(row["concurrency"]), row["contender"], *figures, *cells)
    console.print(table)
    for goal in goals:
        verdict = "[green]met[/green]" if goal["met"] else "[red]missed[/red]"
        console.print(
            f"{verdict}: {goal['ours']} at {goal['concurrency']} is {goal['got']:.2f} x {goal['theirs']}, "
            f"wanted {goal['wanted']}"
        )


def earlier(name: str, environment: dict[str, object], work: dict[str, object]) -> dict[str, Any]:
    """The results there are, if they are of this commit, machine and work; else none."""
    path = report.RESULTS / f"{name}.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(found["environments"][-1][key] == environment[key] for key in ("commit", "cpu", "cores"))
    if not same or found["work"] != work:
        console.print("--append: the results there are of another commit, machine or work; they are replaced")
        return {}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16], help="requests at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--without", nargs="+", choices=ALL, default=[], help="leave these out")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--tokens", type=int, default=MAX_TOKENS, help="output tokens of each request")
    parser.add_argument("--budget-s", type=float, default=460.0, help="no round begins that would end later")
    parser.add_argument("--name", default=NAME, help="of the result, e.g. for another machine")
    parser.add_argument("--append", action="store_true", help="add to the results of this commit and machine")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens; nothing is written")
    parser.add_argument("--install-llama", action="store_true", help="build llama-cpp-python in the cache folder; end")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once, for --install-llama")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    cluster.stop_on_sigterm()
    if arguments.install_llama:
        llama_env.install(arguments.jobs)
        return
    deadline = time.perf_counter() + arguments.budget_s
    if arguments.quick:
        arguments.rounds, arguments.tokens = 1, 8
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    environment = report.environment("torch", "transformers", "tokenizers", threads=arguments.threads)
    model = ensure_demo_model(cache_root(os.environ), lambda text: console.print(f"demo model: {text}"))
    work: dict[str, object] = {"model": model.name, "prompt_tokens": list(LENGTHS), "output_tokens": arguments.tokens}
    before = earlier(arguments.name, environment, work) if arguments.append else {}
    english = (ROOT / "LICENSE").read_text(encoding="utf-8")
    token_ids = sorted(set(Tokenizer.from_file(str(model / "tokenizer.json")).encode(english).ids))
    run = len(before.get("environments", ()))
    names = [name for name in arguments.contenders if name not in arguments.without]
    entrants = contenders(model, names, arguments.threads)
    about, samples = measure(entrants, arguments, run, token_ids, deadline)
    samples = [*before.get("samples", ()), *samples]
    summary, goals = summarise(samples), judge(samples)
    show(summary, goals)
    if arguments.quick:
        return
    content = {
        "environments": [*before.get("environments", ()), environment],
        "work": work,
        "contenders": before.get("contenders", {}) | about,
        "summary": summary,
        "goals": goals,
        "samples": samples,
    }
    path = report.write_json(arguments.name, content)
    draw(arguments.name, summary, environment)
    console.print(f"wrote {path.relative_to(ROOT)}", highlight=False)


def draw(name: str, summary: Sequence[dict[str, Any]], environment: dict[str, object]) -> None:
    levels = sorted({row["concurrency"] for row in summary})
    median = {(row["contender"], row["concurrency"]): row["median"] for row in summary}
    names = [name for name in ALL if any((name, level) in median for level in levels)]
    title = f"SmolLM2-135M, {environment['cpu']}, {environment['threads']} threads, commit {environment['commit']}"
    panels = [f"{level} at once" for level in levels]
    report.write_bars(name, title, "output tokens/s", panels, {n: [median.get((n, c)) for c in levels] for n in names})


if __name__ == "__main__":
    main()
