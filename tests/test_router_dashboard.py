"""The dashboard: its data, who may see them, and the page in a real browser."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from dashboard_support import ANSWER, find_chromium, missing_browser, scene
from router_support import MODEL, Cluster, cluster, say

from services.router.admission.callers import ANYONE
from services.router.console.recent import Recent
from services.router.console.routes import page
from services.router.exchange import Exchange

SECRET = "the colour of the sky over Reykjavik"
KEY, OTHER = "sk-dashboard-test-0123456789", "sk-dashboard-other-0123456789"


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


async def data(made: Cluster, key: str = "", **params: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await made.http.get("/dashboard/data", params=params, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


async def test_data_show_the_cluster_and_what_requests_took(tmp_path: Path) -> None:
    async with scene(tmp_path / "model") as made:
        before = await data(made)
        assert before["requests"] == []
        answer = await made.http.post("/v1/chat/completions", json=chat(SECRET), headers={"x-request-id": "mine-1"})
        usage = answer.json()["usage"]
        found = await data(made)
        text = (await made.http.get("/dashboard/data")).text
    assert SECRET not in text
    assert ANSWER not in text
    workers = {worker["id"]: worker for worker in found["workers"]}
    assert {name: (w["role"], w["state"], w["reached"]) for name, w in workers.items()} == {
        "d0": ("decode", "ready", True),
        "d1": ("decode", "ready", True),
        "d2": ("decode", "starting", False),
        "p0": ("prefill", "ready", False),
        "p1": ("prefill", "ready", False),
    }
    pools = [pool for worker in workers.values() for pool in worker["kv"]]
    assert len(pools) == 4
    assert all(
        sum(pool[s] for s in ("free", "live", "cached", "leased", "in_flight")) == pool["total"] for pool in pools
    )
    model = found["models"][MODEL]
    assert model["prompt_tokens"] == usage["prompt_tokens"]
    assert model["generation_tokens"] == usage["completion_tokens"]
    assert model["cached_tokens"] == 16
    assert model["first_token"][-1] == [None, 1]
    assert model["inter_token"][-1][1] == usage["completion_tokens"] - 1
    [entry] = found["requests"]
    assert entry["request_id"] == "mine-1"
    assert entry["finish"] == ["stop"]
    assert entry["decode_worker"] in ("d0", "d1")
    assert entry["stats"]["prefill_worker"] in ("p0", "p1", "")
    assert 0 < entry["prepared_ms"] <= entry["first_token_ms"] <= entry["total_ms"]


async def test_only_what_is_new_is_sent_and_failures_are_there(tmp_path: Path) -> None:
    async with cluster(tmp_path / "model", say("hi"), request_timeout_s=60) as made:
        for _ in range(3):
            await made.post("/v1/chat/completions", **chat("a"))
        too_long = await made.post("/v1/chat/completions", **chat("word " * 400))
        assert too_long.status_code == 400
        found = await data(made)
        assert [entry["number"] for entry in found["requests"]] == [1, 2, 3, 4]
        assert found["requests"][-1]["code"]
        assert found["models"][MODEL]["request_failures"] == 1
        epoch = found["router"]["epoch"]
        assert (await data(made, epoch=epoch, since=3))["requests"] == found["requests"][3:]
        assert len((await data(made, epoch="another", since=3))["requests"]) == 4
        assert len((await data(made, epoch=epoch, since="-1"))["requests"]) == 4


def test_the_ring_is_bounded() -> None:
    recent = Recent(kept=5)
    exchange = Exchange({"nanodeploy.connection": None, "headers": []}, None, None)  # type: ignore[arg-type]
    for number in range(12):
        exchange.request_id = f"r{number}"
        recent.failed(exchange, MODEL, "overloaded", 0.25)
    assert [entry.request_id for entry in recent.seen_by(ANYONE)] == [f"r{n}" for n in range(7, 12)]
    assert recent.seen_by(ANYONE, since=11)[0].total_ms == 250


async def test_with_keys_data_need_one_and_show_ones_own_requests(tmp_path: Path) -> None:
    keys = {"api_keys": (KEY, OTHER), "admin_token": "admin-token-0123456789"}
    async with cluster(tmp_path / "model", say("hi"), **keys) as made:
        assert (await made.http.get("/dashboard")).status_code == 200
        for headers in ({}, {"authorization": "Bearer sk-wrong"}):
            answer = await made.http.get("/dashboard/data", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in (KEY, KEY, OTHER):
            headers = {"authorization": f"Bearer {key}"}
            done = await made.http.post("/v1/chat/completions", json=chat("hi"), headers=headers)
            assert done.status_code == 200
        assert len((await data(made, KEY))["requests"]) == 2
        assert len((await data(made, OTHER))["requests"]) == 1
        assert len((await data(made, "admin-token-0123456789"))["requests"]) == 3


async def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text, policy = page()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text), "the page must not load anything"
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "innerHTML" not in text
    assert "default-src 'none'" in policy
    assert len(text) < 64 * 1024
    async with cluster(tmp_path / "model", say("hi")) as made:
        answer = await made.http.get("/dashboard")
        assert answer.text == text
        assert answer.headers["content-security-policy"] == policy
        assert "/dashboard" not in (await made.http.get("/openapi.json")).json()["paths"]


# -- in a browser ------------------------------------------------------------------------------------

if not missing_browser():
    from playwright.async_api import async_playwright, expect

browser = pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "there")


@asynccontextmanager
async def seen(made: Cluster, width: int, height: int, scheme: str) -> AsyncIterator[tuple[Any, list[str]]]:
    """The page in a window, and the complaints so far: errors, and requests to anybody else."""
    complaints: list[str] = []
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            window = await chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            window.set_default_timeout(20_000)
            window.on("pageerror", lambda error: complaints.append(str(error)))
            window.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            home = urlsplit(made.url).netloc

            def asked(request: Any) -> None:
                if urlsplit(request.url).scheme != "data" and urlsplit(request.url).netloc != home:
                    complaints.append(f"asked {request.url}")

            window.on("request", asked)
            await window.goto(f"{made.url}/dashboard")
            yield window, complaints
        finally:
            await chromium.close()


async def shot(window: Any, folder: Path, name: str) -> None:
    folder = Path(os.environ.get("NANODEPLOY_SCREENSHOTS", folder))  # docs/images, to make those anew
    await window.evaluate("scrollTo(0, 0)")
    await window.screenshot(path=folder / f"{name}.png", full_page=True)


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("size", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844)])
async def test_the_page_in_chromium(tmp_path: Path, size: str, width: int, height: int, scheme: str) -> None:
    async with scene(tmp_path / "model") as made:
        prompts = ["Why is the sky blue? " * n for n in (1, 2, 3, 4, 5, 6, 7, 8)]
        await asyncio.gather(*(made.post("/v1/chat/completions", **chat(text)) for text in prompts))
        async with seen(made, width, height, scheme) as (window, complaints):
            await window.wait_for_selector("#health.warn")  # two of three decode workers
            for what, count in ((".worker", 5), (".tile", 6), (".pool", 4), ("details.request", len(prompts))):
                await expect(window.locator(what)).to_have_count(count)
            await expect(window.locator("#edges path").nth(1)).to_be_attached()
            await window.fill("#question", "Why is the sky blue, and the sunset red?")
            await window.press("#question", "Enter")
            await expect(window.locator("#talk .said").last).to_have_text(ANSWER)
            await expect(window.locator("details.request")).to_have_count(len(prompts) + 1)
            await window.click("details.request:first-child summary")
            await expect(window.locator("details.request:first-child .step").nth(4)).to_be_attached()
            assert "first token" in await window.inner_text("#chat-rate")
            assert await window.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
            back = await window.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == (scheme == "dark")
            await shot(window, tmp_path, f"dashboard-{size}-{scheme}")
            assert complaints == []


@browser
async def test_the_page_asks_for_a_key_and_chats_with_it(tmp_path: Path) -> None:
    async with cluster(tmp_path / "model", say("hello there"), api_keys=(KEY,)) as made:
        async with seen(made, 800, 600, "light") as (window, _):
            await window.wait_for_selector("#key-dialog[open]")
            await window.fill("#key", "sk-wrong")
            await window.press("#key", "Enter")
            await window.wait_for_selector("#key-wrong:not([hidden])")
            await window.fill("#key", KEY)
            await window.press("#key", "Enter")
            await window.wait_for_selector("#health.good")
            await window.fill("#question", "hi")
            await window.click("#send")
            await expect(window.locator("#talk .said").last).to_have_text("hello there")


@browser
async def test_the_page_says_when_the_router_is_gone_and_recovers_with_the_theme_kept(tmp_path: Path) -> None:
    async with cluster(tmp_path / "model", say("hi")) as made, seen(made, 800, 600, "light") as (window, _):
        await window.wait_for_selector("#health.good")
        await window.click("#theme")
        await window.click("#theme")
        assert await window.evaluate("document.documentElement.dataset.theme") == "dark"
        await window.route("**/dashboard/data*", lambda route: route.abort())
        await window.wait_for_selector("#notice:not([hidden])")
        await window.unroute("**/dashboard/data*")
        await window.wait_for_selector("#health.good")
        assert await window.locator("#notice").is_hidden()
        await window.reload()
        assert await window.evaluate("document.documentElement.dataset.theme") == "dark"
