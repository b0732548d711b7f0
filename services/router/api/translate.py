"""What translations into a chat body share: building it, and naming the caller's own fields in its errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ValidationError

from common.errors import InvalidRequestError, NanoDeployError, UnsupportedError
from services.router.errors import error_body, validation_error
from services.router.schemas import ChatBody


def chat_body(fields: dict[str, Any]) -> ChatBody:
    """Of fields that are not None."""
    try:
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise validation_error(error) from None


def renamed(names: Mapping[str, str]) -> Callable[[NanoDeployError], NanoDeployError]:
    """Errors about a chat body, told in the caller's terms: `names` maps its fields to the caller's."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b(?:\[\d+\][\w.\[\]]*)?")

    def tell(error: NanoDeployError) -> NanoDeployError:
        head = re.match(r"\w+", error.param)
        if head is None or head[0] not in names:
            return error
        name = names[head[0]]
        message = pattern.sub(name, error.message, count=1)
        told = type(error)(message, param=name)
        told.__cause__ = error
        return told

    return tell


def openai_shape(names: Mapping[str, str]) -> Callable[[NanoDeployError], bytes]:
    tell = renamed(names)
    return lambda error: error_body(tell(error))


def text_of(content: Any, where: str, kinds: tuple[str, ...]) -> str:
    """Content that is a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where} must be a string or a list of text parts", param=where)
    return "\n".join(_text_part(part, f"{where}[{i}]", kinds) for i, part in enumerate(content))


def _text_part(part: Any, where: str, kinds: tuple[str, ...]) -> str:
    kind = kind_of(part, where)
    if kind not in kinds:
        raise unsupported(where, kind)
    return string(part, "text", where)


def kind_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{where} must be an object with a type", param=where)
    return kind


def known(part: Mapping[str, Any], names: Collection[str], where: str) -> None:
    for name in part:
        if name not in names:
            place = f"{where}.{name[:64]}"
            raise InvalidRequestError(f"Unrecognized request argument supplied: {place}", param=place)


def string(part: Mapping[str, Any], key: str, where: str) -> str:
    value = part.get(key)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.{key} must be a string", param=f"{where}.{key}")
    return value


def unsupported(where: str, kind: str) -> UnsupportedError:
    return UnsupportedError(f"{where}.type {kind[:64]!r} is not supported", param=f"{where}.type")
