"""How a command line is let in: the admin token and the certificates, from the files that `up` wrote."""

from __future__ import annotations

import os

from common.config.load import load
from common.errors import ConfigError
from common.rpc.tls import configure_tls
from services.cli.state import StateFolder


def admin_token(folder: StateFolder) -> str:
    """Empty if there is none that this user may read."""
    try:
        return load(str(folder.config_path / "controller.yaml"), {}).controller.admin_token
    except ConfigError:
        return ""


def use_cluster_tls(folder: StateFolder) -> None:
    """Call the services of a cluster as its own files say, or as the environment does (`NANODEPLOY_TLS__CA`)."""
    path = folder.config_path / "controller.yaml"
    configure_tls(load(str(path) if path.exists() else None, os.environ).tls)


def auth_headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
