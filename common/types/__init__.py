"""Plain data shared by all components."""

from common.types.clock import Clock, MonotonicClock
from common.types.grammar import MAX_SOURCE_BYTES, Grammar, GrammarKind
from common.types.message import Failure, Message
from common.types.request import (
    ChoiceDelta,
    EmbeddingHandle,
    FinishReason,
    GenerationRequest,
    Pooling,
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
    "MAX_SOURCE_BYTES",
    "BlockStates",
    "ChoiceDelta",
    "Clock",
    "EmbeddingHandle",
    "Failure",
    "FinishReason",
    "GenerationRequest",
    "Grammar",
    "GrammarKind",
    "Message",
    "ModelInfo",
    "MonotonicClock",
    "Pooling",
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
