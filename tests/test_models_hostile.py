"""Checkpoints that nobody meant well with: every one ends in one ConfigError that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from models_support import CPU

from common.errors import ConfigError
from common.models.spec import ModelSpec
from common.models.weights import load_model

Header = dict[str, Any]
WEIGHTS = "model.safetensors"
FIRST, SECOND = "lm_head.weight", "model.embed_tokens.weight"
UNREAD = "model.layers.0.self_attn.rotary_emb.inv_freq"
NUMBERS = (-1, 0, 3, 2**40, float("inf"), float("nan"), True, 2.5)
WRONG: tuple[Any, ...] = (None, "x", "", [], [[1]], {}, {"a": {}}, *NUMBERS)


def with_entry(**fields: Any) -> Callable[[Header], Any]:
    return lambda header: header | {FIRST: header[FIRST] | fields}


def moved(header: Header) -> Header:
    """Two tensors over the same bytes."""
    begin, end = header[SECOND]["data_offsets"]
    return header | {SECOND: header[SECOND] | {"data_offsets": [0, end - begin]}}


def of_unknown_type(header: Header) -> Header:
    """A tensor that the model ignores."""
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return header | {UNREAD: {"dtype": "F3", "shape": [4], "data_offsets": [end, end]}}


HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "a list": (lambda header: [1], "its header is not an object"),
    "a number": (lambda header: 5, "its header is not an object"),
    "deep": (lambda header: "[" * 100_000, "cannot be read"),
    "no text": (lambda header: header | {"\ud800": header[FIRST]}, "cannot be read"),
    "metadata": (lambda header: header | {"__metadata__": {"a": 5}}, "__metadata__ is not an object of texts"),
    "no entry": (lambda header: header | {FIRST: None}, "malformed entry"),
    "a type that is a list": (with_entry(dtype=["F32"]), "malformed entry"),
    "offsets in words": (with_entry(data_offsets=["a", 5]), "malformed entry"),
    "offsets in fractions": (with_entry(data_offsets=[0.0, 131072.0]), "malformed entry"),
    "a shape below zero": (with_entry(shape=[-512, -64]), "malformed entry"),
    "a shape in fractions": (with_entry(shape=[512.0, 64.0]), "malformed entry"),
    "an overlap": (moved, "begins at byte"),
    "an unknown type": (of_unknown_type, "cannot be read"),
}


def load(folder: Path) -> None:
    load_model(ModelSpec.from_folder(folder), dtype="float32", device=CPU)


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path: Path, name: str) -> None:
    change, words = HEADERS[name]
    file = tiny_models.make_llama(tmp_path) / WEIGHTS
    content = file.read_bytes()
    nbytes = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + nbytes]))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + nbytes :])
    with pytest.raises(ConfigError) as raised:
        load(tmp_path)
    assert WEIGHTS in raised.value.message
    assert words in raised.value.message


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    file = tiny_models.make_llama(tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ConfigError, match="goes on after its last tensor: 4 bytes"):
        load(tmp_path)


def test_a_config_nested_without_end(tmp_path: Path) -> None:
    tiny_models.make_llama(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load(tmp_path)


def test_a_model_that_fits_nowhere(tmp_path: Path) -> None:
    values = json.loads((tiny_models.make_llama(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2}))
    spec = ModelSpec.from_folder(tmp_path, weights=False)
    with pytest.raises(ConfigError, match="cannot be made here"):
        load_model(spec, dtype="float32", device=CPU, load_format="dummy")


def fields_of(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        if name not in ("vision_config", "id2label", "label2id"):
            yield (*prefix, name)
            if isinstance(value, dict):
                yield from fields_of(value, (*prefix, name))


@pytest.mark.parametrize("family", tiny_models.MAKERS)
def test_every_field_of_a_config_may_be_anything(tmp_path: Path, family: str) -> None:
    """It is read as something, or refused; what is not a number never becomes one of the spec's."""
    file = tiny_models.MAKERS[family](tmp_path) / "config.json"
    text = file.read_text()
    messages = []
    for path in fields_of(json.loads(text)):
        for wrong in WRONG:
            values = json.loads(text)
            at = values
            for name in path[:-1]:
                at = at[name]
            at[path[-1]] = wrong
            file.write_text(json.dumps(values))
            try:
                spec = ModelSpec.from_folder(tmp_path, weights=False)
            except ConfigError as error:
                messages.append(error.message)
            else:
                numbers = str((spec.rope, spec.rms_norm_eps, spec.mla, spec.moe, spec.compress, spec.streams))
                assert not re.search(r"\b(nan|inf)\b", numbers), (path, wrong)
    assert len(messages) > 100
    assert all(str(tmp_path) in m or "model_type" in m for m in messages)
