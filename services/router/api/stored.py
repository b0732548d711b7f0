"""What the router keeps with the controllers for one owner, as JSON documents; and errors of what is not there."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from common.errors import InternalError, InvalidRequestError
from common.rpc.codec.objects import ObjectKey, StoredObject
from common.rpc.objects import ObjectClient
from services.router.errors import MissingError

NAMES = {"response": "Response", "file": "File", "batch": "Batch"}


class Document(NamedTuple):
    key: ObjectKey
    content: dict[str, Any]
    stored: StoredObject


async def load(objects: ObjectClient, key: ObjectKey, param: str = "id") -> Document:
    found = await objects.find(key) if _may_exist(key.id) else None
    if found is None:
        raise MissingError(f"{NAMES[key.kind]} with id '{key.id[:128]}' not found.", param=param)
    return Document(key, content_of(found), found)


def content_of(stored: StoredObject) -> dict[str, Any]:
    try:
        content = orjson.loads(stored.data)
    except orjson.JSONDecodeError as error:
        raise InternalError(f"stored object {stored.id} cannot be read") from error
    assert isinstance(content, dict)
    return content


def _may_exist(id_: str) -> bool:
    """Ids that no object of ours can have need not be asked for."""
    return 0 < len(id_) <= 128 and all(char.isascii() and (char.isalnum() or char in "_-.") for char in id_)


async def remove(objects: ObjectClient, key: ObjectKey) -> None:
    """Raises `MissingError` if there was none."""
    if not _may_exist(key.id) or not await objects.delete(key):
        raise MissingError(f"{NAMES[key.kind]} with id '{key.id[:128]}' not found.", param="id")


async def page(
    objects: ObjectClient, kind: str, owner: str, query: dict[str, str], largest: int
) -> tuple[list[Document], bool]:
    """The page that `after` and `limit` of a query ask for, newest first, and whether there are more."""
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= largest):
        raise InvalidRequestError(f"limit must be between 1 and {largest}", param="limit")
    after = query.get("after", "")
    if after and not _may_exist(after):
        raise MissingError(f"{NAMES[kind]} with id '{after[:128]}' not found.", param="after")
    found = await objects.page(kind, owner, after=after, limit=min(int(limit), 100))
    documents = [Document(ObjectKey(kind, owner, stored.id), content_of(stored), stored) for stored in found.objects]
    return documents, found.has_more
