"""`/v1/batches`: create, get, list, cancel. The work itself is `batch_runner`'s.

    validating -> in_progress -> finalizing -> completed
        `-> failed     |`-> cancelling -> cancelled
                       `-> (its window is over) expired

A batch is two stored objects: its document, which clients see, and its work, a queue entry that goes when the batch
has ended. The work's holder runs the batch, its parts are the results by line.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from common.errors import InvalidRequestError, UnavailableError
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient
from services.router.api.files import Files, listed
from services.router.api.schemas import BatchBody
from services.router.api.stored import Document, load, page, whole_or_none
from services.router.exchange import Exchange
from services.router.gateway import Gateway
from services.router.replies import dumps

KIND: Final = "batch"
WORK: Final = "batch-work"
ENDED: Final = ("completed", "failed", "expired", "cancelled")
MAX_WINDOW_H: Final = 336
_TRIES: Final = 8  # of a change to a document that others change too


class Batches:
    def __init__(self, gateway: Gateway, files: Files, objects: ObjectClient, wake: Callable[[], None]) -> None:
        self._gateway = gateway
        self._files = files
        self._objects = objects
        self._wake = wake

    async def create(self, exchange: Exchange) -> None:
        body = await self._gateway.body(exchange, BatchBody)
        window = re.fullmatch(r"(\d{1,3})h", body.completion_window)
        if window is None or not 1 <= int(window[1]) <= MAX_WINDOW_H:
            raise InvalidRequestError(
                f"completion_window must be a number of hours from 1h to {MAX_WINDOW_H}h", param="completion_window"
            )
        await self._files.load(exchange.owner, body.input_file_id, "input_file_id")
        now = int(time.time())
        batch: dict[str, Any] = {
            "id": f"batch_{secrets.token_hex(16)}",
            "object": "batch",
            "endpoint": body.endpoint,
            "errors": None,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + 3600 * int(window[1]),
            **dict.fromkeys(f"{state}_at" for state in ("in_progress", "finalizing", "cancelling", *ENDED)),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.metadata,
        }
        ttl_s = self._files.ttl_s
        kept_s = min(ttl_s, body.output_expires_after.seconds) if body.output_expires_after else ttl_s
        caller = exchange.caller
        work = {"owner": exchange.owner, "tenant": caller.tenant, "key_id": caller.key_id, "file_ttl_s": kept_s}
        key = self._key(exchange.owner, batch["id"])
        async with whole_or_none(self._objects, key):  # without its work nobody would run it
            await self._objects.put(key, dumps(batch), ttl_s=ttl_s, expected_version=0)
            await self._objects.put(work_key(batch["id"]), dumps(work), ttl_s=ttl_s, expected_version=0)
        self._wake()
        await exchange.answer(200, dumps(batch))

    async def get(self, exchange: Exchange) -> None:
        await exchange.answer(200, dumps((await self._load(exchange)).content))

    async def page(self, exchange: Exchange) -> None:
        documents, more = await page(self._objects, KIND, exchange.owner, exchange.query(), 100)
        await exchange.answer(200, dumps(listed([d.content for d in documents], more)))

    async def cancel(self, exchange: Exchange) -> None:
        """Its runner hears of it within seconds and ends it; lines that are done stay done."""

        def change(batch: dict[str, Any]) -> None:
            if batch["status"] in ENDED:
                raise InvalidRequestError(f"The batch is {batch['status']} and cannot be cancelled.", param="batch_id")
            if batch["status"] != "cancelling":
                batch |= {"status": "cancelling", "cancelling_at": int(time.time())}

        document = await self._load(exchange)
        batch = await change_document(self._objects, document.key, change)
        self._wake()
        await exchange.answer(200, dumps(batch))

    async def _load(self, exchange: Exchange) -> Document:
        return await load(self._objects, self._key(exchange.owner, exchange.path("batch_id")))

    @staticmethod
    def _key(owner: str, id_: str) -> ObjectKey:
        return ObjectKey(KIND, owner, id_)


def work_key(batch_id: str) -> ObjectKey:
    return ObjectKey(WORK, "", batch_id)


async def change_document(
    objects: ObjectClient, key: ObjectKey, change: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Read, change, write, and again where somebody else wrote in between."""
    for _ in range(_TRIES):
        document = await load(objects, key)
        change(document.content)
        written = await objects.put(key, dumps(document.content), expected_version=document.stored.version)
        if written.stored:
            return document.content
    raise UnavailableError("the batch changes too often, try again")
