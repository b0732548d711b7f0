"""From a YAML file and an environment to one frozen `ClusterConfig`.

    defaults of the schema  <  file  <  NANODEPLOY_<SECTION>__<FIELD>[__<FIELD>]

A section given in part keeps the cluster's defaults for the rest (`decode: {host: ...}` keeps port 7300).
The environment comes as an argument: only a `__main__` reads the real one. Every mistake is a `ConfigError`
that names the source, the key and the rule; nothing is skipped or guessed.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from common.config.schema import ClusterConfig
from common.errors import ConfigError

ENV_PREFIX = "NANODEPLOY_"
SECRETS = ("api_keys", "admin_token", "redis_url")  # values that no message shows

_Tree = dict[str, Any]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML allows a key twice and keeps the last one; a config file must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: str | None, environ: Mapping[str, str]) -> ClusterConfig:
    """Read `path` (None: defaults alone) and lay the overrides of `environ` over it.

    Variables that start with `NANODEPLOY_` and hold no `__` belong to somebody else and are ignored.
    A tuple is written `a,b` or as a JSON list. Raises `ConfigError`.
    """
    return load_named(path, environ)[0]


def load_named(path: str | None, environ: Mapping[str, str]) -> tuple[ClusterConfig, frozenset[str]]:
    """As `load`, with the dotted keys that the file or the environment named."""
    sources: dict[str, str] = {}  # dotted key -> where its value came from
    tree = ClusterConfig().model_dump()
    if path is not None:
        _merge(tree, _read(path), path, "", ClusterConfig, sources)
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and "__" in variable:
            _override(tree, variable, environ[variable], sources)
    try:
        return ClusterConfig.model_validate(tree), frozenset(sources)
    except ValidationError as error:
        raise _explain(error, sources) from None


def to_yaml(config: ClusterConfig) -> str:
    """The whole config as YAML that `load` reads back to an equal one."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _read(path: str) -> _Tree:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections ({', '.join(ClusterConfig.model_fields)}), not a plain value")
    return tree


def _section(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The section class behind a field, None when the field is a value."""
    annotation = model.model_fields[field].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _unknown(source: str, key: str, field: str, model: type[BaseModel]) -> ConfigError:
    return ConfigError(f"{source}: {key}: unknown key; {suggest(field, model)}", param=key)


def suggest(field: str, model: type[BaseModel]) -> str:
    """What to write instead of `field`, which `model` does not have."""
    near = difflib.get_close_matches(field, model.model_fields, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(model.model_fields)}"


def _merge(into: _Tree, new: _Tree, source: str, prefix: str, model: type[BaseModel], sources: dict[str, str]) -> None:
    for field, value in new.items():
        key = f"{prefix}{field}"
        if field not in model.model_fields:
            raise _unknown(source, key, str(field), model)
        section = _section(model, field)
        if section is None:
            into[field] = value
            sources[key] = source
        elif isinstance(value, dict):
            _merge(into[field], value, source, f"{key}.", section, sources)
        elif value is not None:  # an empty section is the defaults
            raise ConfigError(f"{source}: {key}: must be a section of keys, got {value!r}", param=key)


def _override(tree: _Tree, variable: str, text: str, sources: dict[str, str]) -> None:
    source = f"environment variable {variable}"
    model: type[BaseModel] = ClusterConfig
    *sections, field = variable[len(ENV_PREFIX) :].lower().split("__")
    path: list[str] = []
    for name in sections:
        path.append(name)
        if name not in model.model_fields:
            raise _unknown(source, ".".join(path), name, model)
        section = _section(model, name)
        if section is None:
            raise ConfigError(f"{source}: {'.'.join(path)} is a value and has no keys", param=".".join(path))
        model, tree = section, tree[name]
    key = ".".join([*path, field])
    if field not in model.model_fields:
        raise _unknown(source, key, field, model)
    if _section(model, field) is not None:
        raise ConfigError(f"{source}: {key} is a section: set its keys one by one", param=key)
    is_tuple = typing.get_origin(model.model_fields[field].annotation) is tuple
    tree[field] = _parse_tuple(source, key, text) if is_tuple else text
    sources[key] = source


def _parse_tuple(source: str, key: str, text: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        items: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: {key}: not a JSON list: {error}", param=key) from None
    return items


def _explain(error: ValidationError, sources: Mapping[str, str]) -> ConfigError:
    """All faults in one message, each with its source; `param` is the first key."""
    lines: list[str] = []
    keys: list[str] = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        source = next((src for name, src in sources.items() if key == name or key.startswith(f"{name}.")), "")
        source = source or _sources_within(key, sources) or "defaults"
        is_secret = key.split(".")[-1] in SECRETS or ".api_keys" in key
        shown = "" if is_secret or isinstance(fault["input"], dict) else f", got {fault['input']!r}"
        lines.append(f"{source}: {key}: {fault['msg'].removeprefix('Value error, ')}{shown}")
        keys.append(key)
    return ConfigError("; ".join(lines), param=keys[0])


def _sources_within(section: str, sources: Mapping[str, str]) -> str:
    """Where the keys of a section whose values do not fit each other came from."""
    return ", ".join(dict.fromkeys(source for key, source in sources.items() if key.startswith(f"{section}.")))
