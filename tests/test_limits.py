"""Keys and limits from end to end: storage, controller, routers over real gRPC and HTTP, and what dies between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import router_support as support
from limits_support import KEY, TOKEN, Ticking, ask, key
from redis_support import RedisServer, binaries, fresh_namespace, run_redis

from common.config import ControllerConfig
from common.errors import InvalidRequestError, NotFoundError, UnauthenticatedError, UnavailableError
from common.rpc.codec.objects import ObjectKey
from common.rpc.limits import LimitsClient
from common.rpc.objects import ObjectClient
from common.rpc.server import RpcServer
from common.types.keys import Want, hashed_key
from services.controller.app import Controller
from services.router.admission.callers import Callers
from services.router.admission.limiter import Limiter
from services.router.api import batch_runner
from services.router.replies import dumps

BODY: dict[str, Any] = {"prompt": "abc", "max_tokens": 4}


@pytest.fixture(scope="module", params=sorted(binaries()))
def server(request: Any) -> Iterator[RedisServer]:
    with run_redis(request.param) as running:
        yield running


@pytest.fixture(scope="module")
def valkey() -> Iterator[RedisServer]:
    with run_redis() as running:
        yield running


@asynccontextmanager
async def controller(server: RedisServer, namespace: str = "", **config: Any) -> AsyncIterator[Controller]:
    settings = {"admin_token": TOKEN, "port": 0, "http_port": 0, "redis_url": server.url, **config}
    running = Controller(ControllerConfig(namespace=namespace or fresh_namespace(), **settings))
    await running.start()
    try:
        yield running
    finally:
        await running.stop(0.1)


@asynccontextmanager
async def limits(server: RedisServer) -> AsyncIterator[LimitsClient]:
    async with controller(server) as running:
        client = LimitsClient(["127.0.0.1:9", f"127.0.0.1:{running.port}"], TOKEN)  # the first is never there
        try:
            yield client
        finally:
            await client.close()


# -- the controller --


async def test_the_admin_token_guards_every_call(server: RedisServer) -> None:
    async with controller(server) as running, controller(server, admin_token="") as without:
        for port, token in ((running.port, ""), (running.port, "wrong"), (without.port, ""), (without.port, TOKEN)):
            client = LimitsClient([f"127.0.0.1:{port}"], token)
            for call in (
                client.list_keys(),
                client.put_keys([key()]),
                client.revoke_key("abcd"),
                client.lease("r", [ask(key())]),
            ):
                with pytest.raises(UnauthenticatedError):
                    await call
            await client.close()


async def test_keys_are_added_listed_and_revoked(server: RedisServer) -> None:
    async with limits(server) as client:
        empty = await client.list_keys()
        assert empty.keys == ()
        mine, other = key(name="mine", quota_tokens=100, priority=-3), key("else", tenant="team")
        assert await client.put_keys([mine, other]) == 2
        assert await client.put_keys([mine]) == 0
        table = await client.list_keys()
        assert {k.key_hash: k.name for k in table.keys or ()} == {mine.key_hash: "mine", other.key_hash: ""}
        assert {k.tenant for k in table.keys or ()} == {mine.key_hash[:12], "team"}
        assert (await client.list_keys(table.incarnation, table.revision)).keys is None
        assert (await client.revoke_key(other.key_id)).revoked
        again = await client.list_keys(table.incarnation, table.revision)
        assert {k.key_hash: k.revoked for k in again.keys or ()} == {mine.key_hash: False, other.key_hash: True}
        for wrong, error in (("0000", NotFoundError), ("x", InvalidRequestError), ("*", InvalidRequestError)):
            with pytest.raises(error):
                await client.revoke_key(wrong)
        with pytest.raises(InvalidRequestError, match="tenant"):
            await client.put_keys([key("third", tenant="a b")])


async def test_what_is_put_back_keeps_revocations_and_use(server: RedisServer) -> None:
    async with limits(server) as client:
        await client.put_keys([key(quota_tokens=1000, used_tokens=10)])
        await client.put_keys([key(quota_tokens=9999, used_tokens=400, revoked=True)])
        await client.put_keys([key(used_tokens=5)])
        (found,) = (await client.list_keys()).keys or ()
        assert (found.quota_tokens, found.used_tokens, found.revoked) == (1000, 400, True)


async def test_slices_of_a_rate_add_up_to_the_limit(server: RedisServer) -> None:
    async with limits(server) as client:
        mine = key(requests_per_minute=60, tokens_per_minute=6000)
        await client.put_keys([mine])
        granted = 0
        for router in ("a", "b", "a", "b"):
            (lease,) = await client.lease(router, [ask(mine, requests=Want(1, 25))])
            granted += lease.requests.granted
        assert 60 <= granted <= 62, "all there was, and what came meanwhile"
        assert lease.num_routers == 2
        (lease,) = await client.lease("a", [ask(mine, requests=Want(30, 30), tokens=Want(6000, 6000))])
        assert lease.requests.granted == 0
        assert 20_000 < lease.requests.wait_ms <= 30_000
        assert lease.tokens.granted == 6000
        await client.lease("a", [ask(mine, requests=Want(give_back=20), tokens=Want(give_back=9000))])
        (lease,) = await client.lease("b", [ask(mine, requests=Want(20, 20), tokens=Want(6000, 9000))])
        assert (lease.requests.granted, lease.tokens.granted) == (20, 6000), "never more than a minute's"


async def test_a_quota_is_spent_once(server: RedisServer) -> None:
    async with limits(server) as client:
        mine, free = key(quota_tokens=1000), key("free")
        await client.put_keys([mine, free])
        grants = [(await client.lease(r, [ask(mine, quota=Want(1, 400))]))[0].quota.granted for r in "abcd"]
        assert grants == [400, 400, 200, 0]
        await client.lease("a", [ask(mine, quota=Want(give_back=150)), ask(free, spent_tokens=77)])
        table = {k.key_hash: k.used_tokens for k in (await client.list_keys()).keys or ()}
        assert table == {mine.key_hash: 850, free.key_hash: 77}
        await client.revoke_key(mine.key_id)
        assert await client.lease("a", [ask(mine, quota=Want(1, 1))]) == []
        assert await client.lease("a", [ask(key("unknown"), quota=Want(1, 1))]) == []


async def test_a_call_that_is_heard_again_counts_once(server: RedisServer) -> None:
    """By its router and number, until the router has all answers up to it; at whichever controller."""
    async with limits(server) as client:
        mine = key(quota_tokens=2**48, requests_per_minute=10)
        await client.put_keys([mine])
        wanted = ask(mine, quota=Want(1, 2**47 + 1), requests=Want(1, 1), spent_tokens=3)
        first = await client.lease("a", [wanted], number=1, oldest=1)
        assert first[0].quota.granted == 2**47 + 1
        for _ in range(2):
            assert await client.lease("a", [wanted], number=1, oldest=1) == first
        assert (await client.lease("b", [ask(mine, quota=Want(1, 5))], number=1, oldest=1))[0].quota.granted == 5
        await client.lease("a", [ask(mine, quota=Want(give_back=2**47))], number=2, oldest=1)
        await client.lease("a", [ask(mine, quota=Want(give_back=2**47))], number=2, oldest=2)
        (found,) = (await client.list_keys()).keys or ()
        assert found.used_tokens == 1 + 3 + 5
        assert await client.lease("a", [], number=3, oldest=3) == await client.lease("a", [], number=3, oldest=3) == []
        again = await client.lease("a", [wanted], number=1, oldest=1)  # long known to have been answered
        assert again[0].quota.granted == 2**47 + 1
        (found,) = (await client.list_keys()).keys or ()
        assert found.used_tokens == 1 + 3 + 5 + 2**47 + 1 + 3


# -- a router's part, without time of its own --


async def test_a_quota_that_was_spent_without_a_controller_is_spent(server: RedisServer) -> None:
    clock, namespace = Ticking(), fresh_namespace()
    async with controller(server, namespace) as running:
        address = f"127.0.0.1:{running.port}"
        client = LimitsClient([address], TOKEN)
        await client.put_keys([key(quota_tokens=1_000_000)])
        callers = Callers((), admin_token=TOKEN)
        limiter = Limiter(callers, LimitsClient([address], TOKEN), "router", clock)
        await limiter.start(5.0)
        caller = callers.caller([(b"authorization", f"Bearer {KEY}".encode())])
        assert await limiter.charge(caller, 10, 500) == 500
        await client.close()
    await support.until(lambda: not limiter.following)
    for _ in range(30):
        limiter.settle(caller, await limiter.charge(caller, 10, 1000), 900)
    async with controller(server, namespace, port=running.port):
        await support.until(lambda: limiter.following)
        clock.t += 60.0  # the key is idle: what it holds goes back
        await limiter.stop()
        client = LimitsClient([address], TOKEN)
        (found,) = (await client.list_keys()).keys or ()
        assert found.used_tokens == 500 + 30 * 900
        await client.close()


async def test_a_storage_that_stalls_counts_each_lease_once(valkey: RedisServer) -> None:
    """It carries out what nobody waits for any more: at one controller, and at the next, which was asked too."""
    clock, namespace = Ticking(), fresh_namespace()
    async with controller(valkey, namespace) as one, controller(valkey, namespace) as other:
        addresses = [f"127.0.0.1:{one.port}", f"127.0.0.1:{other.port}"]
        client = LimitsClient(addresses, TOKEN)
        await client.put_keys([key(quota_tokens=1_000_000)])
        callers = Callers((), admin_token=TOKEN)
        for address in addresses:  # the storage knows the script from now on
            single = LimitsClient([address], TOKEN)
            await single.lease("router", [])
            await single.close()
        limiter = Limiter(callers, LimitsClient(addresses, TOKEN), "router", clock)
        await limiter.start(5.0)
        caller = callers.caller([(b"authorization", f"Bearer {KEY}".encode())])
        with valkey.stalled():
            limiter.settle(caller, await limiter.charge(caller, 10, 3000), 2500)
        await support.until(lambda: limiter.following)
        clock.t += 60.0
        await limiter.stop()
        (found,) = (await client.list_keys()).keys or ()
        assert found.used_tokens == 2500
        await client.close()


# -- all of it --


@asynccontextmanager
async def gateway(folder: Path, *addresses: str, **config: Any) -> AsyncIterator[support.Cluster]:
    settings = {"admin_token": TOKEN, "controllers": addresses, **config}
    async with support.cluster(folder, support.say("hello"), **settings) as made:
        await support.until(lambda: made.router.gateway.callers.known)
        yield made


async def known(made: support.Cluster, secret: str = KEY, *, good: bool = True) -> None:
    """Wait until the router has heard of a key, or of its end."""
    await support.until(lambda: made.router.gateway.callers.closed)
    async with asyncio.timeout(5):
        while ((await ask_models(made, secret)).status_code == 200) != good:  # noqa: ASYNC110 - the answer has no event
            await asyncio.sleep(0.05)


async def ask_models(made: support.Cluster, secret: str) -> httpx.Response:
    return await made.http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"})


async def complete(made: support.Cluster, secret: str = KEY, **change: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {secret}"}
    return await made.http.post("/v1/completions", json=BODY | change, headers=headers)


async def test_a_key_from_creation_to_revocation(valkey: RedisServer, tmp_path: Path) -> None:
    async with controller(valkey) as running, gateway(tmp_path, f"127.0.0.1:{running.port}") as made:
        client = LimitsClient([f"127.0.0.1:{running.port}"], TOKEN)
        assert (await made.post("/v1/completions", **BODY)).status_code == 200, "open while there is no key"
        await client.put_keys([key(requests_per_minute=3, tokens_per_minute=10_000, tenant="team")])
        await known(made)
        assert (await made.post("/v1/completions", **BODY)).status_code == 401
        answer = await complete(made)
        assert answer.status_code == 200
        found = {name: answer.headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset")}
        assert found == {"limit": "3", "remaining": "2", "reset": "20s"}
        assert answer.headers["x-ratelimit-limit-tokens"] == "10000"
        assert [(await complete(made)).status_code for _ in range(2)] == [200, 200]
        for _ in range(3):
            answer = await complete(made)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 20
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        await client.revoke_key(key().key_id)
        await known(made, good=False)
        assert (await made.post("/v1/completions", **BODY)).status_code == 401, "closed once there was a key"
        await client.close()


async def test_tokens_are_settled_and_quotas_end(valkey: RedisServer, tmp_path: Path) -> None:
    async with controller(valkey) as running, gateway(tmp_path, f"127.0.0.1:{running.port}") as made:
        client = LimitsClient([f"127.0.0.1:{running.port}"], TOKEN)
        await client.put_keys([key(quota_tokens=20), key("sk-rate", tokens_per_minute=600)])
        await known(made)
        statuses = []
        while not statuses or (statuses[-1] == 200 and len(statuses) < 20):
            answer = await complete(made, max_tokens=4)
            statuses.append(answer.status_code)
        total = 3 + 4  # "abc" and four tokens
        assert statuses == [200] * -(-20 // total) + [429]
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("insufficient_quota", "insufficient_quota")
        assert "retry-after" not in answer.headers, "asking again does not help"
        await complete(made, "sk-rate", max_tokens=200)  # ends after five
        meters = made.router.gateway.callers.caller([(b"authorization", b"Bearer sk-rate")]).meters
        assert meters is not None
        assert meters.tokens is not None
        assert meters.tokens.remaining >= 600 - 3 - 6
        answer = await complete(made, "sk-rate", prompt="x" * 601)
        assert answer.status_code in (400, 429)
        await client.close()


@pytest.mark.parametrize(
    ("limit", "revoked", "status"), [({"quota_tokens": 30}, False, 429), ({"tokens_per_minute": 100}, True, 401)]
)
async def test_a_batch_whose_key_may_do_no_more_comes_to_its_end(
    valkey: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: dict[str, int],
    revoked: bool,
    status: int,
) -> None:
    """Its lines do not wait for what never comes, in slots that other batches need."""
    monkeypatch.setattr(batch_runner, "LOOK_S", 0.2)
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.1)
    prompts = ["abc", "x" * 90, "x" * 90] if revoked else ["abc"] * 8
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": BODY | {"model": support.MODEL, "prompt": prompt},
        }
        for number, prompt in enumerate(prompts)
    ]
    async with controller(valkey) as running, gateway(tmp_path, f"127.0.0.1:{running.port}") as made:
        keys = LimitsClient([f"127.0.0.1:{running.port}"], TOKEN)
        objects = ObjectClient([f"127.0.0.1:{running.port}"], TOKEN)
        await keys.put_keys([key(tenant="team", **limit)])
        await known(made)
        async with openai.AsyncOpenAI(base_url=f"{made.url}/v1", api_key=KEY, max_retries=0) as client:
            file = await client.files.create(file=("in.jsonl", b"\n".join(map(dumps, lines))), purpose="batch")
            begun = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
        if revoked:
            await support.until(lambda: bool(made.worker.entries))
            await keys.revoke_key(key().key_id)
        batch: dict[str, Any] = {}
        async with asyncio.timeout(15):
            while batch.get("status") != "completed":
                await asyncio.sleep(0.05)
                batch = json.loads((await objects.get(ObjectKey("batch", "team", begun.id))).data)
        counts = batch["request_counts"]
        assert counts["completed"] >= 1
        assert counts["completed"] + counts["failed"] == len(lines)
        error_file = ObjectKey("file", "team", batch["error_file_id"])
        parts = await objects.get_parts(error_file, await objects.list_parts(error_file))
        rows = [json.loads(row) for part in parts.values() for row in part.splitlines()]
        assert [row["response"]["status_code"] for row in rows] == [status] * counts["failed"]
        await objects.close()
        await keys.close()


async def test_two_routers_share_a_limit(valkey: RedisServer, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(controller(valkey))
        address = f"127.0.0.1:{running.port}"
        folders = [tmp_path / name for name in "ab"]
        routers = [await stack.enter_async_context(gateway(folder, address)) for folder in folders]
        client = LimitsClient([address], TOKEN)
        await client.put_keys([key(requests_per_minute=20)])
        for made in routers:
            await known(made)
        answers = await asyncio.gather(*(complete(routers[i % 2]) for i in range(60)))
        good = sum(answer.status_code == 200 for answer in answers)
        assert 20 <= good <= 22
        await client.close()


async def test_a_router_serves_on_without_its_controller(valkey: RedisServer, tmp_path: Path) -> None:
    namespace = fresh_namespace()
    async with AsyncExitStack() as stack:
        first = Controller(_config(valkey, namespace))
        await first.start()
        address = f"127.0.0.1:{first.port}"
        made = await stack.enter_async_context(gateway(tmp_path, address))
        client = LimitsClient([address], TOKEN)
        await client.put_keys([key(requests_per_minute=60, quota_tokens=100_000)])
        await known(made)
        assert (await complete(made)).status_code == 200
        await first.stop(0.1)
        answers = [(await complete(made)).status_code for _ in range(8)]
        assert answers == [200] * 8
        await support.until(lambda: not made.router.gateway.limiter.following)
        assert (await made.post("/v1/completions", **BODY)).status_code == 401
        burst = await asyncio.gather(*(complete(made) for _ in range(90)))
        statuses = {answer.status_code for answer in burst}
        assert statuses == {200, 429}, "the limit still holds"
        again = Controller(_config(valkey, namespace, port=first.port))
        await again.start()
        stack.push_async_callback(again.stop, 0.1)
        await support.until(lambda: made.router.gateway.limiter.following)
        await client.close()


async def test_a_storage_that_was_flushed_gets_its_keys_back(valkey: RedisServer, tmp_path: Path) -> None:
    async with controller(valkey) as running, gateway(tmp_path, f"127.0.0.1:{running.port}") as made:
        client = LimitsClient([f"127.0.0.1:{running.port}"], TOKEN)
        await client.put_keys([key(name="kept"), key("sk-old", revoked=True)])
        await known(made)
        valkey.command("FLUSHALL")
        assert (await made.post("/v1/completions", **BODY)).status_code == 401
        async with asyncio.timeout(5):
            while len((await client.list_keys()).keys or ()) < 2:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        table = {k.key_hash: (k.name, k.revoked) for k in (await client.list_keys()).keys or ()}
        assert table == {hashed_key(KEY): ("kept", False), hashed_key("sk-old"): ("", True)}
        assert (await complete(made)).status_code == 200
        assert (await ask_models(made, "sk-old")).status_code == 401
        await client.close()


async def test_a_router_that_never_heard_of_keys_says_so(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"admin_token": TOKEN, "controllers": ("127.0.0.1:9",)}
    async with support.cluster(tmp_path, support.say("hello"), **settings) as made:
        assert (await made.post("/v1/completions", **BODY)).status_code == 503
        ready = await made.http.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "API keys are not known yet")
        assert (await complete(made, TOKEN)).status_code == 200, "the admin token is a key"
        with pytest.raises(UnavailableError):
            await LimitsClient(["127.0.0.1:9"], TOKEN).list_keys()


async def test_a_controller_that_keeps_no_keys_stops_nothing(tmp_path: Path) -> None:
    """One of an older version."""
    old = RpcServer([], host="127.0.0.1", port=0)
    address = f"127.0.0.1:{await old.start()}"
    async with gateway(tmp_path, address) as made:
        assert (await made.post("/v1/completions", **BODY)).status_code == 200
    await old.drain(0)


def _config(server: RedisServer, namespace: str, port: int = 0) -> ControllerConfig:
    return ControllerConfig(admin_token=TOKEN, port=port, http_port=0, redis_url=server.url, namespace=namespace)
