"""What `up` prints to copy answers as it stands: with a key where the API asks for one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cli_support import console
from router_support import MODEL, cluster, say

from services.cli.live import print_banner
from services.cli.plan import ClusterPlan
from services.cli.probe import complete_once
from services.cli.token import auth_headers


@pytest.mark.parametrize("keys", [(), ("sk-mine",)])
async def test_the_line_to_copy_has_a_key_where_one_is_needed(tmp_path: Path, keys: tuple[str, ...]) -> None:
    config: dict[str, Any] = {"api_keys": keys}
    async with cluster(tmp_path, say("x y z"), **config) as made:
        answer = await complete_once(made.http, made.url, MODEL, 8, 5.0, auth_headers("sk-mine"))
        shown, out = console()
        plan = cast(ClusterPlan, SimpleNamespace(url=made.url, model=MODEL))
        print_banner(plan, "nanodeploy chat", shown, needs_key=answer.needs_key)
    assert answer.needs_key == bool(keys)
    assert ("-H 'Authorization: Bearer YOUR_KEY'" in out.getvalue()) == bool(keys)
