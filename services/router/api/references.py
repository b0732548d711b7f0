"""`item_reference` in an input: an item of an earlier response's input or output, by the id that it is shown with.

An item's id holds that of its response, so the response is what is looked up. Ids that clients gave to items of their
inputs, and items of responses that were not stored, are found nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from common.errors import InvalidRequestError
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient
from services.router.api.stored import load
from services.router.api.translate import string
from services.router.errors import MissingError

KIND: Final = "response"
MAX_REFERRED: Final = 256  # responses, each of which is read
_ID: Final = re.compile(r"[a-z]+_([0-9a-f]{32})[0-9a-f]{2,6}")

Item = dict[str, Any]


async def with_referred(objects: ObjectClient, owner: str, items: Sequence[Item]) -> list[Item]:
    """The items, with those that are meant in place of references. Raises `MissingError` that names the first lost."""
    made = list(items)
    places: dict[str, list[int]] = {}  # of references, by their response
    for place, item in enumerate(items):
        if _refers(item):
            id_ = string(item, "id", f"input[{place}]")
            found = _ID.fullmatch(id_)
            if found is None:
                raise _missing(id_, place)
            places.setdefault(f"resp_{found[1]}", []).append(place)
    if len(places) > MAX_REFERRED:
        raise InvalidRequestError(
            f"input refers to items of {len(places)} responses; the limit is {MAX_REFERRED}", param="input"
        )
    for response_id, of_response in places.items():
        there = await _items_of(objects, ObjectKey(KIND, owner, response_id))
        for place in of_response:
            id_ = items[place]["id"]
            if id_ not in there:
                raise _missing(id_, place)
            made[place] = there[id_]
    return made


def shown(response_id: str, items: Sequence[Item]) -> list[Item]:
    """Items of a response's input, each with an id and a type."""
    ids = response_id.partition("_")[2]
    return [
        {**item, "id": item.get("id") or f"item_{ids}{i:02x}", "type": item.get("type") or "message"}
        for i, item in enumerate(items)
    ]


def _refers(item: Item) -> bool:
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "id" in item and not item.keys() - {"type", "id"})


async def _items_of(objects: ObjectClient, key: ObjectKey) -> dict[str, Item]:
    try:
        content = (await load(objects, key)).content
    except MissingError:
        return {}
    return {item["id"]: item for item in (*shown(key.id, content["items"]), *content["response"]["output"])}


def _missing(id_: str, place: int) -> MissingError:
    return MissingError(
        f"Item with id '{id_[:128]}' not found: it is none of a stored response's.", param=f"input[{place}].id"
    )
