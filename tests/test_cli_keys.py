"""`nanodeploy keys` against a real controller and a real storage."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from redis_support import fresh_namespace, run_redis
from typer.testing import CliRunner, Result

from common.config import ControllerConfig
from common.types.keys import hashed_key
from services.cli.main import app
from services.controller.app import Controller

TOKEN = "an-admin-token"


@pytest.fixture
def controller() -> Iterator[str]:
    """host:port of one that runs beside the command."""
    ready: threading.Event = threading.Event()
    address = []

    async def serve(url: str, stop: asyncio.Event) -> None:
        config = ControllerConfig(port=0, http_port=0, redis_url=url, namespace=fresh_namespace(), admin_token=TOKEN)
        running = Controller(config)
        await running.start()
        address.append(f"127.0.0.1:{running.port}")
        ready.set()
        await stop.wait()
        await running.stop(0.1)

    with run_redis() as server:
        loop, stop = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=loop.run_until_complete, args=(serve(server.url, stop),))
        thread.start()
        assert ready.wait(20)
        yield address[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


def run(controller: str, *words: str, token: str = TOKEN) -> Result:
    environ = {"NANODEPLOY_ADMIN_TOKEN": token}
    return CliRunner().invoke(app, ["keys", *words, "--controller", controller], env=environ)


def test_a_key_is_made_listed_and_revoked(controller: str) -> None:
    assert "no keys" in run(controller, "list").output
    made = run(controller, "create", "for a test", "--rpm", "60", "--tpm", "9000", "--quota", "5", "--priority", "-1")
    assert made.exit_code == 0, made.output
    secret = made.output.split()[0]
    assert secret.startswith("sk-nd-")
    assert len(secret) > 40
    (listed,) = json.loads(run(controller, "list", "--json").output)
    assert secret not in json.dumps(listed)
    assert listed["key_hash"] == hashed_key(secret)
    assert (listed["name"], listed["requests_per_minute"], listed["priority"]) == ("for a test", 60, -1)
    other = json.loads(run(controller, "create", "--json").output)
    assert other["id"] == hashed_key(other["key"])[:12]
    assert run(controller, "revoke", listed["id"][:6]).exit_code == 0
    assert {row["id"]: row["revoked"] for row in json.loads(run(controller, "list", "--json").output)} == {
        listed["id"]: True,
        other["id"]: False,
    }
    shown = run(controller, "list").output
    assert "(revoked)" in shown
    assert "sk-nd-" not in shown


def test_without_the_token_nothing_is_told(controller: str) -> None:
    for words in (["list"], ["create"], ["revoke", "abcd"]):
        assert run(controller, *words, token="wrong").exit_code == 1
        assert run(controller, *words, token="").exit_code != 0
