"""Decode tokens/s of one request with and without speculation, and how many drafts were right.

    python benchmarks/speculation.py [--tokens 256] [--prompts 4] [--rounds 3] [--threads 1] [--device cuda --name NAME]
        [--engines none "mtp 1" ...]

The model is the small DeepSeek-V3 that tests/train_models.py trains on a formal language and that is committed in
tests/data/mtp-dyck. One request at a time, fp32, greedy and sampled (temperature 0.8, a seed each); all engines live
in this process and take turns, so a ratio is of one run. Answers must be the same tokens with and without: a
difference is an error, not a figure. Writes benchmarks/results/<--name>.json and .png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import report  # noqa: E402
from nanodeploy import LLM, SamplingParams  # noqa: E402

NAME = "speculation"
MODEL = ROOT / "tests" / "data" / "mtp-dyck"
ACCEPTANCE, SPEED_UP = 0.7, 1.4
ENGINES: dict[str, dict[str, object]] = {
    "none": {"method": "none"},
    "mtp 1": {"method": "mtp", "num_speculative_tokens": 1},
    "mtp 2": {"method": "mtp", "num_speculative_tokens": 2},
    "mtp 3": {"method": "mtp", "num_speculative_tokens": 3},
    "mtp 4": {"method": "mtp", "num_speculative_tokens": 4},
    "ngram 3": {"method": "ngram", "num_speculative_tokens": 3},
}
SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8}}


@dataclass
class Run:
    """One engine, one way to sample, one round over all prompts."""

    engine: str
    sampling: str
    tokens_per_s: float
    draft_tokens: int
    accepted: int
    steps_with_drafts: int


def prompts(count: int) -> list[str]:
    """Beginnings of sentences that training has not seen."""
    import random

    from train_models import SEED, Language

    rng = random.Random(SEED + 1)
    language = Language.make(SEED)
    return [language.sentence(rng, 60)[:50] for _ in range(count)]


def measure(llm: LLM, engine: str, sampling: str, texts: list[str], tokens: int) -> tuple[Run, list[list[int]]]:
    """Prefill is left out: a request of one token is timed as well and taken off."""
    answers: list[list[int]] = []
    seconds, made, draft_tokens, accepted, drafts = 0.0, 0, 0, 0, 0
    for seed, text in enumerate(texts):
        for count in (1, tokens):
            params = SamplingParams(max_tokens=count, ignore_eos=True, seed=seed, **SAMPLING[sampling])
            began = time.perf_counter()
            (output,) = llm.generate([text], params)
            took = time.perf_counter() - began
            seconds += took if count > 1 else -took
            made += count if count > 1 else -count
        answers.append(output.outputs[0].token_ids)
        draft_tokens += output.stats.draft_tokens
        accepted += output.stats.accepted_draft_tokens
        drafts += output.stats.drafts
    return Run(engine, sampling, made / seconds, draft_tokens, accepted, drafts), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="with `none` among them")
    parser.add_argument("--name", default=NAME, help="of the results")
    args = parser.parse_args()
    work = {"tokens": args.tokens, "prompts": args.prompts}
    about = report.environment("torch", device=args.device, threads=args.threads, **work)
    texts = prompts(args.prompts)
    runs: list[Run] = []
    reference: dict[str, list[list[int]]] = {}
    with ExitStack() as stack:
        llms = {
            name: stack.enter_context(
                LLM(
                    MODEL,
                    device=args.device,
                    dtype="float32",
                    max_num_seqs=4,
                    kv_cache_memory_bytes=1 << 28,
                    num_threads=args.threads,
                    enable_prefix_caching=False,
                    speculative_config=config,
                )
            )
            for name, config in ENGINES.items()
            if name in args.engines
        }
        for index in range(args.rounds + 1):  # the first one warms up
            for sampling in SAMPLING:
                for name, llm in llms.items():
                    run, answers = measure(llm, name, sampling, texts, args.tokens)
                    if reference.setdefault(sampling, answers) != answers:
                        raise SystemExit(f"{name}, {sampling}: the tokens differ from those without speculation")
                    if index:
                        runs.append(run)
    rows = [summary(name, sampling, runs) for sampling in SAMPLING for name in args.engines]
    show(rows)
    best = max((r for r in rows if r["sampling"] == "greedy" and r["engine"].startswith("mtp")), key=speed_up)
    goals = [
        {"goal": "acceptance, mtp 1, greedy", "above": ACCEPTANCE, "got": acceptance_of(rows)},
        {"goal": "speed-up at batch 1, greedy", "above": SPEED_UP, "got": best["speed_up"], "engine": best["engine"]},
    ]
    for goal in goals:
        goal["met"] = goal["got"] > goal["above"]
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['got']}, wanted above {goal['above']}")
    content = {"environment": about, "goals": goals, "rows": rows, "runs": [asdict(run) for run in runs]}
    print(f"wrote {report.write_json(args.name, content)}")
    series = {name: [r["tokens_per_s"] for r in rows if r["engine"] == name] for name in args.engines}
    print(f"wrote {report.write_bars(args.name, 'One request, small DeepSeek-V3', 'tokens/s', list(SAMPLING), series)}")


def summary(engine: str, sampling: str, runs: list[Run]) -> dict[str, object]:
    """Medians over the rounds; the speed-up is the median of each round's own ratio."""
    own = [r for r in runs if (r.engine, r.sampling) == (engine, sampling)]
    plain = [r for r in runs if (r.engine, r.sampling) == ("none", sampling)]
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(own, plain, strict=True)]
    drafted = sum(r.draft_tokens for r in own)
    return {
        "engine": engine,
        "sampling": sampling,
        "tokens_per_s": round(statistics.median(r.tokens_per_s for r in own), 1),
        "speed_up": round(statistics.median(ratios), 3),
        "acceptance": round(sum(r.accepted for r in own) / drafted, 3) if drafted else None,
        "drafts_per_step": round(drafted / max(sum(r.steps_with_drafts for r in own), 1), 2),
    }


def speed_up(row: dict[str, object]) -> float:
    value = row["speed_up"]
    assert isinstance(value, float)
    return value


def acceptance_of(rows: list[dict[str, object]]) -> float:
    (row,) = (r for r in rows if (r["engine"], r["sampling"]) == ("mtp 1", "greedy"))
    value = row["acceptance"]
    return value if isinstance(value, float) else 0.0


def show(rows: list[dict[str, object]]) -> None:
    table = Table("sampling", "speculation", "tokens/s", "speed-up", "acceptance", "drafts a step")
    for r in rows:
        table.add_row(
            *(str(r[k]) for k in ("sampling", "engine", "tokens_per_s", "speed_up", "acceptance", "drafts_per_step"))
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
