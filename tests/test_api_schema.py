"""The served OpenAPI document is the truth: whatever it allows, and what it does not, finds no fault of ours."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from api_support import PARSERS, stored_cluster
from redis_support import run_redis
from router_support import MODEL, Cluster, say

EXAMPLES = 5  # of each operation and mode
DONE_WITH = ("/metrics", "/docs", "/openapi.json")


def probe(url: str, document: dict[str, Any], known: dict[str, str]) -> dict[str, set[int]]:
    """Statuses by operation. `known`: path parameters of what there is."""
    seen: dict[str, set[int]] = {}
    schema: Any = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in DONE_WITH:
            continue
        statuses = seen.setdefault(operation.label, set())
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            keeps = mode is schemathesis.GenerationMode.POSITIVE and operation.method != "delete"
            right = known if keeps else {}
            _try(url, operation.as_strategy(generation_mode=mode), statuses, right)
    return seen


def _try(url: str, cases: Any, statuses: set[int], known: dict[str, str]) -> None:
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def run(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # no random name is that of a model: the only one is meant then
        for name in case.path_parameters or ():
            case.path_parameters[name] = known.get(name, case.path_parameters[name])
        response = case.call(base_url=url, timeout=20)
        statuses.add(response.status_code)
        assert response.status_code < 500, f"{response.status_code} {response.text[:500]}\n{case.as_curl_command()}"
        assert response.headers["x-request-id"]
        if response.status_code >= 400 and case.path.startswith("/v1/"):
            error = response.json()["error"]
            assert error["message"]
            assert error["type"]

    # nothing can be wrong with a request that has neither parameters nor a body
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        run()


async def made_before(cluster: Cluster) -> dict[str, str]:
    """Ids of one of each."""
    response = await cluster.post("/v1/responses", input="x")
    file = await cluster.http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"x"})
    file_id = file.json()["id"]
    batch = await cluster.post("/v1/batches", input_file_id=file_id, endpoint="/v1/responses", completion_window="24h")
    return {"response_id": response.json()["id"], "file_id": file_id, "batch_id": batch.json()["id"]}


async def test_no_request_finds_a_500(tmp_path: Path) -> None:
    with run_redis() as server:
        async with stored_cluster(server, tmp_path, say("Because."), **PARSERS) as made:
            document = (await made.cluster.http.get("/openapi.json")).json()
            known = {"name": MODEL, **await made_before(made.cluster)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen = await asyncio.to_thread(probe, made.cluster.url, document, known)
    for operation in ("POST /v1/chat/completions", "POST /v1/responses", "POST /v1/messages", "POST /v1/batches"):
        assert 400 in seen[operation], operation
    for operation in ("GET /v1/models/{name}", "GET /v1/responses/{response_id}", "GET /v1/files/{file_id}/content"):
        assert 200 in seen[operation], operation
    assert len(seen) > 20
