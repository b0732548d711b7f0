"""How codecs are tested: through bytes, on a few examples, and what they refuse by the field's name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from common.errors import InvalidRequestError

quick = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def through_bytes(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


def refused(field: str, decode: Any, *args: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(*args)
    assert caught.value.param == field
    assert caught.value.message
