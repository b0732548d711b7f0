"""The cluster's OpenAI API as the command line uses it: a model list, and chat answers as they stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

from common.errors import NanoDeployError, UnavailableError


def list_models(client: httpx.Client, url: str) -> list[str]:
    """Names of the models served. Raises `UnavailableError`."""
    try:
        response = client.get(f"{url}/v1/models")
        raise_for_answer(response)
        return [model["id"] for model in response.json()["data"]]
    except httpx.TransportError as error:
        raise UnavailableError(f"{url} does not answer: {error or type(error).__name__}") from None
    except (ValueError, KeyError, TypeError):
        raise UnavailableError(f"{url} is no OpenAI API: its /v1/models says {response.text[:100]!r}") from None


class ChatPiece(NamedTuple):
    text: str
    is_reasoning: bool


def stream_chat(client: httpx.Client, url: str, body: dict[str, Any]) -> Iterator[ChatPiece]:
    """The answer, piece by piece. Raises `NanoDeployError` with what the router says went wrong."""
    try:
        with client.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                response.read()
                raise_for_answer(response)
            for event in sse_events(response.iter_lines()):
                if "error" in event:
                    raise NanoDeployError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", ()):
                    delta = choice.get("delta") or {}
                    if text := delta.get("reasoning_content"):
                        yield ChatPiece(text, True)
                    if text := delta.get("content"):
                        yield ChatPiece(text, False)
    except httpx.TransportError as error:
        raise UnavailableError(f"{url}: the connection broke: {error or type(error).__name__}") from None


def sse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        yield json.loads(data)


def raise_for_answer(response: httpx.Response) -> None:
    """Raises `NanoDeployError` with the message of an OpenAI-shaped error unless the status is 200."""
    if response.status_code == 200:
        return
    try:
        error = response.json()["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    raise NanoDeployError(f"the router answered {response.status_code}: {message}")
