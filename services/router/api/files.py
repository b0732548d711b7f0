"""`/v1/files`: input and output of batches. A file is a document and parts, kept with the controllers for a while."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from common.errors import InvalidRequestError, OverloadedError, UnsupportedError
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient
from services.router.api.stored import Document, load, page, remove, whole_or_none
from services.router.exchange import Exchange
from services.router.replies import dumps

KIND: Final = "file"
MAX_UPLOADS: Final = 4  # at once, each of them in memory
PART_BYTES: Final = 2**20
_PARTS_READ: Final = 8  # at once, while a file is sent
_MIN_TTL_S, _MAX_TTL_S = 3600, 2_592_000


class Files:
    def __init__(self, objects: ObjectClient, *, ttl_s: int, max_bytes: int) -> None:
        self.objects = objects
        self.ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._uploads = 0

    # -- endpoints --

    async def create(self, exchange: Exchange) -> None:
        if self._uploads >= MAX_UPLOADS:
            raise OverloadedError(f"{MAX_UPLOADS} files are being uploaded already")
        self._uploads += 1
        try:
            await exchange.answer(200, dumps(await self._create(exchange)))
        finally:
            self._uploads -= 1

    async def _create(self, exchange: Exchange) -> dict[str, Any]:
        form = await self._form(exchange)
        try:
            purpose = form.get("purpose")
            if purpose != "batch":
                raise InvalidRequestError("purpose must be 'batch': files are for batches here", param="purpose")
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise InvalidRequestError("file is required, as a file of a multipart form", param="file")
            content = await upload.read()
            ttl_s = _ttl(form, self.ttl_s)
            name = (upload.filename or "file.jsonl").encode(errors="replace").decode()  # by the form's own charset
        finally:
            await form.close()
        key = ObjectKey(KIND, exchange.owner, f"file-{secrets.token_hex(16)}")
        parts = {i: content[start : start + PART_BYTES] for i, start in enumerate(range(0, len(content), PART_BYTES))}
        async with whole_or_none(self.objects, key):
            made = await self.write(key.owner, key.id, name, "batch", ttl_s)
            await self.objects.put_parts(key, parts)
            made["bytes"], made["status"] = len(content), "processed"
            await self.objects.put(key, dumps(made))
        return made

    async def page(self, exchange: Exchange) -> None:
        query = exchange.query()
        if query.get("order", "desc") != "desc":
            raise UnsupportedError("order must be desc: files are listed newest first", param="order")
        purpose = query.get("purpose")
        wanted = None if purpose is None else lambda content: content["purpose"] == purpose
        documents, more = await page(self.objects, KIND, exchange.owner, query, 10_000, wanted)
        await exchange.answer(200, dumps(listed([d.content for d in documents], more)))

    async def get(self, exchange: Exchange) -> None:
        document = await self.load(exchange.owner, exchange.path("file_id"))
        await exchange.answer(200, dumps(document.content))

    async def delete(self, exchange: Exchange) -> None:
        id_ = exchange.path("file_id")
        await remove(self.objects, ObjectKey(KIND, exchange.owner, id_))
        await exchange.answer(200, dumps({"id": id_, "object": "file", "deleted": True}))

    async def content(self, exchange: Exchange) -> None:
        document = await self.load(exchange.owner, exchange.path("file_id"))
        await exchange.pour(b"application/octet-stream", document.content["bytes"], self.read(document.key))

    # -- for batches --

    async def load(self, owner: str, id_: str, param: str = "file_id") -> Document:
        document = await load(self.objects, ObjectKey(KIND, owner, id_), param)
        if document.content["status"] != "processed":
            raise InvalidRequestError(f"File '{id_}' is not complete.", param=param)
        return document

    async def write(self, owner: str, id_: str, name: str, purpose: str, ttl_s: int) -> dict[str, Any]:
        """The document of a file without content yet."""
        now = int(time.time())
        made = {
            "id": id_,
            "object": "file",
            "bytes": 0,
            "created_at": now,
            "expires_at": now + ttl_s,
            "filename": name[:256],
            "purpose": purpose,
            "status": "uploaded",
        }
        await self.objects.put(ObjectKey(KIND, owner, id_), dumps(made), ttl_s=ttl_s)
        return made

    async def read(self, key: ObjectKey) -> AsyncIterator[bytes]:
        """The content, part by part."""
        numbers = await self.objects.list_parts(key)
        for start in range(0, len(numbers), _PARTS_READ):
            found = await self.objects.get_parts(key, numbers[start : start + _PARTS_READ])
            yield b"".join(found.values())

    async def _form(self, exchange: Exchange) -> FormData:
        content_type = exchange.header(b"content-type")
        if not content_type.startswith("multipart/form-data"):
            raise InvalidRequestError("the body must be a multipart form with file and purpose", param="file")
        body = await exchange.body(self._max_bytes + PART_BYTES)

        async def whole() -> AsyncIterator[bytes]:
            yield body

        headers = Headers({"content-type": content_type})
        try:
            form = await MultiPartParser(headers, whole(), max_files=1, max_fields=16).parse()  # type: ignore[arg-type]
        except (MultiPartException, FormParserError, KeyError, UnicodeError) as error:
            raise InvalidRequestError(f"the body is not a multipart form: {error}", param="file") from error
        upload = form.get("file")
        if isinstance(upload, UploadFile) and (upload.size or 0) > self._max_bytes:
            await form.close()
            raise InvalidRequestError(f"the file is larger than {self._max_bytes} bytes", param="file")
        return form


def listed(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": more, **ends}


def _ttl(form: FormData, longest: int) -> int:
    seconds = form.get("expires_after[seconds]")
    if seconds is None:
        return longest
    if form.get("expires_after[anchor]") not in (None, "created_at"):
        raise InvalidRequestError("expires_after.anchor must be created_at", param="expires_after")
    text = str(seconds)[:16]
    if not (text.isascii() and text.isdigit() and _MIN_TTL_S <= int(text) <= _MAX_TTL_S):
        raise InvalidRequestError(
            f"expires_after.seconds must be between {_MIN_TTL_S} and {_MAX_TTL_S}", param="expires_after"
        )
    return min(int(text), longest)
