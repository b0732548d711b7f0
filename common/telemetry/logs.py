"""Logs as events: one line, one dict, one place that formats it.

Before anything is configured (`from nanodeploy import LLM` in somebody's program) events go to the standard
library's loggers, which show warnings and worse on stderr; nothing is ever printed to stdout.
`configure_logging` is called once by a `__main__`; from then on structlog and the standard library (uvicorn,
grpc, warnings) leave in the same form on stderr: our own JSON lines go there directly, a quarter of the cost of a
`LogRecord`, all others through one handler. On an event loop, lines that are no warnings leave together, within
`LINES_WAIT_S`: a router says one for each request, and a write costs more than a line. What a task knows about its
request is bound to a context variable with `log_context` and appears on every line logged inside, in that task alone.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, TextIO, TypeVar

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from common.config.schema import LogConfig

V = TypeVar("V")

LINES_WAIT_S = 0.05
LINES_KEPT = 64

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_SAID: Final = {"warn": "warning", "exception": "error"}  # methods whose level has another name
_bound: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=MappingProxyType({}))
_UNWRITABLE = (OSError, ValueError)  # ValueError: the stream is closed
_NOISY = ("uvicorn.access", "httpx", "httpcore", "asyncio", "hpack")


def _dumps(event: EventDict, **_: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _add_bound(_logger: Any, _method: str, event: EventDict) -> EventDict:
    bound = _bound.get()
    return {**bound, **event} if bound else event


class _Handler(logging.StreamHandler[TextIO]):
    """Of a process. `keep` holds lines back for a moment; what is emitted or flushed later comes behind them.

    A stream that is gone, or a full disk, loses lines and ends nothing: whoever says something goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._kept: list[str] = []
        self._oldest_s = 0.0
        atexit.register(self.flush)

    def keep(self, line: str, *, urgent: bool) -> None:
        with self.lock or nullcontext():
            self._kept.append(line)
            loop = None if urgent else _running_loop()
            if loop is None or len(self._kept) >= LINES_KEPT:
                self.flush()
            elif len(self._kept) == 1:
                self._oldest_s = time.monotonic()
                loop.call_later(LINES_WAIT_S, self.flush)
            elif time.monotonic() > self._oldest_s + LINES_WAIT_S:
                self.flush()  # the loop is busy, or it was another that has closed

    def emit(self, record: logging.LogRecord) -> None:
        self._write_kept()
        super().emit(record)

    def flush(self) -> None:
        with self.lock or nullcontext(), suppress(*_UNWRITABLE):
            self._write_kept()
            super().flush()

    def _write_kept(self) -> None:
        if self._kept:
            kept, self._kept = self._kept, []
            with suppress(*_UNWRITABLE):
                self.stream.write("\n".join([*kept, ""]))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Lines:
    """Where finished lines of one logger go."""

    __slots__ = ("_handler", "name")

    def __init__(self, name: str, handler: _Handler) -> None:
        self.name = name
        self._handler = handler

    def info(self, line: str) -> None:
        self._handler.keep(line, urgent=False)

    def warning(self, line: str) -> None:
        self._handler.keep(line, urgent=True)

    debug = info
    msg = error = critical = exception = warning


def log_as_library() -> None:
    """What importing this module sets up: leave levels, handlers and format to the program we are part of."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            _add_bound,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def configure_logging(config: LogConfig, service: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (default stderr), each line with `service` on it."""

    def add_context(logger: Any, method: str, event: EventDict) -> EventDict:
        """One step where structlog's own would be six: a router says a line for each request."""
        record = event.get("_record")
        said = {**_bound.get(), **event}
        said["level"] = _SAID.get(method, method)
        said["logger"] = logger.name if record is None else record.name
        said["service"] = service
        said["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return said

    shared: list[Processor] = [add_context, structlog.processors.StackInfoRenderer()]
    out = stream if stream is not None else sys.stderr
    rendered: list[Processor]
    if config.format == "json":
        rendered = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_dumps)]
    else:
        plain = structlog.dev.plain_traceback  # the usual one shows variables: prompts and keys
        rendered = [structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=plain)]
    final: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered]
    handler = _Handler(out)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))

    level = _LEVELS[config.level]
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda name="": _Lines(name, handler),
        cache_logger_on_first_use=True,
    )


def flush_logs() -> None:
    """Before something is written to stderr past them."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger that takes an event and fields: `log.info("worker added", worker_id=..., role=...)`."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


@contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Bind fields (request_id, trace_id, worker_id ...) to every line logged inside, in this task."""
    with set_in_task(_bound, {**_bound.get(), **fields}):
        yield


@contextmanager
def set_in_task(variable: ContextVar[V], value: V) -> Iterator[None]:
    """A generator that is given up may be closed by another task, which has nothing to take back."""
    token = variable.set(value)
    try:
        yield
    finally:
        with suppress(ValueError):
            variable.reset(token)


def bind_to_task(**fields: Any) -> None:
    """As `log_context`, until this task ends."""
    _bound.set({**_bound.get(), **fields})


def bound_fields() -> Mapping[str, Any]:
    """What is on every line logged here."""
    return _bound.get()


log_as_library()
