"""Who may manage keys and read what is stored: callers that show the controller's admin token."""

from __future__ import annotations

import hmac
from typing import Any

from common.errors import UnauthenticatedError


def require_admin(admin_token: str, context: Any) -> None:
    given = dict(context.invocation_metadata() or ()).get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {admin_token}".encode()):
        raise UnauthenticatedError("the admin token is missing or wrong")
