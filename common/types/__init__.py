"""Plain data shared by all components."""

from common.types.clock import Clock, MonotonicClock
from common.types.message import Failure, Message
from common.types.request import (
    ChoiceDelta,
    EmbeddingHandle,
    FinishReason,
    GenerationRequest,
    RequestStats,
    SamplingParams,
    TokenLogprobs,
)
from common.types.worker import (
    BlockStates,
    ModelInfo,
    Role,
    WorkerInfo,
    WorkerLoad,
    WorkerRef,
    WorkerState,
    new_epoch,
)

__all__ = [
    "BlockStates",
    "ChoiceDelta",
    "Clock",
    "EmbeddingHandle",
    "Failure",
    "FinishReason",
    "GenerationRequest",
    "Message",
    "ModelInfo",
    "MonotonicClock",
    "RequestStats",
    "Role",
    "SamplingParams",
    "TokenLogprobs",
    "WorkerInfo",
    "WorkerLoad",
    "WorkerRef",
    "WorkerState",
    "new_epoch",
]
