"""KVLayout and transport endpoints: what two workers tell each other at the handshake."""

from __future__ import annotations

from collections.abc import Sequence

from common.kvcache.layout import SCHEMA_VERSION, GroupSpec, KVLayout, RegionSpec, Retention, Sharding
from common.kvtransfer.transport import Endpoint, MemoryHandle
from common.rpc.codec import checks
from nanodeploy.v1 import prefill_pb2 as pb

MAX_GROUPS = 256
MAX_REGIONS = 1024

_RETENTION_TO_WIRE: dict[Retention, pb.RetentionKind] = {
    Retention.FULL: pb.RETENTION_KIND_FULL,
    Retention.WINDOW: pb.RETENTION_KIND_WINDOW,
    Retention.SNAPSHOT: pb.RETENTION_KIND_SNAPSHOT,
}
_RETENTION_FROM_WIRE: dict[int, Retention] = {number: kind for kind, number in _RETENTION_TO_WIRE.items()}
_SHARDING_TO_WIRE: dict[Sharding, pb.ShardingKind] = {
    Sharding.REPLICATED: pb.SHARDING_KIND_REPLICATED,
    Sharding.SPLIT: pb.SHARDING_KIND_SPLIT,
    Sharding.GROUPED: pb.SHARDING_KIND_GROUPED,
}
_SHARDING_FROM_WIRE: dict[int, Sharding] = {number: kind for kind, number in _SHARDING_TO_WIRE.items()}


def layout_to_proto(layout: KVLayout) -> pb.KvLayout:
    return pb.KvLayout(
        fingerprint=layout.fingerprint(),
        model_hash=layout.model_hash,
        adapter_id=layout.adapter_id,
        groups=[_group_to_proto(g) for g in layout.groups],
        regions=[_region_to_proto(r) for r in layout.regions],
        tp_size=layout.tp_size,
        tp_rank=layout.tp_rank,
        schema_version=layout.schema_version,
    )


def layout_from_proto(layout: pb.KvLayout, field: str = "layout") -> KVLayout:
    """The fingerprint must be that of the decoded layout; another schema version is left to `compare`."""
    checks.hash_bytes(layout.fingerprint, f"{field}.fingerprint")
    checks.at_least(layout.tp_size, 1, f"{field}.tp_size")
    if layout.tp_rank >= layout.tp_size:
        raise checks.fail(f"{field}.tp_rank", f"{layout.tp_rank} is not below tp_size {layout.tp_size}")
    if len(layout.groups) > MAX_GROUPS or len(layout.regions) > MAX_REGIONS:
        raise checks.fail(field, f"has over {MAX_GROUPS} groups or {MAX_REGIONS} regions")
    groups = tuple(_group_from_proto(g, f"{field}.groups[{i}]") for i, g in enumerate(layout.groups))
    regions = tuple(_region_from_proto(r, f"{field}.regions[{i}]") for i, r in enumerate(layout.regions))
    try:
        decoded = KVLayout(
            model_hash=checks.hash_bytes(layout.model_hash, f"{field}.model_hash"),
            groups=groups,
            regions=regions,
            adapter_id=layout.adapter_id,
            tp_size=layout.tp_size,
            tp_rank=layout.tp_rank,
            schema_version=layout.schema_version,
        )
    except ValueError as error:
        raise checks.fail(field, f"is not a layout: {error}") from error
    if decoded.schema_version == SCHEMA_VERSION and decoded.fingerprint() != layout.fingerprint:
        raise checks.fail(f"{field}.fingerprint", "is not that of the layout it comes with")
    return decoded


def _group_to_proto(group: GroupSpec) -> pb.KvGroup:
    return pb.KvGroup(
        name=group.name,
        retention=_RETENTION_TO_WIRE[group.retention],
        window=group.window,
        block_size=group.block_size,
        num_blocks=group.num_blocks,
    )


def _group_from_proto(group: pb.KvGroup, field: str) -> GroupSpec:
    return GroupSpec(
        name=checks.identifier(group.name, f"{field}.name"),
        retention=checks.enum_value(_RETENTION_FROM_WIRE, group.retention, f"{field}.retention"),
        block_size=checks.at_least(group.block_size, 1, f"{field}.block_size"),
        num_blocks=group.num_blocks,
        window=group.window,
    )


def _region_to_proto(region: RegionSpec) -> pb.KvRegion:
    return pb.KvRegion(
        name=region.name,
        group=region.group,
        dtype=region.dtype,
        scale_format=region.scale_format,
        num_layers=region.num_layers,
        num_parts=region.num_parts,
        num_units=region.num_units,
        width=region.width,
        sharding=_SHARDING_TO_WIRE[region.sharding],
        required=region.required,
        scales_hash=region.scales_hash,
    )


def _region_from_proto(region: pb.KvRegion, field: str) -> RegionSpec:
    return RegionSpec(
        name=checks.identifier(region.name, f"{field}.name"),
        group=region.group,
        dtype=region.dtype,
        num_layers=checks.at_least(region.num_layers, 1, f"{field}.num_layers"),
        num_parts=checks.at_least(region.num_parts, 1, f"{field}.num_parts"),
        num_units=checks.at_least(region.num_units, 1, f"{field}.num_units"),
        width=checks.at_least(region.width, 1, f"{field}.width"),
        sharding=checks.enum_value(_SHARDING_FROM_WIRE, region.sharding, f"{field}.sharding"),
        scale_format=region.scale_format,
        required=region.required,
        scales_hash=checks.hash_bytes(region.scales_hash, f"{field}.scales_hash", may_be_empty=True),
    )


def endpoint_to_proto(endpoint: Endpoint) -> pb.TransportEndpoint:
    return pb.TransportEndpoint(
        transport=endpoint.transport,
        address=endpoint.address,
        memory=[
            pb.MemoryHandle(group=m.group, base=m.base, nbytes=m.nbytes, remote_key=m.remote_key)
            for m in endpoint.memory
        ],
        hint=endpoint.hint,
    )


def endpoint_from_proto(endpoint: pb.TransportEndpoint, field: str = "endpoint") -> Endpoint:
    memory = tuple(_memory_from_proto(m, f"{field}.memory[{i}]") for i, m in enumerate(endpoint.memory))
    if len({m.group for m in memory}) != len(memory):
        raise checks.fail(f"{field}.memory", "names a group twice")
    return Endpoint(
        transport=checks.identifier(endpoint.transport, f"{field}.transport"),
        address=endpoint.address,
        memory=memory,
        hint=checks.short_text(endpoint.hint, f"{field}.hint"),
    )


def endpoints_from_proto(endpoints: Sequence[pb.TransportEndpoint], layout: KVLayout) -> tuple[Endpoint, ...]:
    """Endpoints of the owner of `layout`: every handle names a group of it and holds all its blocks."""
    decoded = tuple(endpoint_from_proto(e, f"endpoints[{i}]") for i, e in enumerate(endpoints))
    groups = {g.name: g for g in layout.groups}
    for i, endpoint in enumerate(decoded):
        for handle in endpoint.memory:
            group = groups.get(handle.group)
            if group is None:
                raise checks.fail(f"endpoints[{i}].memory", f"names group {handle.group!r}, absent from the layout")
            need = group.num_blocks * layout.block_nbytes(group.name)
            if handle.nbytes < need:
                raise checks.fail(
                    f"endpoints[{i}].memory", f"of group {handle.group} has {handle.nbytes} bytes, its blocks {need}"
                )
    return decoded


def _memory_from_proto(handle: pb.MemoryHandle, field: str) -> MemoryHandle:
    group = checks.identifier(handle.group, f"{field}.group")
    if handle.base + handle.nbytes > 2**64:
        raise checks.fail(f"{field}.nbytes", f"{handle.nbytes} runs past the end of the address space")
    return MemoryHandle(group, handle.base, handle.nbytes, handle.remote_key)
