"""Bases of the plain messages that pass between processes."""

from __future__ import annotations

import msgspec

from common.errors import NanoDeployError, error_from_code


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the class name is the tag on the wire."""


class Failure(msgspec.Struct, frozen=True):
    """An error as data: `code` of `common.errors`, a message safe to show, the field at fault."""

    code: str
    message: str
    param: str = ""

    @classmethod
    def of(cls, error: NanoDeployError) -> Failure:
        return cls(error.code, error.message, error.param)

    def to_error(self) -> NanoDeployError:
        return error_from_code(self.code, self.message, param=self.param)
