"""Choose the attention backend once, at start, by what each one declares it can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from common.attention import cpu, fixed, flashinfer, flashmla, reference
from common.attention.capability import Capability, Needs
from common.attention.context import AttentionBackend
from common.errors import ConfigError

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class Registration:
    """`prepare`: what must be done once before `create`, as compiling kernels."""

    capability: Callable[[], Capability]
    create: Callable[[], AttentionBackend]
    prepare: Callable[[Needs], None] = lambda _: None


REGISTERED: tuple[Registration, ...] = (
    Registration(cpu.capability, cpu.CpuBackend),
    Registration(flashinfer.capability, flashinfer.FlashInferBackend, flashinfer.prepare),
    Registration(flashmla.capability, flashmla.FlashMlaBackend, flashmla.prepare),
    Registration(fixed.capability, fixed.FixedBackend),
    Registration(reference.capability, reference.ReferenceBackend),
)
"""Best first: `auto` takes the first that can."""


@dataclass(frozen=True)
class Choice:
    """`refusals`: backend -> why it was not taken."""

    backend: AttentionBackend
    refusals: dict[str, str]


def choose(requested: str, needs: Needs, registered: tuple[Registration, ...] = REGISTERED) -> Choice:
    """`requested`: a backend's name, or auto. ConfigError, with all reasons, if it (or none) can serve."""
    refusals: dict[str, str] = {}
    taken: Registration | None = None
    names = []
    for entry in registered:
        able = entry.capability()
        names.append(able.name)
        if requested not in ("auto", able.name):
            refusals[able.name] = f"{requested} was asked for"
        elif taken is not None:
            refusals[able.name] = "another one comes first"
        elif why := able.refusal(needs):
            refusals[able.name] = why
        else:
            taken = entry
    if requested != "auto" and requested not in names:
        raise ConfigError(
            f"no attention backend {requested!r}: there are {', '.join(names)}", param="attention_backend"
        )
    if taken is None:
        tried = {n: why for n, why in refusals.items() if requested in ("auto", n)}
        reasons = "; ".join(f"{n} cannot: {why}" for n, why in tried.items())
        raise ConfigError(f"no attention backend for this model: {reasons}", param="attention_backend")
    taken.prepare(needs)
    choice = Choice(taken.create(), refusals)
    _log.info("attention_backend", backend=choice.backend.name, not_taken=refusals)
    return choice
