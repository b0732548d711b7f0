"""The admin token of a cluster of this machine, for its owner: in the files that `up` wrote for its controller."""

from __future__ import annotations

from common.config.load import load
from common.errors import ConfigError
from services.cli.state import StateFolder


def admin_token(folder: StateFolder) -> str:
    """Empty if there is none that this user may read."""
    try:
        return load(str(folder.config_path / "controller.yaml"), {}).controller.admin_token
    except ConfigError:
        return ""


def auth_headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
