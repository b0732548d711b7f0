"""What an answered request leaves behind: nothing that only the garbage collector could free."""

from __future__ import annotations

import gc
from pathlib import Path

from router_support import MODEL, cluster, say, until

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def test_answered_requests_leave_no_cycles(tmp_path: Path) -> None:
    async with cluster(tmp_path / "model", say("hello there"), access_log=True) as made:
        await made.http.post("/v1/chat/completions", json=BODY)  # the model's text is loaded
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for more in ({}, {"stream": True}, {"stream": True, "stop": ["there"]}, {"logprobs": True}):
                await made.http.post("/v1/chat/completions", json=BODY | more)
            await until(lambda: not made.router.gateway.in_flight)
            gc.collect()
            kinds = {type(x) for x in gc.garbage if type(x).__module__.startswith(("services.", "uvicorn."))}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert kinds == set()
