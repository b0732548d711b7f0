"""`nanodeploy keys`: API keys of a cluster, through its controller.

A key is made here and shown once; only its hash leaves this process.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from common.rpc.limits import LimitsClient
from common.types.keys import ApiKey, hashed_key
from services.cli.options import running_cluster
from services.cli.state import StateFolder, state_root
from services.cli.token import admin_token, use_cluster_tls

T = TypeVar("T")

KEY_PREFIX = "sk-nd-"


@dataclass(frozen=True)
class Where:
    """Whose keys: those of the cluster `name` of this machine, or of the controller at host:port."""

    name: str
    controller: str = ""
    token: str = ""


def create_key(where: Where, key: ApiKey, as_json: bool, console: Console) -> int:
    """`key` without its hash. Returns the exit code."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = msgspec.structs.replace(key, key_hash=hashed_key(secret), created_s=int(time.time()))
    _ask(where, lambda client: client.put_keys([key]))
    if as_json:
        console.out(msgspec.json.encode({"id": key.key_id, "key": secret, "name": key.name}).decode())
        return 0
    console.out(secret)
    console.print(
        f"Key [bold]{key.key_id}[/bold]: keep it now, it is not shown again. Routers take it within seconds; "
        "the API asks for a key from then on.",
        highlight=False,
    )
    return 0


def list_keys(where: Where, as_json: bool, console: Console) -> int:
    found = _ask(where, lambda client: client.list_keys()).keys or ()
    keys = sorted(found, key=lambda key: (key.revoked, key.created_s, key.key_hash))
    if as_json:
        rows = [{"id": key.key_id, **msgspec.to_builtins(key)} for key in keys]
        console.out(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return 0
    table = Table("id", "name", "tenant", "priority", "requests/min", "tokens/min", "tokens used", "made", box=None)
    for key in keys:
        used = f"{key.used_tokens:,}" + (f" of {key.quota_tokens:,}" if key.quota_tokens else "")
        made = time.strftime("%Y-%m-%d", time.localtime(key.created_s)) if key.created_s else ""
        limits = [f"{n:,}" if n else "-" for n in (key.requests_per_minute, key.tokens_per_minute)]
        name = f"{key.name} (revoked)" if key.revoked else key.name
        style = "dim" if key.revoked else ""
        table.add_row(key.key_id, name, key.tenant, str(key.priority), *limits, used, made, style=style)
    console.print(table if keys else "There are no keys: the API is open.", highlight=False)
    return 0


def revoke_key(where: Where, key_id: str, console: Console) -> int:
    key = _ask(where, lambda client: client.revoke_key(key_id))
    console.print(f"Key {key.key_id} is revoked; routers refuse it within seconds.", highlight=False)
    return 0


def _ask(where: Where, work: Callable[[LimitsClient], Awaitable[T]]) -> T:
    controller, token = where.controller, where.token
    folder = StateFolder(state_root(os.environ), where.name)
    use_cluster_tls(folder)
    if not controller:
        controller = running_cluster(folder).controller
        token = token or admin_token(folder)
    if not token:
        raise ConfigError("the controller's admin token is needed: --admin-token or NANODEPLOY_ADMIN_TOKEN")

    async def run() -> T:
        client = LimitsClient([controller], token)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())
