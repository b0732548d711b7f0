"""The `bench` command: warm up, run, show, write JSON."""

from __future__ import annotations

import asyncio
import json
import platform
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import nanodeploy
from common.errors import NanoDeployError
from services.cli.bench.client import BenchClient
from services.cli.bench.load import LoadOptions, make_bodies, run_load, vocabulary
from services.cli.bench.stats import summarise, table
from services.cli.report import make_console


def run_bench(url: str, options: LoadOptions, num_warmups: int, api_key: str, target: str, console: Console) -> int:
    """Run the load and report it. Exit code 1 when a request failed; `NanoDeployError` when all did."""
    summary = asyncio.run(_bench(url, options, num_warmups, api_key))
    result = {
        "url": url,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": nanodeploy.__version__,
        "host": {"machine": platform.machine(), "python": platform.python_version()},
        "load": asdict(options),
        **summary,
    }
    if target == "-":
        print(json.dumps(result, indent=2))
    elif summary["completed"]:
        console.print(table(summary))
        console.print(f"Seed {options.seed}", highlight=False)
        if summary["cached_tokens"]:
            console.print(
                f"The prefix cache had {summary['cached_tokens']} of the {summary['prompt_tokens']} prompt tokens: "
                "times to first token are shorter for it",
                highlight=False,
            )
    if target not in ("", "-"):
        Path(target).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {target}", highlight=False)
    if not summary["completed"]:
        raise NanoDeployError(f"all {summary['failed']} requests failed: {next(iter(summary['errors']))}")
    return 1 if summary["failed"] else 0


async def _bench(url: str, options: LoadOptions, num_warmups: int, api_key: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    token_ids = [] if options.chat else await vocabulary(url, options.model, headers)
    client = BenchClient(url, api_key)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        console = make_console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            if num_warmups:
                warmup = replace(options, num_prompts=num_warmups, seed=options.seed + 10_007, request_rate=0.0)
                task = progress.add_task("warming up", total=num_warmups)
                await run_load(client, warmup, make_bodies(warmup, token_ids), lambda: progress.advance(task))
            task = progress.add_task("requests", total=options.num_prompts)
            samples, duration_s = await run_load(
                client, options, make_bodies(options, token_ids), lambda: progress.advance(task)
            )
    finally:
        client.close()
    return summarise(samples, duration_s)
