"""Every error that crosses a component border.

    NanoDeployError
    ├── InvalidRequestError      the request is wrong; names the field           400
    │   └── UnsupportedError     asks for what this build or model cannot do     400
    ├── UnauthenticatedError     no key or token, or one that is not known       401
    ├── NotFoundError            unknown model, request, worker or lease         404
    ├── OverloadedError          no capacity now; another worker may have it     503 (429 at the router)
    ├── UnavailableError         draining, dead or restarting; retry elsewhere   503
    ├── DeadlineExceededError    the caller's time ran out                       504
    ├── CancelledByCallerError   the caller went away                            499
    ├── KVTransferError          KV not moved or not verified: recompute         500
    │   ├── PeerLostError        the other side died or stopped answering
    │   ├── DigestMismatchError  bytes arrived and are not the bytes sent
    │   └── LeaseLostError       unknown, released or expired lease
    ├── LayoutMismatchError      the pair's KV layouts do not convert; names the field
    ├── ConfigError              bad flag, file or checkpoint; the process does not start
    └── InternalError            our bug, or an engine that died                 500
        └── RankLostError        a rank of the engine is gone, and the engine with it

`ValueError` is for bad arguments inside Python, `assert` for our own bugs.
"""

from __future__ import annotations

from typing import ClassVar


class NanoDeployError(Exception):
    """Base of the tree. `message` is safe to show to a client; `param` names the field at fault."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(NanoDeployError):
    code = "invalid_request"


class UnsupportedError(InvalidRequestError):
    pass


class UnauthenticatedError(NanoDeployError):
    code = "unauthenticated"


class NotFoundError(NanoDeployError):
    code = "not_found"


class OverloadedError(NanoDeployError):
    code = "overloaded"


class UnavailableError(NanoDeployError):
    code = "unavailable"


class DeadlineExceededError(NanoDeployError):
    code = "deadline_exceeded"


class CancelledByCallerError(NanoDeployError):
    code = "cancelled"


class KVTransferError(NanoDeployError):
    code = "kv_transfer"


class PeerLostError(KVTransferError):
    pass


class DigestMismatchError(KVTransferError):
    pass


class LeaseLostError(KVTransferError):
    pass


class LayoutMismatchError(NanoDeployError):
    code = "layout_mismatch"


class ConfigError(NanoDeployError):
    code = "config"


class InternalError(NanoDeployError):
    code = "internal"


class RankLostError(InternalError):
    pass


_BY_CODE: dict[str, type[NanoDeployError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        UnauthenticatedError,
        NotFoundError,
        OverloadedError,
        UnavailableError,
        DeadlineExceededError,
        CancelledByCallerError,
        KVTransferError,
        LayoutMismatchError,
        ConfigError,
        InternalError,
    )
}


def error_from_code(code: str, message: str, *, param: str = "") -> NanoDeployError:
    """The error a code stands for; an unknown code is an `InternalError`."""
    return _BY_CODE.get(code, InternalError)(message, param=param)
