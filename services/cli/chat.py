"""`nanodeploy chat`: one question, or a conversation, with the answer shown as it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console

from common.errors import NanoDeployError, UnavailableError
from services.cli.api import list_models, stream_chat
from services.cli.token import auth_headers

_BYE = {"exit", "quit", "/exit", "/quit", "/bye"}


@dataclass(frozen=True)
class ChatOptions:
    model: str = ""  # empty: the first one served
    system: str = ""
    max_tokens: int = 0  # 0 leaves it to the router
    temperature: float | None = None
    seed: int | None = None


def run_chat(url: str, text: str, options: ChatOptions, console: Console, api_key: str = "") -> int:
    """Ask `text`, or converse when it is empty. Returns the exit code."""
    with httpx.Client(timeout=httpx.Timeout(600.0, connect=5.0), headers=auth_headers(api_key)) as client:
        models = list_models(client, url)
        if not models:
            raise UnavailableError(f"{url} serves no model now: no decode worker is ready")
        body: dict[str, Any] = {"model": options.model or models[0]}
        if options.max_tokens:
            body["max_tokens"] = options.max_tokens
        if options.temperature is not None:
            body["temperature"] = options.temperature
        if options.seed is not None:
            body["seed"] = options.seed
        messages = [{"role": "system", "content": options.system}] if options.system else []
        if text:
            _answer(client, url, body, [*messages, {"role": "user", "content": text}], console)
            return 0
        return _converse(client, url, body, messages, console)


def _converse(
    client: httpx.Client, url: str, body: dict[str, Any], messages: list[dict[str, str]], console: Console
) -> int:
    console.print(f"[dim]Talking to {body['model']}. An empty line, Ctrl-D or /exit ends it.[/dim]", highlight=False)
    while True:
        try:
            text = console.input("[bold cyan]> [/bold cyan]").strip()
        except EOFError:
            console.out("")
            return 0
        if not text or text in _BYE:
            return 0
        messages.append({"role": "user", "content": text})
        try:
            answer = _answer(client, url, body, messages, console)
        except NanoDeployError as error:
            console.print(error.message, style="red", markup=False, highlight=False)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(
    client: httpx.Client, url: str, body: dict[str, Any], messages: list[dict[str, str]], console: Console
) -> str:
    """Show one answer as it streams, reasoning dimmed; Ctrl-C ends it early and keeps what was said."""
    pieces: list[str] = []
    reasons = False
    try:
        for text, is_reasoning in stream_chat(client, url, {**body, "messages": messages}):
            if reasons and not is_reasoning:
                console.out("\n")
            reasons = is_reasoning
            if not is_reasoning:
                pieces.append(text)
            console.out(text, end="", highlight=False, style="dim" if is_reasoning else None)
            console.file.flush()
    except KeyboardInterrupt:
        console.out(" [stopped]", end="", highlight=False)
    except NanoDeployError:
        if pieces:
            console.out("")
        raise
    console.out("")
    return "".join(pieces)
