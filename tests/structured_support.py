"""Random schemas, and what came out of engines as text."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from tokenizers import Tokenizer

from common.types import FinishReason, Grammar, GrammarKind, SamplingParams


@cache
def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def text_of(folder: Path, tokens: list[int]) -> str:
    """Without the end-of-sequence token."""
    text: str = tokenizer_of(folder).decode(tokens, skip_special_tokens=True)
    return text


def schema_grammar(schema: Any, **options: Any) -> Grammar:
    """Spaces and newlines between parts are left out where that is possible, so that answers end soon."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_flexible": False, **options}}
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(schema))


def of(kind: GrammarKind, source: str) -> Grammar:
    return Grammar(kind=kind, source=source)


def under(grammar: Grammar, seed: int = 0, **more: Any) -> SamplingParams:
    defaults = {"temperature": 1.0, "max_tokens": 400, "seed": seed, "grammar": grammar}
    return SamplingParams(**(defaults | more))


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """One that only short texts satisfy, of the kinds that clients send."""
    kinds = ["enum", "string", "pattern", "integer", "number", "boolean", "null", "const", "format"]
    if depth:
        kinds += ["object", "object", "array", "array", "anyOf", "ref"]
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(["red", "green", 7, None, True, "blau", "日本"], rng.randint(1, 4))}
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 6)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice([r"^[a-c]{1,3}$", r"^\d{2}-\d{2}$", r"^(x|yy)+z$"])}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
        case "number":
            return {"type": "number", "minimum": 0, "exclusiveMaximum": 10}
        case "boolean":
            return {"type": "boolean"}
        case "null":
            return {"type": "null"}
        case "const":
            return {"const": rng.choice(['a"b', {"k": [1, 2]}, 3])}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])}
        case "object":
            names = rng.sample(["name", "age", "tags", "größe", "x y", "id"], rng.randint(1, 4))
            properties = {name: random_schema(rng, depth - 1) for name in names}
            required = rng.sample(names, rng.randint(0, len(names)))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": random_schema(rng, depth - 1),
                "minItems": low,
                "maxItems": low + rng.randint(0, 2),
            }
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case _:
            inner = random_schema(rng, 0)
            return {"type": "object", "properties": {"n": inner}, "required": ["n"], "additionalProperties": False}


def check(schema: Any, text: str, finish: FinishReason) -> None:
    """A whole answer is JSON that validates; one that was cut off is allowed to be anything."""
    assert finish in (FinishReason.STOP, FinishReason.LENGTH)
    if finish is FinishReason.STOP:
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
