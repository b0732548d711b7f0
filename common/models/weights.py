"""Fill a model's tensors: all of them, with nothing left over, or not at all.

    headers -> quantised tensors found (`common.models.stored`) -> forms chosen by what is there
    -> names and shapes checked -> copied tensor by tensor, straight into the packed place

A wrong checkpoint is one ConfigError that lists everything wrong with it, raised before any weight is read.
Files are mapped and read in their own order; beside the model itself only pages of the one tensor in hand
are touched.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from common.attention.context import DTYPES
from common.errors import ConfigError
from common.layers.base import Build, Init, Slot, TensorParallel
from common.layers.fp8_weight import BLOCK_SHAPE, fill_drawn, fill_quantised
from common.layers.quant_spec import QuantSpec
from common.models.checkpoint import TensorInfo, read_index
from common.models.decoder import DecoderModel
from common.models.fp8_choice import WHOLE_SHAPE, FP8Choice, stays_as_stored
from common.models.kv_scales import is_scale
from common.models.registry import model_class
from common.models.spec import ModelSpec
from common.models.stored import Assembled, Files, Part, Plain, Scaled, Stored, assemble, box, modules_of
from common.models.stream import Wanted, is_streamable, stream

Progress = Callable[[str, int, int], None]
"""(tensor name, bytes done, bytes in all), after each tensor."""

_DUMMY_STD = 0.02
_DRAWN_AT_ONCE = 2**26  # elements that are drawn on a GPU beside the model
_MAX_LISTED = 40


def load_model(
    spec: ModelSpec,
    *,
    dtype: str,
    device: torch.device,
    max_positions: int = 0,
    tp: TensorParallel | None = None,
    load_format: str = "auto",
    quantization: str = "auto",
    fixed: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> DecoderModel:
    """The model with its weights in place, ready for `forward` under inference mode.

    `max_positions`: 0 takes the checkpoint's. `load_format`: auto reads the folder's safetensors, dummy draws
    weights from `seed`. `quantization`: auto keeps a checkpoint's FP8 weights as they are where the device multiplies
    them, fp8 quantises other weights to that form too, but those that the checkpoint's config excludes, none turns all
    of them into `dtype`. `fixed`: see `Build`.
    ConfigError lists all that is wrong with the checkpoint. torch.OutOfMemoryError: a GPU has no room for the model.
    """
    in_fp8, tp = keeps_fp8(spec.quant, quantization, dtype, device), tp or TensorParallel()
    in_fp4 = spec.quant is not None and spec.quant.fp4_experts
    build = Build(DTYPES[dtype], device, tp, in_fp8, in_fp8 and not in_fp4, fixed=fixed)
    try:
        model = model_class(spec.model_type)(spec, build, max_positions or spec.max_position_embeddings)
    except ValueError as e:
        raise ConfigError(f"{spec.model_type} cannot be split over {build.tp.size} ranks: {e}") from None
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except (ArithmeticError, MemoryError, RuntimeError) as e:  # sizes that no machine, or not this one, has room for
        raise ConfigError(f"{spec.folder}: the model that config.json describes cannot be made here: {e}") from e
    choice = FP8Choice(spec.quant, quantization == "fp8", build.dtype, tp.rank, tp.size)
    choice.say_turned(in_fp8)
    if load_format == "dummy":
        choice.settle(drawn_slots(model.slots()), None)
        draw_weights(model, seed)
    else:
        load_weights(model, read_index(spec.folder), choice, progress)
    with torch.inference_mode():
        model.derive()
    return model


def keeps_fp8(quant: QuantSpec | None, quantization: str, dtype: str, device: torch.device) -> bool:
    """Are weights multiplied in FP8? ConfigError where that is asked for and cannot be."""
    can = device.type == "cuda" and dtype == "bfloat16"
    if quantization == "fp8" and not can:
        raise ConfigError(
            f"quantization fp8 needs a GPU and bfloat16, not {device.type} and {dtype}", param="quantization"
        )
    stored = quant is not None and quant.method == "fp8" and quant.block in (BLOCK_SHAPE, WHOLE_SHAPE)
    return can and (quantization == "fp8" or (quantization == "auto" and stored))


@torch.inference_mode()
def load_weights(
    model: DecoderModel,
    tensors: Mapping[str, TensorInfo],
    choice: FP8Choice,
    progress: Progress | None = None,
) -> None:
    """Copy every tensor of `tensors` into its slots. ConfigError if names, shapes or dtypes do not match exactly."""
    found = assemble(rename(tensors, model.renamed), choice.quant)
    stored = found.stored
    slots, mixed = choose_forms(model.slots(), stored)
    _check(slots, found, choice.quant, model.ignored, mixed)
    if choice.settle(slots, stored):
        slots, _ = choose_forms(model.slots(), stored)
    todo = sorted((s for s in slots if s.name in stored), key=lambda s: _place(stored[s.name].parts[0], s))
    total = sum(part.nbytes for name in {s.name for s in todo} for part in stored[name].parts)
    done = 0
    wanted = [(slot, _streamed(slot, stored[slot.name])) for slot in todo]
    todo = [slot for slot, some in wanted if not some]
    for one in stream([one for _, some in wanted for one in some]):
        done += one.nbytes
        if progress is not None:
            progress(one.info.name, done, total)
    files = Files()
    for name, parts in itertools.groupby(todo, key=lambda s: s.name):
        for slot in parts:
            _fill(slot, stored[name], files)
        done += sum(part.nbytes for part in stored[name].parts)
        if progress is not None:
            progress(name, done, total)


def rename(tensors: Mapping[str, TensorInfo], renamed: Sequence[tuple[str, str]]) -> Mapping[str, TensorInfo]:
    """A checkpoint's tensors by the names that the model has for them. ConfigError where two would be one."""
    if not renamed:
        return tensors
    patterns = [(re.compile(pattern), ours) for pattern, ours in renamed]
    out: dict[str, TensorInfo] = {}
    for info in tensors.values():
        name = info.name
        for pattern, ours in patterns:
            if found := pattern.match(name):
                name = found.expand(ours) + name[found.end() :]
        if name in out:
            names = f"{out[name].name_in_file} and {info.name_in_file}"
            raise ConfigError(f"checkpoint holds one tensor under two names: {names}")
        out[name] = replace(info, name=name, stored_as=info.name_in_file)
    return out


def choose_forms(slots: Iterable[Slot], tensors: Mapping[str, Stored]) -> tuple[list[Slot], list[str]]:
    """Of each layer that offers its tensors in several forms the slots of one; and what is wrong with the choice.

    The form that fits best: most tensors there and of the right shape; of equal ones the first that is offered.
    """
    chosen: list[Slot] = []
    owners: dict[str, dict[str, list[Slot]]] = {}
    for slot in slots:
        if slot.form:
            owners.setdefault(slot.owner, {}).setdefault(slot.form, []).append(slot)
        else:
            chosen.append(slot)
    mixed: list[str] = []
    for owner, forms in owners.items():
        here = {form: [s for s in found if s.name in tensors] for form, found in forms.items()}
        fits = {form: sum(tensors[s.name].shape == s.shape for s in found) for form, found in here.items()}
        best = max(forms, key=lambda form: (fits[form] / len(forms[form]), len(here[form])))
        chosen += forms[best]
        names = {s.name for s in forms[best]}
        others = [form for form, found in here.items() if any(s.name not in names for s in found)]
        if here[best] and others:
            mixed.append(f"mixed: {owner}* is both {best} and {others[0]}")
    return chosen, mixed


@torch.inference_mode()
def draw_weights(model: DecoderModel, seed: int) -> None:
    """Random weights that depend on seed, tensor name and shape alone: ranks draw the same and keep their part.

    Where they are drawn on a GPU they also depend on its kind.
    """
    for slot in drawn_slots(model.slots()):
        if slot.twin:
            continue
        if slot.init in (Init.ONES, Init.ZEROS):
            slot.target.fill_(1.0 if slot.init is Init.ONES else 0.0)
        elif slot.target.device.type == "cpu":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {slot.name}".encode()))
            whole = _drawn(slot, slot.shape, torch.float32, generator)
            _put(slot, slot.target, whole.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))
        else:
            _draw_on_device(slot, seed)


def drawn_slots(slots: Iterable[Slot]) -> list[Slot]:
    """Those to draw. On a GPU a layer's form of the fewest tensors: each costs a few launches, whatever its size."""
    slots = list(slots)
    if not slots or slots[0].target.device.type == "cpu":
        return choose_forms(slots, {})[0]
    counts = Counter((slot.owner, slot.form) for slot in slots)
    forms: dict[str, str] = {}
    for (owner, form), count in counts.items():
        if owner not in forms or count < counts[owner, forms[owner]]:
            forms[owner] = form
    return [slot for slot in slots if forms[slot.owner] == slot.form]


def _draw_on_device(slot: Slot, seed: int) -> None:
    """A run of rows at a time, each from a seed of its own: what another rank holds is skipped."""
    rows = slot.shape[0]
    step = max(1, _DRAWN_AT_ONCE // max(1, math.prod(slot.shape[1:])))
    first, end = (slot.start, slot.start + slot.target.shape[0]) if slot.dim == 0 else (0, rows)
    for row in range(first - first % step, end, step):
        generator = torch.Generator(slot.target.device).manual_seed(zlib.crc32(f"{seed} {slot.name} {row}".encode()))
        held = slot.scales is None and slot.target.dtype != torch.float32  # else as a checkpoint would hold it
        dtype = slot.target.dtype if held else torch.bfloat16
        run = _drawn(slot, (min(step, rows - row), *slot.shape[1:]), dtype, generator)
        here = slice(max(row, first), min(row + run.shape[0], end))
        run = run[here.start - row : here.stop - row]
        if slot.dim:
            run = run.narrow(slot.dim, slot.start, slot.target.shape[slot.dim])
        _put(slot, slot.target[here.start - first : here.stop - first], run)


def _put(slot: Slot, target: torch.Tensor, values: torch.Tensor) -> None:
    """Drawn numbers into a part of the slot's target."""
    if slot.scales is None:
        target.copy_(values)
    else:
        fill_drawn(target, slot.scales, values, _DUMMY_STD)


def _drawn(slot: Slot, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    if slot.init is Init.INDEX:
        return torch.randint(slot.num_values, shape, generator=generator, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, _DUMMY_STD, generator=generator)


def _place(info: TensorInfo, slot: Slot) -> tuple[bool, str, int]:
    """Order of reading: twins after what they repeat, else as the bytes lie."""
    return slot.twin, str(info.file), info.offset


def _streamed(slot: Slot, stored: Stored) -> list[Wanted]:
    """What of the files lands in the slot as it is, if it is on a GPU; nothing if its values must be looked at."""
    if not slot.target.is_cuda or slot.twin or slot.num_values:
        return []
    part = box(slot.shape, slot.dim, slot.start, slot.target.shape[slot.dim])
    if slot.scales is None:
        out = [Wanted(stored.info, part, slot.target)] if isinstance(stored, Plain) else []
    elif isinstance(stored, Scaled) and stays_as_stored(stored) and stored.block == BLOCK_SHAPE:
        out = [
            Wanted(stored.values, part, slot.target),
            Wanted(stored.scales, _scales_part(part, stored.block), slot.scales),
        ]
    else:
        out = []
    return out if all(is_streamable(one.info) for one in out) else []


def _scales_part(part: Part, block: tuple[int, int]) -> Part:
    blocks = (slice(p.start // n, -(-p.stop // n)) for p, n in zip(part[-2:], block, strict=True))
    return (*part[:-2], *blocks)


def _fill(slot: Slot, stored: Stored, files: Files) -> None:
    part = box(slot.shape, slot.dim, slot.start, slot.target.shape[slot.dim])
    if slot.scales is not None:
        _fill_fp8(slot, slot.scales, stored, files, part)
        return
    for place, values in stored.read(files, part):
        target = slot.target[place]
        if slot.num_values and values.numel() and not 0 <= int(values.min()) <= int(values.max()) < slot.num_values:
            raise ConfigError(f"{slot.name} holds numbers that are not in 0..{slot.num_values - 1}")
        if not slot.twin:
            target.copy_(values)
        elif not torch.equal(target, values.to(target.device, target.dtype)):
            raise ConfigError(f"{slot.name} differs from the embedding that config.json says it is tied to")


def _fill_fp8(slot: Slot, scales: torch.Tensor, stored: Stored, files: Files, part: Part) -> None:
    """Values and scales as they are stored if they have the layer's form, else quantised anew."""
    if isinstance(stored, Scaled) and stays_as_stored(stored):
        slot.target.copy_(files.view(stored.values)[part])
        scales.copy_(stored.read_scales(files)[_scales_part(part, stored.block)].float())
        return
    whole = torch.empty(slot.target.shape, dtype=torch.bfloat16)
    for place, values in stored.read(files, part):
        whole[place].copy_(values)
    fill_quantised(slot, whole)


def _lacks_scales(slot: Slot, stored: Stored, quant: QuantSpec) -> bool:
    """Is it a weight of a linear layer that the config says is quantised? Layers that are exact may have either."""
    is_linear = slot.holder is not None and not slot.holder.is_exact
    return is_linear and isinstance(stored, Plain) and quant.covers(*modules_of(stored.info))


def _check(
    slots: list[Slot], found: Assembled, quant: QuantSpec | None, ignored: tuple[str, ...], mixed: list[str]
) -> None:
    wrong = [*found.broken.values(), *mixed]
    wanted = {s.name: s for s in slots}
    assert all(s.form for s in slots if wanted[s.name] is not s), "two slots of one name"
    for slot in wanted.values():
        stored = found.stored.get(slot.name)
        if stored is None:
            if not slot.twin and slot.name not in found.broken:
                wrong.append(f"missing: {slot.name} {list(slot.shape)}")
        elif stored.shape != slot.shape:
            wrong.append(f"misshapen: {slot.name} is {list(stored.shape)}, the config wants {list(slot.shape)}")
        elif not stored.is_of(whole_numbers=slot.num_values > 0):
            wrong.append(f"of the wrong type: {slot.name} is {stored.parts[0].dtype}")
        elif quant is not None and _lacks_scales(slot, stored, quant):
            what = f"{slot.name} is {stored.parts[0].dtype} without scales"
            wrong.append(f"not quantised: {what}, and quantization_config.{quant.ignored_by} does not name it")
    skip = re.compile("|".join(ignored)) if ignored else None
    for name, stored in found.stored.items():
        if name not in wanted and not (skip and skip.fullmatch(name)) and not is_scale(name):
            wrong.append(f"unknown: {stored.parts[0].name_in_file} {list(stored.shape)}")
    if wrong:
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        raise ConfigError("checkpoint does not match its config.json: " + "; ".join(wrong[:_MAX_LISTED]) + more)
