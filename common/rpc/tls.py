"""TLS between services: certificates from files, read again when they are renewed.

Plain text is the default, for one machine and for networks that something else protects. With `cert` and `key` a
server speaks TLS alone; with `ca` beside them it also asks callers for a certificate of that authority (mTLS). A
client with `ca` speaks TLS, and shows its own certificate if it has one. Each service is both.

    files renewed -> servers: the next handshake has them
                  -> clients: the next call goes over a new connection; streams under way stay on the old one
    half written  -> what was there before stays until all of them can be used: gRPC refuses what it cannot use call by
                     call, and ends the process over a key that is empty
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from common.config.schema import TlsConfig
from common.errors import ConfigError
from common.telemetry import get_logger

LOOK_S: Final = 1.0  # how often files are looked at, when they are needed

_log = get_logger(__name__)


class TlsFiles:
    """One service's certificate, key and authority, as bytes that are current."""

    def __init__(self, config: TlsConfig) -> None:
        """Raises `ConfigError` for files that cannot be read or used, or only one of certificate and key."""
        if bool(config.cert) != bool(config.key):
            raise ConfigError("tls.cert and tls.key go together: one of them is missing", param="tls.cert")
        self._paths = tuple(Path(path) if path else None for path in (config.ca, config.cert, config.key))
        self.server_name = config.server_name
        self.version = 0  # rises when a file has changed
        self._looked_s = time.monotonic()
        self._stamp = self._stat()
        self._contents = self._read()
        self._amiss = ""  # why the files as they are now cannot be used

    @property
    def serves(self) -> bool:
        """Whether our server speaks TLS."""
        return self._contents[1] is not None

    @property
    def calls(self) -> bool:
        """Whether we call others with TLS."""
        return self._contents[0] is not None

    def refresh(self) -> None:
        """Look at the files, at most once a second. The last contents stay until all can be read and used."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            contents = self._read()
        except ConfigError as error:
            if error.message != self._amiss:
                _log.error("renewed certificates cannot be used, the last ones stay", error=error.message)
            self._amiss = error.message
            return
        self._stamp, self._contents, self._amiss = stamp, contents, ""
        self.version += 1
        _log.info("certificates were renewed", version=self.version)

    def server_credentials(self) -> grpc.ServerCredentials:
        seen = -1

        def fetch() -> Any:
            """Asked at every handshake; None: as before."""
            nonlocal seen
            self.refresh()
            if seen == self.version:
                return None
            seen = self.version
            return self._server_configuration()

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._server_configuration(), fetch, require_client_authentication=self.calls
        )
        return credentials

    def _server_configuration(self) -> Any:
        ca, cert, key = self._contents
        assert cert is not None, "checked at the start"
        assert key is not None, "checked at the start"
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        ca, cert, key = self._contents
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    def _stat(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in self._paths)

    def _read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        ca, cert, key = (None if path is None else _bytes(path) for path in self._paths)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # how strong they have to be is for the handshakes to say
        if ca is not None:
            with _usable(self._paths[:1]), _as_file(ca) as name:
                context.load_verify_locations(name)
        if cert is not None and key is not None:
            with _usable(self._paths[1:]), _as_file(cert) as name, _as_file(key) as key_name:
                context.load_cert_chain(name, key_name, password="")  # asks nobody for one
        return ca, cert, key


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        found = path.stat()  # through links: what renews certificates often turns one
    except OSError as error:
        raise ConfigError(f"tls: {path}: {error.strerror}", param="tls") from None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {path}: {error.strerror}", param="tls") from None


@contextlib.contextmanager
def _usable(paths: Sequence[Path | None]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
        names = " and ".join(map(str, paths))
        raise ConfigError(f"tls: {names} cannot be used: {error}", param="tls") from None


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A name for bytes that were read: OpenSSL takes names alone, and the file may be another one by now."""
    descriptor = os.memfd_create("tls")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


class RenewingChannel:
    """Stands for a `grpc.aio.Channel` of which each call takes one with the current certificates.

    An older one is let go when its last call has ended.
    """

    def __init__(self, tls: TlsFiles, connect: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]) -> None:
        self._tls = tls
        self._connect = connect
        self._version = tls.version
        self._current = connect(tls.channel_credentials())
        self._calls: dict[grpc.aio.Channel, int] = {self._current: 0}

    def __getattr__(self, kind: str) -> Callable[..., Callable[..., Any]]:
        """`unary_unary` and its like: what stubs ask a channel for."""
        if kind not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            raise AttributeError(kind)
        return lambda *args, **kwargs: (
            lambda *given, **named: self._begin(
                lambda channel: getattr(channel, kind)(*args, **kwargs)(*given, **named)
            )
        )

    def _begin(self, start: Callable[[grpc.aio.Channel], Any]) -> Any:
        channel = self._channel()
        call = start(channel)
        self._calls[channel] += 1
        call.add_done_callback(lambda _: self._ended(channel))
        return call

    def _channel(self) -> grpc.aio.Channel:
        self._tls.refresh()
        if self._version != self._tls.version:
            self._version = self._tls.version
            old, self._current = self._current, self._connect(self._tls.channel_credentials())
            self._calls[self._current] = 0
            if not self._calls[old]:
                del self._calls[old]  # grpc closes what nobody refers to
        return self._current

    def _ended(self, channel: grpc.aio.Channel) -> None:
        if channel in self._calls:
            self._calls[channel] -= 1
            if not self._calls[channel] and channel is not self._current:
                del self._calls[channel]

    async def close(self, grace: float | None = None) -> None:
        channels = list(self._calls)
        self._calls.clear()
        for channel in channels:
            await channel.close(grace)

    async def __aenter__(self) -> RenewingChannel:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def warn_if_exposed(host: str, what: str) -> None:
    """One line in the log for plain text on an address that other machines reach."""
    if not is_loopback(host):
        _log.warning("plain text on an address that others reach: certificates are not set", what=what, host=host)


class _Process:
    """Who this process is to others: like its logging, set once by its `__main__`, before anything connects."""

    tls: TlsFiles | None = None


def configure_tls(config: TlsConfig) -> None:
    """From now on servers and channels of this process use these files, or plain text if there are none."""
    _Process.tls = TlsFiles(config) if config.ca or config.cert or config.key else None


def process_tls() -> TlsFiles | None:
    return _Process.tls
