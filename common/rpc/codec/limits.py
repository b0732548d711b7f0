"""API keys and slices of their limits <-> protobuf."""

from __future__ import annotations

import re

from common.rpc.codec import checks
from common.types.keys import ApiKey, Grant, Lease, LeaseAsk, Want
from nanodeploy.v1 import limits_pb2 as pb

MAX_UNITS = 2**48  # numbers that Lua and JSON hold exactly
_TENANT = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{0,128}")


def api_key_to_proto(key: ApiKey) -> pb.ApiKey:
    return pb.ApiKey(
        key_hash=bytes.fromhex(key.key_hash),
        name=key.name,
        tenant=key.tenant,
        priority=key.priority,
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        quota_tokens=key.quota_tokens,
        used_tokens=key.used_tokens,
        created_s=key.created_s,
        revoked=key.revoked,
    )


def api_key_from_proto(key: pb.ApiKey) -> ApiKey:
    """Raises `InvalidRequestError`. A key without a tenant is its own."""
    key_hash = _hash(key.key_hash)
    if _NAME.fullmatch(key.name) is None:
        raise checks.fail("name", "must be at most 128 characters, without control characters")
    tenant = key.tenant or key_hash[:12]
    if _TENANT.fullmatch(tenant) is None:
        raise checks.fail("tenant", "must be 1 to 64 letters, digits and _ . -")
    return ApiKey(
        key_hash=key_hash,
        name=key.name,
        tenant=tenant,
        priority=key.priority,
        requests_per_minute=_units(key.requests_per_minute, "requests_per_minute"),
        tokens_per_minute=_units(key.tokens_per_minute, "tokens_per_minute"),
        quota_tokens=_units(key.quota_tokens, "quota_tokens"),
        used_tokens=_units(key.used_tokens, "used_tokens"),
        created_s=_units(key.created_s, "created_s"),
        revoked=key.revoked,
    )


def ask_to_proto(ask: LeaseAsk) -> pb.LeaseAsk:
    requests, tokens, quota = (
        pb.Want(need=want.need, want=want.want, give_back=want.give_back)
        for want in (ask.requests, ask.tokens, ask.quota)
    )
    return pb.LeaseAsk(
        key_hash=bytes.fromhex(ask.key_hash),
        requests=requests,
        tokens=tokens,
        quota=quota,
        spent_tokens=ask.spent_tokens,
    )


def ask_from_proto(ask: pb.LeaseAsk) -> LeaseAsk:
    requests, tokens, quota = (
        Want(_units(want.need, name), _units(want.want, name), _units(want.give_back, name))
        for name, want in (("requests", ask.requests), ("tokens", ask.tokens), ("quota", ask.quota))
    )
    return LeaseAsk(_hash(ask.key_hash), requests, tokens, quota, _units(ask.spent_tokens, "spent_tokens"))


def lease_to_proto(lease: Lease) -> pb.Lease:
    requests, tokens, quota = (
        pb.Grant(granted=grant.granted, left=grant.left, wait_ms=grant.wait_ms)
        for grant in (lease.requests, lease.tokens, lease.quota)
    )
    return pb.Lease(key_hash=bytes.fromhex(lease.key_hash), requests=requests, tokens=tokens, quota=quota)


def lease_from_proto(lease: pb.Lease, num_routers: int) -> Lease:
    requests, tokens, quota = (
        Grant(grant.granted, grant.left, grant.wait_ms) for grant in (lease.requests, lease.tokens, lease.quota)
    )
    return Lease(lease.key_hash.hex(), requests, tokens, quota, num_routers)


def _hash(value: bytes) -> str:
    if len(value) != 32:
        raise checks.fail("key_hash", f"must be 32 bytes, got {len(value)}")
    return value.hex()


def _units(value: int, field: str) -> int:
    if value > MAX_UNITS:
        raise checks.fail(field, f"must be at most {MAX_UNITS}, got {value}")
    return value
