"""HTTPS at the API's port: the certificate's files are checked at the start, and read again when they are renewed."""

from __future__ import annotations

import ssl
from pathlib import Path

import uvicorn

from common.config.schema import RouterConfig
from common.errors import ConfigError
from common.telemetry import get_logger

_log = get_logger(__name__)


def check_files(config: RouterConfig) -> None:
    """Raises `ConfigError` for files that are not there or do not belong together."""
    if not config.ssl_certfile and not config.ssl_keyfile:
        return
    if not (config.ssl_certfile and config.ssl_keyfile):
        raise ConfigError("ssl_certfile and ssl_keyfile go together: one is missing", param="router.ssl_certfile")
    try:
        _fit(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # an ssl.SSLError is one
        raise ConfigError(
            f"{config.ssl_certfile} and {config.ssl_keyfile} cannot be used: {error}", param="router.ssl_certfile"
        ) from None


def _fit(cert: str, key: str) -> None:
    """Raises `OSError` if a server cannot use them."""
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password="")


class Renewal:
    """Keeps a server's context current; connections that are open keep what they have."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._config = config
        self._files = [Path(str(path)) for path in (config.ssl_certfile, config.ssl_keyfile) if path]
        self._stamp: list[tuple[int, int, int]] = []
        self._stamp = self._stat()

    def look(self) -> None:
        if not self._files or self._config.ssl is None or (stamp := self._stat()) == self._stamp:
            return
        self._stamp = stamp
        cert, key = map(str, self._files)
        try:
            _fit(cert, key)  # a context that fails to load them has lost the key that it had
            self._config.ssl.load_cert_chain(cert, key)
        except OSError as error:
            _log.error("the API's renewed certificate cannot be used, the last one stays", error=str(error))
        else:
            _log.info("the API's certificate was renewed")

    def _stat(self) -> list[tuple[int, int, int]]:
        try:
            return [(found.st_mtime_ns, found.st_ino, found.st_size) for found in map(Path.stat, self._files)]
        except OSError:
            return self._stamp
