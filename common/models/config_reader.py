"""config.json with errors that name the file and the field. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import ConfigError

_MOST = 1e30  # of a number, which then is one in fp32 too


class ConfigReader:
    """One object of a config.json. `prefix`: the field it is nested in, for errors."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    def error(self, field: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self._prefix}{field} {why}", param=self._prefix + field)

    def integer(self, field: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer from `least` to `most`; absent or null is `default`, which without one is an error."""
        value = self.values.get(field)
        if value is None:
            value = default
        if value is None:
            raise self.error(field, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of {least} or more"
            raise self.error(field, f"must be {kind}, got {value!r}")
        if value > most:
            raise self.error(field, f"must be at most {most}, got {value!r}")
        return value

    def number(self, field: str, default: float) -> float:
        """A positive number, which is finite as JSON's need not be; absent is `default`."""
        value = self.values.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
            raise self.error(field, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.values.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, f"must be true or false, got {value!r}")
        return value

    def choice(self, field: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`; absent or null is `default`."""
        value = self.values.get(field)
        if value is None:
            value = default
        if value not in allowed:
            raise self.error(field, f"{value!r} is not supported; supported is: {', '.join(allowed)}")
        return str(value)

    def layer_types(self, num_layers: int, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
        """`layer_types`, one of `allowed` for each layer; None where the config does not have it."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != num_layers:
            raise self.error("layer_types", f"must list {num_layers} layers")
        unknown = sorted({str(t) for t in value} - set(allowed))
        if unknown:
            raise self.error("layer_types", f"{unknown} is not supported; {' and '.join(allowed)} are")
        return tuple(value)

    def nested(self, field: str) -> ConfigReader:
        """The object in `field`."""
        value = self.values.get(field)
        if not isinstance(value, dict):
            raise self.error(field, f"must be an object, got {value!r}")
        return ConfigReader(self.path, value, f"{self._prefix}{field}.")
