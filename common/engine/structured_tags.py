"""Structural tags: free text in which tags begin parts of a given form, as vLLM and SGLang take them, in Lark's form.

    {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}        the older one
    {"format": {"type": ..., ...}}                                             the newer one, a tree of parts

Parts: const_string, any_text, regex, json_schema, sequence, or, tag, triggered_tags, tags_with_separator. Where a text
holds a special token of the model, that token is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from common.engine.structured_schema import without_idle_keywords

_TEXT = r"/(.|\n)*/"
_MAX_PARTS = 10_000


def tags_to_lark(source: Mapping[str, Any], json_options: Mapping[str, Any], specials: Mapping[str, int]) -> str:
    """`ValueError` says what is wrong. `specials`: special tokens by their text."""
    writer = _Writer(json_options, specials)
    if "format" in source:
        start = writer.part(source["format"])
    else:
        tags = [_old_tag(entry) for entry in _list(source, "structures")]
        start = writer.part({"type": "triggered_tags", "triggers": _list(source, "triggers"), "tags": tags})
    return "\n".join(["%llguidance {}", f"start: {start}", f"TEXT: {_TEXT}", *writer.rules])


def _old_tag(entry: Any) -> dict[str, Any]:
    content = {"type": "json_schema", "json_schema": _get(entry, "schema")}
    return {"type": "tag", "begin": _get(entry, "begin"), "content": content, "end": entry.get("end", "")}


def _get(part: Any, field: str) -> Any:
    if not isinstance(part, dict) or field not in part:
        raise ValueError(f"a part of the structural tag lacks {field}")
    return part[field]


def _list(part: Any, field: str) -> list[Any]:
    found = _get(part, field)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{field} of a structural tag must be an array of at least one entry")
    return found


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} of a structural tag must be a string")
    return value


def literal(text: str, specials: Mapping[str, int]) -> str:
    """The text, with special tokens where it names them."""
    if not text:
        return '""'
    longest_first = sorted((s for s in specials if s in text), key=len, reverse=True)
    marks = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
    out, end = [], 0
    for found in marks.finditer(text) if marks is not None else ():
        if found.start() > end:
            out.append(quoted(text[end : found.start()]))
        out.append(f"<[{specials[found.group()]}]>")
        end = found.end()
    if end < len(text):
        out.append(quoted(text[end:]))
    return " ".join(out)


class _Writer:
    """`rules`: those that parts refer to by name."""

    def __init__(self, json_options: Mapping[str, Any], specials: Mapping[str, int]) -> None:
        self._options = json_options
        self._specials = specials
        self.rules: list[str] = []

    def part(self, part: Any) -> str:
        """What a part is, as an expression."""
        if len(self.rules) > _MAX_PARTS:
            raise ValueError(f"the structural tag has more than {_MAX_PARTS} parts")
        match _get(part, "type"):
            case "const_string":
                return self.literal(_text(_get(part, "value"), "value"))
            case "any_text":
                return "TEXT"
            case "regex":
                return self._rule(_regex(_text(_get(part, "pattern"), "pattern")))
            case "json_schema":
                return self._rule(f"%json {self._schema(_get(part, 'json_schema'))}")
            case "sequence":
                return self._rule(" ".join(self.part(p) for p in _list(part, "elements")))
            case "or":
                return self._rule(" | ".join(self.part(p) for p in _list(part, "elements")))
            case "tag":
                return self._tag(part)
            case "triggered_tags":
                return self._triggered(part)
            case "tags_with_separator":
                return self._separated(part)
            case other:
                raise ValueError(f"a structural tag has no part of type {other!r}")

    def literal(self, text: str) -> str:
        return literal(text, self._specials)

    def _rule(self, body: str, name: str = "") -> str:
        name = name or f"p{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name.removesuffix("[lazy]")

    def _schema(self, schema: Any) -> str:
        if not isinstance(schema, dict):
            raise ValueError("a schema of a structural tag must be an object")
        options = schema.get("x-guidance", {})
        if not isinstance(options, dict):
            raise ValueError("x-guidance of a schema must be an object")
        return json.dumps({**without_idle_keywords(schema), "x-guidance": {**self._options, **options}})

    def _until(self, end: str) -> str:
        """Free text and the first `end` behind it."""
        begins = [end.index(special) for special in self._specials if special in end]
        if begins:  # a special token ends the text before it, which may hold the same characters elsewhere
            before = end[: min(begins)]
            text = self._rule(_regex(rf"(.|\n)*{_escaped(before)}"), f"T{len(self.rules)}") if before else "TEXT"
            return f"{text} {self.literal(end[len(before) :])}"
        return self._rule(f"TEXT {quoted(end)}", f"p{len(self.rules)}[lazy]")

    def _tag(self, part: Any, skip: int = 0) -> str:
        """`skip`: characters of its beginning that are there already."""
        begin = _text(_get(part, "begin"), "begin")[skip:]
        content, ends = _get(part, "content"), _get(part, "end")
        ends = [_text(e, "end") for e in (ends if isinstance(ends, list) else [ends])]
        if _get(content, "type") == "any_text" and all(ends):
            rest = " | ".join(self._until(end) for end in ends)
        else:
            rest = f"{self.part(content)} ({' | '.join(self.literal(end) for end in ends)})"
        return self._rule(f"{self.literal(begin)} ({rest})")

    def _triggered(self, part: Any) -> str:
        tags = _list(part, "tags")
        begun: dict[str, list[str]] = {}
        triggers = [_text(t, "triggers") for t in _list(part, "triggers")]
        for tag in tags:
            begin = _text(_get(tag, "begin"), "begin")
            trigger = next((t for t in triggers if t and begin.startswith(t)), None)
            if trigger is None:
                raise ValueError(f"no trigger begins the tag {begin[:80]!r}")
            begun.setdefault(trigger, []).append(self._tag(tag, len(trigger)))
        options = [f"{self._until(trigger)} ({' | '.join(rest)})" for trigger, rest in begun.items()]
        one = self._rule(" | ".join(options))
        if part.get("stop_after_first"):
            return one if part.get("at_least_one") else self._rule(f"{one} | TEXT")
        return self._rule(f"{one}{'+' if part.get('at_least_one') else '*'} TEXT")

    def _separated(self, part: Any) -> str:
        one = self._rule(" | ".join(self.part({**_tag_of(tag)}) for tag in _list(part, "tags")))
        separator = self.literal(_text(_get(part, "separator"), "separator"))
        many = one if part.get("stop_after_first") else self._rule(f"{one} ({separator} {one})*")
        return many if part.get("at_least_one") else self._rule(f'{many} | ""')


def _tag_of(tag: Any) -> dict[str, Any]:
    if _get(tag, "type") != "tag":
        raise ValueError("tags of a structural tag must be of type tag")
    found: dict[str, Any] = tag
    return found


def quoted(text: str) -> str:
    """As a string of Lark's, which has no DEL in it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\x7f")


def _escaped(text: str) -> str:
    """As a regular expression on one line."""
    return re.escape(text).replace("\\\n", r"\n").replace("\\\r", r"\r")


def _regex(pattern: str) -> str:
    """Between slashes: those inside are escaped."""
    return "/" + re.sub(r"\\.|/", lambda m: r"\/" if m.group() == "/" else m.group(), pattern, flags=re.S) + "/"
