"""What the router keeps with the controllers for one owner, as JSON documents; and errors of what is not there."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple

import orjson

from common.errors import InternalError, InvalidRequestError, NanoDeployError, NotFoundError
from common.rpc.codec.objects import ObjectKey, StoredObject
from common.rpc.objects import ObjectClient
from services.router.errors import MissingError

LISTED: Final = 100  # at most, by the controllers

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


@contextlib.asynccontextmanager
async def whole_or_none(objects: ObjectClient, key: ObjectKey) -> AsyncIterator[None]:
    """What is written in several steps: an object whose later ones fail is removed, and takes no room."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(NanoDeployError):
            await objects.delete(key)
        raise


async def remove(objects: ObjectClient, key: ObjectKey) -> None:
    """Raises `MissingError` if there was none."""
    if not _may_exist(key.id) or not await objects.delete(key):
        raise MissingError(f"{NAMES[key.kind]} with id '{key.id[:128]}' not found.", param="id")


async def page(
    objects: ObjectClient,
    kind: str,
    owner: str,
    query: dict[str, str],
    largest: int,
    wanted: Callable[[dict[str, Any]], bool] | None = None,
) -> tuple[list[Document], bool]:
    """The page that `after` and `limit` of a query ask for, newest first, and whether there are more.

    `wanted`: all other documents are passed over, however many stand in between.
    """
    limit, after = min(limit_of(query, largest), LISTED), query.get("after", "")
    if wanted is None:
        return await _listed(objects, kind, owner, after, limit)
    documents: list[Document] = []
    more = True
    while more and len(documents) <= limit:
        found, more = await _listed(objects, kind, owner, after, LISTED)
        documents += [document for document in found if wanted(document.content)]
        after = found[-1].key.id if found else after
    return documents[:limit], len(documents) > limit


def limit_of(query: dict[str, str], largest: int) -> int:
    asked = query.get("limit", "20")
    if not (asked.isascii() and asked.isdigit() and 1 <= int(asked[:6]) <= largest):
        raise InvalidRequestError(f"limit must be between 1 and {largest}", param="limit")
    return int(asked)


async def _listed(objects: ObjectClient, kind: str, owner: str, after: str, limit: int) -> tuple[list[Document], bool]:
    try:
        found = await objects.page(kind, owner, after=after, limit=limit) if not after or _may_exist(after) else None
    except NotFoundError:
        found = None
    if found is None:
        raise MissingError(f"{NAMES[kind]} with id '{after[:128]}' not found.", param="after")
    made = [Document(ObjectKey(kind, owner, stored.id), content_of(stored), stored) for stored in found.objects]
    return made, found.has_more
