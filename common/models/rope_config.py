"""Rotary parameters from a config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.layers.rope_spec import RopeSpec, yarn_mscale
from common.models.config_reader import ConfigReader

TYPES = ("linear", "llama3", "yarn")
_FIELDS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(config: ConfigReader) -> RopeSpec:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before), alike for all layers.

    `partial_rotary_factor`, `mrope_section` and what else a family reads of them is its own business.
    """
    field, values = rope_values(config)
    if any(isinstance(v, dict) for v in values.values()):
        raise config.error(field, "must be one flat set of parameters for all layers")
    if config.values.get(_ORIGINAL) is not None:  # beside them it comes first, as in transformers
        values = values | {_ORIGINAL: config.values[_ORIGINAL]}
    return rope_of(config, field, values)


def rope_values(config: ConfigReader) -> tuple[str, dict[str, Any]]:
    """The field that rotary parameters are in, and what it holds. ConfigError where two fields disagree."""
    found = {name: config.values[name] for name in _FIELDS if config.values.get(name)}
    for name, values in found.items():
        if not isinstance(values, dict):
            raise config.error(name, f"must be an object, got {values!r}")
    new, old = (found.get(name, {}) for name in _FIELDS)
    for key, value in old.items() if new else ():
        other = new.get("rope_type" if key == "type" else key)
        if other != value:
            raise config.error(
                f"rope_scaling.{key}", f"is {value!r}, and rope_parameters says {other!r}: drop one of them"
            )
    return ("rope_parameters", new) if new else ("rope_scaling", old)


def rope_of(config: ConfigReader, field: str, values: Mapping[str, Any]) -> RopeSpec:
    """The embedding that one set of parameters, `config`'s `field`, describes."""
    rope = ConfigReader(config.path, {"rope_theta": config.values.get("rope_theta", 10000.0), **values})
    rope_type = values.get("rope_type", values.get("type", "default"))
    positions = config.integer("max_position_embeddings")
    original = rope.integer(_ORIGINAL, positions)
    theta = rope.number("rope_theta", 10000.0)
    if rope_type in ("default", "mrope"):
        return RopeSpec(theta=theta)
    if rope_type == "yarn" and values.get("factor") is None:
        rope.values["factor"] = positions / original
    if rope_type not in TYPES:
        raise config.error(field, f"rope type {rope_type!r} is not supported; default, linear, llama3 and yarn are")
    for name in ("factor", *(("low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ())):
        if name not in rope.values:
            raise config.error(f"{field}.{name}", "is missing")
    factor = rope.number("factor", 1.0)
    if rope_type == "linear":
        return RopeSpec("linear", theta, factor)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
        return RopeSpec("llama3", theta, factor, original, low, high)
    if theta <= 1:
        raise config.error(f"{field}.rope_theta", f"must be above 1 for yarn, got {theta}")
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=_number(rope, "beta_fast") or 32.0,
        beta_slow=_number(rope, "beta_slow") or 1.0,
        attention_factor=_yarn_attention(rope, factor),
        truncate=bool(values.get("truncate", True)),
    )


def read_sections(config: ConfigReader, width: int, default: tuple[int, int, int]) -> tuple[int, ...]:
    """`mrope_section`: how many of the width / 2 pairs turn by time, height and width, interleaved."""
    field, values = rope_values(config)
    if values.get("mrope_interleaved", True) is not True:
        raise config.error(f"{field}.mrope_interleaved", "must be true: sections in a row are not supported")
    sections, pairs = values.get("mrope_section", default), width // 2
    if not (
        isinstance(sections, list | tuple) and len(sections) == 3 and all(type(n) is int and n >= 0 for n in sections)
    ):
        raise config.error(f"{field}.mrope_section", f"must be three numbers of pairs, got {sections!r}")
    if sum(sections) != pairs or 3 * sections[1] - 2 >= pairs or 3 * sections[2] - 1 >= pairs:
        raise config.error(f"{field}.mrope_section", f"{list(sections)} does not divide {pairs} pairs in turn")
    return tuple(sections)


def read_partial(config: ConfigReader, head_dim: int, default: float) -> int:
    """How much of a head turns, in elements: its first ones, by `partial_rotary_factor`."""
    _, nested = rope_values(config)
    found = next((v["partial_rotary_factor"] for v in (nested, config.values) if "partial_rotary_factor" in v), default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= 1:
        raise config.error("partial_rotary_factor", f"must be a number above 0 and at most 1, got {found!r}")
    width = int(head_dim * found)
    if not width or width % 2:
        raise config.error("partial_rotary_factor", f"{found} of {head_dim} is {width}, which are not pairs")
    return width


def refuse_partial(config: ConfigReader) -> None:
    """For families whose heads turn whole."""
    field, nested = rope_values(config)
    if config.values.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise config.error("partial_rotary_factor", "other than 1 is not supported")
    if nested.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise config.error(f"{field}.partial_rotary_factor", "other than 1 is not supported")


def _yarn_attention(rope: ConfigReader, factor: float) -> float:
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor", 1.0)
    mscale, mscale_all_dim = _number(rope, "mscale"), _number(rope, "mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor)


def _number(rope: ConfigReader, field: str) -> float:
    """A positive number; 0 where there is none."""
    return rope.number(field, 1.0) if rope.values.get(field) else 0.0
