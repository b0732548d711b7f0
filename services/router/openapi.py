"""The served OpenAPI document: FastAPI's of the small routes, and ours of the raw ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.router.endpoint import Api

_ERROR: Final = {"description": "An error object", "content": {"application/json": {"schema": {"type": "object"}}}}
_STATUSES: Final = ("400", "401", "404", "429", "503")
_FORM: Final = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    },
}


def document(app: FastAPI, apis: Sequence[Api]) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    bodies: list[type[BaseModel]] = list(dict.fromkeys(api.body for api in apis if api.body is not None))
    template = "#/components/schemas/{model}"
    refs, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=template)
    made.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    for api in apis:
        schema = None if api.body is None else refs[(api.body, "validation")]
        made["paths"].setdefault(api.path, {})[api.method.lower()] = _operation(api, schema)
    return made


def _operation(api: Api, schema: dict[str, Any] | None) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)\}", api.path)
    operation: dict[str, Any] = {
        "summary": api.summary,
        "operationId": f"{api.method.lower()}_{api.path.strip('/').translate(str.maketrans('/', '_', '{}'))}",
        "responses": {"200": {"description": "OK"}, **dict.fromkeys(_STATUSES, _ERROR)},
    }
    if names:
        string = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": string} for n in names]
    if api.path == "/v1/files" and api.method == "POST":
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    elif schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
