"""The `nanodeploy keys` commands."""

from __future__ import annotations

from typing import Annotated

import typer

from common.types.keys import ApiKey
from services.cli import options as opt
from services.cli.report import make_console

keys = typer.Typer(help="API keys: who may ask, and how much.", no_args_is_help=True)

Controller = Annotated[str, typer.Option(help="host:port of a controller, for a cluster not started by `up`.")]
AdminToken = Annotated[
    str,
    typer.Option(envvar="NANODEPLOY_ADMIN_TOKEN", help="controller.admin_token of that cluster.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys.command("create")
def create(
    key_name: Annotated[str, typer.Argument(help="What the key is for.")] = "",
    tenant: Annotated[str, typer.Option(help="Keys of one tenant share cached prefixes; by default its own.")] = "",
    requests_per_minute: Annotated[int, typer.Option("--rpm", min=0, help="Requests a minute; 0: any number.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option("--tpm", min=0, help="Tokens a minute; 0: any number.")] = 0,
    quota: Annotated[int, typer.Option(min=0, help="Tokens in all; 0: any number.")] = 0,
    priority: Annotated[int, typer.Option(help="Smaller is served first; below 0 before all usual ones.")] = 0,
    name: opt.Name = "default",
    controller: Controller = "",
    admin_token: AdminToken = "",
    as_json: Json = False,
) -> None:
    """Make a key and show it, once: it is stored as a hash."""
    from services.cli.keys import Where, create_key

    key = ApiKey(
        key_hash="",
        name=key_name,
        tenant=tenant,
        priority=priority,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        quota_tokens=quota,
    )
    raise typer.Exit(create_key(Where(name, controller, admin_token), key, as_json, make_console()))


@keys.command("list")
def list_(
    name: opt.Name = "default", controller: Controller = "", admin_token: AdminToken = "", as_json: Json = False
) -> None:
    """Show the keys with their limits and what they have spent."""
    from services.cli.keys import Where, list_keys

    raise typer.Exit(list_keys(Where(name, controller, admin_token), as_json, make_console()))


@keys.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, or how it begins.")],
    name: opt.Name = "default",
    controller: Controller = "",
    admin_token: AdminToken = "",
) -> None:
    """Refuse a key from now on."""
    from services.cli.keys import Where, revoke_key

    raise typer.Exit(revoke_key(Where(name, controller, admin_token), key_id, make_console()))
