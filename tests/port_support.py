"""Ports for servers that a test starts later, or for addresses where nobody is to answer."""

from __future__ import annotations

from services.cli.ports import Ports

_held = Ports()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else is given while this process lives; without a server it refuses."""
    return _held.take("127.0.0.1", 0)
