"""Checks on what comes from outside. Each raises `InvalidRequestError` that names the field."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from common.errors import InvalidRequestError
from common.telemetry import parse_traceparent
from common.types.prefix import TOKEN_NBYTES

T = TypeVar("T")

HASH_NBYTES = 16
MAX_NAME_CHARS = 1024
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}")


def fail(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {message}", param=field)


def enum_value(table: Mapping[int, T], value: int, field: str) -> T:
    """The member a wire number stands for; unspecified and unknown numbers are refused."""
    try:
        return table[value]
    except KeyError:
        raise fail(field, "must be set" if value == 0 else f"has no value {value}") from None


def hash_bytes(value: bytes, field: str, *, may_be_empty: bool = False) -> bytes:
    if len(value) == HASH_NBYTES or (may_be_empty and not value):
        return value
    raise fail(field, f"must be {HASH_NBYTES} bytes, got {len(value)}")


def identifier(value: str, field: str) -> str:
    """A name that is safe in logs, metrics and keys: 1 to 128 letters, digits and _ . : -"""
    if _ID.fullmatch(value) is None:
        raise fail(field, f"must be 1 to 128 letters, digits, '_', '.', ':' or '-', got {value[:64]!r}")
    return value


def short_text(value: str, field: str) -> str:
    if len(value) > MAX_NAME_CHARS:
        raise fail(field, f"must be at most {MAX_NAME_CHARS} characters, got {len(value)}")
    return value


def address(value: str, field: str) -> str:
    """host:port, port 1 to 65535; an IPv6 host is in brackets."""
    host, colon, port = value.rpartition(":")
    if not (colon and host and len(value) <= 300 and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise fail(field, f"must be host:port, got {value[:64]!r}")
    return value


def at_least(value: int, low: int, field: str) -> int:
    if value < low:
        raise fail(field, f"must be at least {low}, got {value}")
    return value


def finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise fail(field, f"must be a finite number, got {value}")
    return value


def equal_lengths(field: str, **columns: Collection[object]) -> None:
    """`columns` maps column name to column; unequal lengths name the first that differs."""
    first, *rest = columns.items()
    for name, column in rest:
        if len(column) != len(first[1]):
            raise fail(f"{field}.{name}", f"has {len(column)} entries, {first[0]} has {len(first[1])}")


def token_ids(values: Sequence[int], field: str) -> tuple[int, ...]:
    """Token ids fit 31 bits: they are hashed as int32. The vocabulary's bound is the engine's business."""
    ids = tuple(values)
    if ids and max(ids) >= 2**31:
        raise fail(field, f"has token id {max(ids)}, which is not below 2**31")
    return ids


def packed_tokens(packed: bytes, field: str) -> int:
    """The number of token ids in `packed`, see `common.types.prefix.pack_tokens`."""
    count, rest = divmod(len(packed), TOKEN_NBYTES)
    if rest:
        raise fail(field, f"has {len(packed)} bytes, which are no whole token ids")
    if count and np.frombuffer(packed, "<i4").min() < 0:
        raise fail(field, "has a token id that is not below 2**31")
    return count


def traceparent(value: str) -> str:
    """A malformed trace context is ignored, as W3C asks."""
    return value if parse_traceparent(value) else ""
