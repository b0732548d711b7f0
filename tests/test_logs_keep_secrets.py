"""All that a run logs, at the finest level, is searched for what clients sent and for keys."""

from __future__ import annotations

import asyncio
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import router_support as support
import structlog
from redis_support import fresh_namespace, run_redis

from common.config import ControllerConfig, LogConfig
from common.config.load import load
from common.errors import ConfigError
from common.rpc.limits import LimitsClient
from common.telemetry import configure_logging, get_logger
from common.types.keys import ApiKey, hashed_key
from services.controller.app import Controller

TOKEN, STATIC, STORED = "admin-token-zebra", "sk-static-zebra", "sk-stored-zebra"
PROMPT, ANSWER = "prompt-zebra", "answer-zebra"


async def test_a_run_logs_neither_keys_nor_prompts_nor_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with run_redis() as server:
        config = ControllerConfig(
            port=0, http_port=0, redis_url=server.url, namespace=fresh_namespace(), admin_token=TOKEN
        )
        controller = Controller(config)
        await controller.start()
        address = f"127.0.0.1:{controller.port}"
        client, stranger = LimitsClient([address], TOKEN), LimitsClient([address], "zebra")
        await client.put_keys([ApiKey(key_hash=hashed_key(STORED), requests_per_minute=2)])
        with pytest.raises(Exception, match="admin token"):
            await stranger.list_keys()
        settings: dict[str, Any] = {"admin_token": TOKEN, "api_keys": (STATIC,), "controllers": (address,)}
        async with support.cluster(tmp_path, support.say(ANSWER), **settings) as made:
            await support.until(lambda: made.router.gateway.callers.known)
            await asyncio.gather(*(_ask(made, key) for key in (STATIC, STORED, TOKEN, "sk-wrong-zebra")))
        await client.close()
        await stranger.close()
        await controller.stop(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name.split(".")[0] not in ("httpx", "httpcore")]
    assert any("request answered" in line for line in lines)
    assert any("request failed" in line for line in lines)
    assert [line for line in lines if "zebra" in line] == []


async def _ask(made: support.Cluster, key: str) -> None:
    """What is answered, what is wrong in each way, and what breaks off."""
    http, headers = made.http, {"Authorization": f"Bearer {key}"}
    good = {"prompt": PROMPT, "max_tokens": 20}
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    for path, body in (
        ("/v1/completions", good),
        ("/v1/completions", {**good, "stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/completions", {"prompt": {"zebra": PROMPT}}),
        ("/v1/completions", {**good, "temperature": PROMPT}),
        ("/v1/completions", {**good, PROMPT: 1}),
        ("/v1/completions", {**good, "model": PROMPT}),
        ("/v1/completions", {**good, "stop": [PROMPT] * 1000}),
        ("/v1/completions", {**good, "logit_bias": {PROMPT: 1.0}}),
        ("/v1/completions", {**good, "prompt": PROMPT * 100}),
        ("/v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}]}),
        ("/tokenize", {"prompt": PROMPT}),
    ):
        await http.post(path, json=body, headers=headers)
    await http.post("/v1/completions", content=f'{{"prompt": "{PROMPT}", ', headers=headers)
    await http.get("/v1/models/zebra", headers=headers)


def test_a_traceback_shows_no_variables() -> None:
    """For people's eyes too: the usual renderer prints the variables of each frame."""
    before = logging.getLogger().handlers[:], logging.getLogger().level, structlog.get_config()
    out = io.StringIO()
    try:
        for style in ("json", "console"):
            configure_logging(LogConfig(format=style), "test", out)
            try:
                _fail("-".join(("zebra", "in", "a", "variable")))
            except RuntimeError:
                get_logger(f"test.{style}").exception("an error")
    finally:
        logging.getLogger().handlers[:], level, kept = before
        logging.getLogger().setLevel(level)
        structlog.configure(**kept)
        logging.captureWarnings(capture=False)
    assert out.getvalue().count("RuntimeError") >= 2
    assert "zebra-in-a-variable" not in out.getvalue()


def _fail(prompt: str) -> None:
    raise RuntimeError(f"failed with {len(prompt)} characters")


def test_mistakes_in_settings_do_not_show_secrets() -> None:
    for variable in ("NANODEPLOY_ROUTER__API_KEYS", "NANODEPLOY_CONTROLLER__ADMIN_TOKEN"):
        environ = {variable: '[{"zebra": 1}]', "NANODEPLOY_ROUTER__PORT": "no number"}
        with pytest.raises(ConfigError) as raised:
            load(None, environ)
        assert "zebra" not in raised.value.message.replace("API_KEYS", "")
