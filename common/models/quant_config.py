"""The `quantization_config` of a config.json. No torch."""

from __future__ import annotations

import re

from common.layers.quant_spec import WHOLE, QuantSpec
from common.models.config_reader import ConfigReader

_FIELD = "quantization_config"
_UNCONVERTED = ("modules_to_not_convert", "ignored_layers")  # Transformers', and others', name of the same


def read_quant(*configs: ConfigReader) -> QuantSpec | None:
    """What the first of `configs` that has a `quantization_config` says. ConfigError for a scheme that is not known."""
    config = next((c for c in configs if c.values.get(_FIELD)), None)
    if config is None:
        return None
    quant = config.nested(_FIELD)
    if quant.choice("quant_method", "", ("fp8", "compressed-tensors")) == "fp8":
        experts = next((c for c in (quant, *configs) if c.values.get("expert_dtype")), quant)
        return _fp8(quant, experts.choice("expert_dtype", "fp8", ("fp8", "fp4")))
    _refuse_transforms(quant)
    is_float = quant.choice("format", "", ("pack-quantized", "float-quantized")) == "float-quantized"
    groups = quant.nested("config_groups")
    if len(groups.values) != 1:
        raise quant.error("config_groups", f"must be one group, got {len(groups.values)}")
    group = groups.nested(next(iter(groups.values)))
    return _compressed_fp8(quant, group) if is_float else _int4(quant, group)


def _refuse_transforms(quant: ConfigReader) -> None:
    """Rotations that are in the weights need nothing; those of activations would have to be computed."""
    schemes = (quant.values.get("transform_config") or {}).get("config_groups") or {}
    for place in (place for scheme in schemes.values() for place in scheme.get("apply", ())):
        if place.get("location") not in ("weight_input", "weight_output"):
            raise quant.error("transform_config", f"at {place.get('location')!r} is not supported: weights alone are")


def _fp8(quant: ConfigReader, expert_dtype: str) -> QuantSpec:
    """A scale per block of a weight (DeepSeek), or one for all of it; how activations are quantised is not read."""
    quant.choice("fmt", "e4m3", ("e4m3",))
    quant.choice("activation_scheme", "dynamic", ("dynamic", "static"))
    quant.choice("scale_fmt", "float", ("float", "ue8m0"))
    block, is_fp4 = (WHOLE, WHOLE), False
    if quant.values.get("weight_block_size") is not None:
        block, is_fp4 = _block(quant, "weight_block_size"), expert_dtype == "fp4"
    fields = [name for name in _UNCONVERTED if quant.values.get(name)] or _UNCONVERTED[:1]
    ignored = tuple(entry for name in fields for entry in _names(quant, name))
    return QuantSpec("fp8", block, is_fp4, ignored, " and ".join(fields), by_parts=True)


def _compressed_fp8(quant: ConfigReader, group: ConfigReader) -> QuantSpec:
    """compressed-tensors with E4M3 weights; how activations are quantised is not read."""
    weights = group.nested("weights")
    for name, wanted in (("num_bits", 8), ("type", "float"), ("symmetric", True)):
        if weights.values.get(name) != wanted:
            raise weights.error(name, f"{weights.values.get(name)!r} is not supported; supported is: {wanted!r}")
    strategy = weights.choice("strategy", "", ("tensor", "channel", "block"))
    blocks = {"tensor": (WHOLE, WHOLE), "channel": (1, WHOLE)}
    block = blocks.get(strategy) or _block(weights, "block_structure")
    return QuantSpec("fp8", block, ignored=_names(quant, "ignore"), targets=_targets(group))


def _int4(quant: ConfigReader, group: ConfigReader) -> QuantSpec:
    """compressed-tensors with 4-bit whole numbers in groups of a row, symmetric; activations are not quantised."""
    for field in ("input_activations", "output_activations"):
        if group.values.get(field):
            raise group.error(field, "are quantised, which is not supported")
    group.choice("format", "pack-quantized", ("pack-quantized",))
    weights = group.nested("weights")
    for name, wanted in (("num_bits", 4), ("type", "int"), ("strategy", "group"), ("symmetric", True)):
        if weights.values.get(name) != wanted:
            raise weights.error(name, f"{weights.values.get(name)!r} is not supported; supported is: {wanted!r}")
    for name in ("actorder", "dynamic"):
        if weights.values.get(name):
            raise weights.error(name, f"{weights.values[name]!r} is not supported")
    block = (1, weights.integer("group_size"))
    return QuantSpec("int4", block, ignored=_names(quant, "ignore"), targets=_targets(group))


def _targets(group: ConfigReader) -> tuple[str, ...]:
    return _names(group, "targets") or ("Linear",)


def _names(config: ConfigReader, field: str) -> tuple[str, ...]:
    """Names of modules, and regular expressions after "re:"."""
    names = config.values.get(field) or []
    if not isinstance(names, list) or not all(isinstance(entry, str) and entry for entry in names):
        raise config.error(field, f"must be a list of names, got {names!r}")
    for entry in names:
        if entry.startswith("re:"):
            try:
                re.compile(entry.removeprefix("re:"))
            except re.error as e:
                raise config.error(field, f"{entry!r} is no regular expression: {e}") from None
    return tuple(names)


def _block(config: ConfigReader, field: str) -> tuple[int, int]:
    block = config.values.get(field)
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(_is_count(n) for n in block):
        raise config.error(field, f"must be two positive integers, got {block!r}")
    return block[0], block[1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
