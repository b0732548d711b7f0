"""A JSON schema without the keywords that say nothing: defaults spelled out, and annotations.

llguidance refuses each keyword that it does not know, whatever its value. Generators of schemas write many that allow
everything: `uniqueItems: false` (OpenAPI), `propertyNames: {"type": "string"}` (zod), `format: "password"` (pydantic).
"""

from __future__ import annotations

from typing import Any, Final

_ANNOTATIONS: Final = {
    *("$comment", "default", "deprecated", "description", "example", "examples", "readOnly", "title", "writeOnly"),
}
_FORMATS: Final = {  # that JSON Schema defines; all others are annotations to it
    *("date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri"),
    *("iri-reference", "json-pointer", "regex", "relative-json-pointer", "time", "uri", "uri-reference"),
    *("uri-template", "uuid"),
}
_DIALECTS: Final = {
    *(f"http://json-schema.org/draft-0{number}/schema" for number in (4, 6, 7)),
    *(f"https://json-schema.org/draft/{date}/schema" for date in ("2019-09", "2020-12")),
}


def without_idle_keywords(schema: Any) -> Any:
    """The same to whoever validates. What is no schema is left as it is."""
    if not isinstance(schema, dict):
        return schema
    kept = {keyword: _inner(keyword, value) for keyword, value in schema.items()}
    return {keyword: value for keyword, value in kept.items() if not _is_idle(keyword, value, kept)}


def _inner(keyword: str, value: Any) -> Any:
    match keyword:
        case "allOf" | "anyOf" | "oneOf" | "prefixItems" | "items" if isinstance(value, list):
            return [without_idle_keywords(one) for one in value]
        case "$defs" | "definitions" | "dependentSchemas" | "patternProperties" | "properties":
            return (
                {name: without_idle_keywords(one) for name, one in value.items()} if isinstance(value, dict) else value
            )
        case "additionalItems" | "additionalProperties" | "contains" | "items" | "propertyNames":
            return without_idle_keywords(value)
        case "else" | "if" | "not" | "then" | "unevaluatedItems" | "unevaluatedProperties":
            return without_idle_keywords(value)
        case "maxItems" | "maxLength" | "maxProperties" | "minItems" | "minLength" | "minProperties":
            return int(value) if isinstance(value, float) and value.is_integer() else value
    return value


def _is_idle(keyword: str, value: Any, schema: dict[str, Any]) -> bool:
    match keyword:
        case "uniqueItems" | "not":
            return value is False
        case "unevaluatedItems" | "unevaluatedProperties":
            return _allows_all(value)
        case "propertyNames":
            return value == {"type": "string"} or _allows_all(value)
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            return isinstance(value, dict) and not value
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "if":
            return all(_allows_all(schema.get(branch, True)) for branch in ("then", "else"))
        case "then" | "else":
            return "if" not in schema or _allows_all(value)
        case "format":
            return isinstance(value, str) and value not in _FORMATS
        case "$schema":
            return isinstance(value, str) and value.removesuffix("#") not in _DIALECTS
    return False


def _allows_all(schema: Any) -> bool:
    if isinstance(schema, dict):
        return not schema.keys() - _ANNOTATIONS
    return schema is True
