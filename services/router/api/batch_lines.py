"""The lines of a batch: what may be in its input, and the rows of its output."""

from __future__ import annotations

import codecs
from typing import Any, Final, NamedTuple

import orjson

MAX_LINES: Final = 50_000
MAX_ERRORS: Final = 100
BATCH_PRIORITY: Final = 1000  # smaller runs first; interactive requests have 0
MAX_PRIORITY: Final = 2**31 - 1


class Line(NamedTuple):
    """Kept as it came: 50,000 of them as objects would fill a router."""

    number: int
    custom_id: str
    raw: bytes


class Fault(NamedTuple):
    line: int | None
    code: str
    message: str
    param: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


def parse(content: bytes, endpoint: str) -> tuple[list[Line], list[Fault]]:
    """All lines, or faults. Lines count from 0 here and from 1 in faults."""
    lines: list[Line] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n")):
        if not raw.strip():
            continue
        if number >= MAX_LINES:
            faults.append(Fault(None, "too_many_tasks", f"The file has more than {MAX_LINES} lines."))
            break
        found = _line(number, raw, endpoint, seen)
        if isinstance(found, Line):
            seen.add(found.custom_id)
            lines.append(found)
        else:
            faults.append(found)
            if len(faults) >= MAX_ERRORS:
                break
    if not lines and not faults:
        faults.append(Fault(None, "empty_file", "The input file has no lines."))
    return lines, faults


def _line(number: int, raw: bytes, endpoint: str, seen: set[str]) -> Line | Fault:
    at = number + 1
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return Fault(at, "invalid_json_line", f"The line is not valid JSON: {error}")
    if not isinstance(row, dict):
        return Fault(at, "invalid_json_line", "The line is not a JSON object.")
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return Fault(at, "missing_required_parameter", "custom_id must be a string.", "custom_id")
    if custom_id in seen:
        return Fault(at, "duplicate_custom_id", f"custom_id {custom_id!r} is there already.", "custom_id")
    if row.get("method") != "POST":
        return Fault(at, "invalid_method", "method must be POST.", "method")
    if row.get("url") != endpoint:
        return Fault(at, "mismatched_url", f"url must be {endpoint}, the batch's endpoint.", "url")
    if not isinstance(body, dict):
        return Fault(at, "missing_required_parameter", "body must be an object.", "body")
    if body.get("stream") or body.get("background"):
        return Fault(at, "invalid_request", "stream and background are not possible in a batch.", "body")
    try:
        orjson.dumps(body)
    except TypeError as error:
        return Fault(at, "invalid_request", f"body cannot be used: {error}", "body")
    return Line(number, custom_id, raw)


def request_body(line: Line, endpoint: str) -> bytes:
    """As it is sent: behind everything interactive, and stored nowhere else."""
    body = orjson.loads(line.raw)["body"]
    given = body.get("priority", 0)
    right = type(given) is int and abs(given) <= MAX_PRIORITY  # else it is refused as it is
    body = body | {"priority": min(max(given, 0) + BATCH_PRIORITY, MAX_PRIORITY) if right else given}
    if endpoint == "/v1/responses":
        body = body | {"store": body.get("store", False)}
    return orjson.dumps(body)


def result_row(batch_id: str, line: Line, status: int, request_id: str, payload: bytes) -> bytes:
    """One line of an output or error file, with its end."""
    response = {"status_code": status, "request_id": request_id, "body": orjson.Fragment(payload)}
    return _row(batch_id, line, response, None)


def lost_row(batch_id: str, line: Line, code: str, message: str) -> bytes:
    """Of a line that was not run."""
    return _row(batch_id, line, None, {"code": code, "message": message})


def _row(batch_id: str, line: Line, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    id_ = f"batch_req_{batch_id.partition('_')[2]}{line.number:05x}"
    row = {"id": id_, "custom_id": line.custom_id, "response": response, "error": error}
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def is_good(row: bytes) -> bool:
    """Whether it belongs to the output file, and not to the error file."""
    response = orjson.loads(row)["response"]
    return response is not None and response["status_code"] == 200
