"""Configuration of every component."""

from common.config.schema import (
    ClusterConfig,
    ControllerConfig,
    EngineConfig,
    HandoffConfig,
    LogConfig,
    RouterConfig,
    SpeculativeConfig,
    TlsConfig,
    UcxConfig,
    WorkerConfig,
)

__all__ = [
    "ClusterConfig",
    "ControllerConfig",
    "EngineConfig",
    "HandoffConfig",
    "LogConfig",
    "RouterConfig",
    "SpeculativeConfig",
    "TlsConfig",
    "UcxConfig",
    "WorkerConfig",
]
