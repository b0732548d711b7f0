"""What the launcher shows once its cluster runs: how the proving token came, the way in, the live table."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

from rich.console import Console
from rich.live import Live
from rich.text import Text

from common.errors import NanoDeployError, UnavailableError
from services.cli.cluster import follow_cluster, view_cluster
from services.cli.plan import ClusterPlan
from services.cli.probe import Answer
from services.cli.tables import worker_table

REFRESH_S = 2.0


def check_path(answer: Answer, num_prefill: int) -> str:
    """Say which way the proving completion took. Raises `UnavailableError` when a separated cluster recomputed.

    A token that came although the KV was not handed over would hide a pair that never works.
    """
    if num_prefill and not answer.transferred_tokens and not answer.embedding_size:
        raise UnavailableError(
            f"a token came, but no prefill worker took part: the decode worker prefilled by itself "
            f"({answer.fallback or 'the router chose no prefill worker'}); `nanodeploy doctor` says more"
        )
    return answer.path


def print_banner(
    plan: ClusterPlan, chat: str, console: Console, *, embeds: bool = False, needs_key: bool = False
) -> None:
    """The address, a line to copy, and what to type next (`chat`), unless the model makes vectors."""
    question = "Why is the sky blue?"
    path = "/v1/chat/completions"
    asked: dict[str, object] = {"messages": [{"role": "user", "content": question}]}
    if embeds:
        path, asked, chat = "/v1/embeddings", {"input": question}, ""
    body = json.dumps({"model": plan.model, **asked})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    curl = f"curl {plan.url}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
    console.print(f"\n[bold green]Ready[/bold green]: {plan.url}/v1 (documented at {plan.url}/docs)", highlight=False)
    console.out("\n  ".join(["Try:", curl, *([chat] if chat else [])]) + "\n", highlight=False)


async def print_workers(controller: str, console: Console) -> None:
    """The workers, once; that they cannot be asked just now is no reason to end a cluster."""
    try:
        console.print(worker_table(await view_cluster(controller), console.width))
    except NanoDeployError as error:
        console.print(f"controller: {error.message}", markup=False, highlight=False)


async def live_table(controller: str, console: Console) -> None:
    """The workers, until cancelled, drawn anew when something changed."""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            shown = None
            try:
                async with aclosing(follow_cluster(controller, REFRESH_S)) as looks:
                    async for views in looks:
                        if views != shown:
                            table = worker_table(views, console.width)
                            table.caption = "Ctrl-C drains and stops everything"
                            live.update(table, refresh=True)
                            shown = views
            except NanoDeployError as error:
                live.update(Text(f"controller: {error.message}", no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(REFRESH_S)
