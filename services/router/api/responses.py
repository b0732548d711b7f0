"""`/v1/responses`: create, whole, streamed or in the background; get, delete, cancel, and the items of its input.

    create -> answered, and stored for a while unless `store` is false
    create(background) -> stored as queued -> in_progress -> completed | incomplete | failed | cancelled

A stored response is a document: the response, its input's items, and the chat messages up to its end, from which the
next one goes on. A background response is held (claimed) by the router that runs it; when that router is gone the
claim runs out, and the response is shown as failed. While no controller answers, responses are answered and not
stored: they say `"store": false`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import Any, Final

from common.errors import (
    InternalError,
    InvalidRequestError,
    NanoDeployError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    UnsupportedError,
)
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient
from common.telemetry import get_logger
from common.types import Clock
from services.router.api.files import listed
from services.router.api.local import LocalExchange
from services.router.api.references import KIND, shown, with_referred
from services.router.api.response_events import ResponseEvents, ResponseStyle, failure
from services.router.api.response_items import FIELDS, items_of, messages_of, to_chat
from services.router.api.schemas import ResponsesBody
from services.router.api.stored import LISTED, Document, limit_of, load, remove
from services.router.api.translate import openai_shape, renamed
from services.router.errors import MissingError
from services.router.exchange import Exchange
from services.router.gateway import Gateway
from services.router.params import chat_job
from services.router.replies import dumps

CLAIM_S: Final = 15.0
RENEW_S: Final = 4.0  # several tries before a claim runs out; also how soon a cancel from elsewhere is heard
KEEP_S: Final = 600.0
MAX_BACKGROUND: Final = 256
_ENDED: Final = ("completed", "incomplete", "failed", "cancelled")

_log = get_logger(__name__)


class Keeper(ResponseStyle):
    """A style that stores what was answered."""

    def __init__(self, responses: Responses, body: ResponsesBody, owner: str, items: list[Any], so_far: list[Any]):
        super().__init__(frame_of(body))
        self._responses = responses
        self._stores = body.store is not False
        self._owner = owner
        self._items = items
        self._so_far = so_far

    async def keep(self, events: ResponseEvents) -> None:
        if self._stores and not await self._responses.store(self._owner, events.response, self._items, self._so_far):
            events.response["store"] = False


class Responses:
    def __init__(self, gateway: Gateway, objects: ObjectClient, *, ttl_s: int, clock: Clock) -> None:
        self._gateway = gateway
        self._objects = objects
        self._ttl_s = ttl_s
        self._clock = clock
        self._holder = f"router-{secrets.token_hex(8)}"
        self._running: dict[str, asyncio.Task[None]] = {}

    # -- create --

    async def create(self, exchange: Exchange) -> None:
        exchange.shape = openai_shape(FIELDS)
        with self._gateway.admitted():
            started_s = self._clock.now()
            body = await self._gateway.body(exchange, ResponsesBody)
            _check_shown(body)
            items = await with_referred(self._objects, exchange.owner, items_of(body))
            before = await self._before(body, exchange.owner)
            so_far = [*before, *messages_of(items)]
            if body.background:
                await exchange.answer(200, dumps(await self._begin(body, exchange, items, so_far)))
                return
            style = Keeper(self, body, exchange.owner, items, so_far)
            await self._gateway.serve(exchange, to_chat(body, so_far), chat_job, style, started_s)

    async def _before(self, body: ResponsesBody, owner: str) -> list[Any]:
        """The conversation up to the response that this one follows."""
        if body.previous_response_id is None:
            return []
        document = await load(self._objects, self._key(owner, body.previous_response_id), "previous_response_id")
        if document.content["response"]["status"] not in ("completed", "incomplete"):
            raise InvalidRequestError("the previous response is not completed", param="previous_response_id")
        return list(document.content["messages"])

    async def store(self, owner: str, response: dict[str, Any], items: list[Any], so_far: list[Any]) -> bool:
        """False, and a line in the log, if it could not be stored."""
        messages = so_far + messages_of(response["output"])
        document = dumps({"response": response, "items": items, "messages": messages})
        try:
            await self._objects.put(self._key(owner, response["id"]), document, ttl_s=self._ttl_s)
        except NanoDeployError as error:
            _log.warning("response not stored", id=response["id"], error=error.message)
            return False
        return True

    # -- in the background --

    async def _begin(
        self, body: ResponsesBody, exchange: Exchange, items: list[Any], so_far: list[Any]
    ) -> dict[str, Any]:
        """Store it as queued and start it. Raises what is wrong with the request before that."""
        if body.stream or body.store is False:
            raise InvalidRequestError("a background response is stored and not streamed", param="background")
        if len(self._running) >= MAX_BACKGROUND:
            raise OverloadedError(f"{MAX_BACKGROUND} responses run in the background already")
        name, _ = self._gateway.resolve(body.model)
        chat = to_chat(body, so_far)
        id_ = f"resp_{secrets.token_hex(16)}"
        style = ResponseStyle(frame_of(body), id_)
        local = LocalExchange(b"", exchange.traceparent, exchange.caller)
        local.request_id = exchange.request_id
        response = {
            "id": id_,
            "object": "response",
            "created_at": int(time.time()),
            "status": "queued",
            "error": None,
            "incomplete_details": None,
            "model": name,
            "output": [],
            "usage": None,
            **style.frame,
        }
        key = self._key(exchange.owner, id_)
        document = {"response": response, "items": items, "messages": so_far}
        await self._objects.put(key, dumps(document), ttl_s=self._ttl_s, expected_version=0)
        await self._objects.claim(key, self._holder, CLAIM_S)

        async def work() -> None:
            with self._gateway.admitted():
                await self._gateway.serve(local, chat, chat_job, style, self._clock.now())

        task = asyncio.create_task(self._follow(key, document, style, local, asyncio.create_task(work())))
        self._running[id_] = task
        task.add_done_callback(lambda _: self._running.pop(id_, None))
        return response

    async def _follow(
        self,
        key: ObjectKey,
        document: dict[str, Any],
        style: ResponseStyle,
        local: LocalExchange,
        work: asyncio.Task[None],
    ) -> None:
        """Run it to its end and store that, unless somebody has cancelled it meanwhile."""
        version, response = 1, document["response"]
        try:
            response["status"] = "in_progress"
            begun = await self._objects.put(key, dumps(document), expected_version=version)
            version = begun.version
            if not begun.stored and not await self._still_wanted(key, version):
                return
            while not (await asyncio.wait({work}, timeout=RENEW_S))[0]:
                if not await self._still_wanted(key, version):
                    return
            work.result()
            assert style.events is not None
            response |= style.events.response | {"created_at": response["created_at"]}
            document["messages"] += messages_of(response["output"])
        except asyncio.CancelledError:
            response |= {"status": "cancelled"}
        except NanoDeployError as error:
            response |= {"status": "failed", "error": failure(renamed(FIELDS)(error))}
        except Exception:  # noqa: BLE001 - the edge of a task: it fails this response
            _log.exception("background response failed", id=key.id)
            response |= {"status": "failed", "error": failure(InternalError("internal error"))}
        finally:
            local.lose()
            work.cancel()
            await asyncio.wait({work})
        await self._keep_end(key, dumps(document), version)

    async def _keep_end(self, key: ObjectKey, document: bytes, version: int) -> None:
        """While no controller answers it is tried again: the answer is nowhere else."""
        until_s = self._clock.now() + KEEP_S
        while True:
            try:
                await self._objects.put(key, document, expected_version=version)
                await self._objects.claim(key, self._holder, 0)
                return
            except NanoDeployError as error:
                if isinstance(error, InvalidRequestError | NotFoundError) or self._clock.now() > until_s:
                    _log.warning("background response not stored", id=key.id, error=error.message)
                    return
                _log.info("background response not stored yet", id=key.id, error=error.message)
            await asyncio.sleep(RENEW_S)

    async def _still_wanted(self, key: ObjectKey, version: int) -> bool:
        try:
            if not await self._objects.claim(key, self._holder, CLAIM_S):
                return False
            found = await load(self._objects, key)
            return found.stored.version == version and found.content["response"]["status"] != "cancelled"
        except NotFoundError:
            return False
        except NanoDeployError:
            return True  # no controller now; the next round asks again

    # -- stored ones --

    async def get(self, exchange: Exchange) -> None:
        if exchange.query().get("stream") == "true":
            raise UnsupportedError("a stored response is not streamed again", param="stream")
        document = await self._load(exchange)
        await exchange.answer(200, dumps(document.content["response"]))

    async def delete(self, exchange: Exchange) -> None:
        id_ = exchange.path("response_id")
        if (task := self._running.get(id_)) is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=RENEW_S)
        await remove(self._objects, self._key(exchange.owner, id_))
        await exchange.answer(200, dumps({"id": id_, "object": "response", "deleted": True}))

    async def cancel(self, exchange: Exchange) -> None:
        document = await self._load(exchange)
        response = document.content["response"]
        if not response.get("background"):
            raise InvalidRequestError("Cannot cancel a response that does not run in the background.", param="id")
        if response["status"] not in _ENDED:
            response["status"] = "cancelled"
            written = await self._objects.put(
                document.key, dumps(document.content), expected_version=document.stored.version
            )
            if not written.stored:  # it moved on: what it is now is the answer, or it is cancelled in its new state
                if document.stored.version + 1 < written.version:
                    raise UnavailableError("the response changed meanwhile, try again")
                await self.cancel(exchange)
                return
            if (task := self._running.get(document.key.id)) is not None:
                task.cancel()
        await exchange.answer(200, dumps(response))

    async def input_items(self, exchange: Exchange) -> None:
        document, query = await self._load(exchange), exchange.query()
        limit, after = limit_of(query, LISTED), query.get("after")
        made = shown(document.key.id, document.content["items"])
        items = made if query.get("order") == "asc" else made[::-1]
        if after is not None:
            place = next((i for i, item in enumerate(items) if item["id"] == after), None)
            if place is None:
                raise MissingError(f"Item with id '{after[:128]}' not found.", param="after")
            items = items[place + 1 :]
        await exchange.answer(200, dumps(listed(items[:limit], len(items) > limit)))

    async def _load(self, exchange: Exchange) -> Document:
        document = await load(self._objects, self._key(exchange.owner, exchange.path("response_id")))
        response = document.content["response"]
        if response["status"] not in _ENDED and not document.stored.holder:
            response |= {"status": "failed", "error": failure(InternalError("the router that ran it is gone"))}
        return document

    @staticmethod
    def _key(owner: str, id_: str) -> ObjectKey:
        return ObjectKey(KIND, owner, id_)

    async def close(self) -> None:
        """Background responses end as cancelled."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        if running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await asyncio.gather(*running, return_exceptions=True)


def frame_of(body: ResponsesBody) -> dict[str, Any]:
    """What the request says of the response."""
    return {
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _check_shown(body: ResponsesBody) -> None:
    """What is shown again, or stored, is written as JSON with integers of 64 bits."""
    for name, value in {"input": body.input, **frame_of(body)}.items():
        try:
            dumps(value)
        except TypeError as error:
            raise InvalidRequestError(f"{name} cannot be used: {error}", param=name) from None
