"""The command line of a worker: configuration in, one process until drained."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence

import uvloop

from common.config.load import load
from common.engine.sizing import resolve_engine
from common.errors import ConfigError, NanoDeployError
from common.rpc.tls import configure_tls
from common.telemetry import configure_logging, flush_logs
from common.telemetry.spans import close_tracing, configure_tracing
from common.types import Role
from services.worker.app import RolePart, WorkerApp


def run_worker(
    role: Role, make_part: Callable[[WorkerApp], RolePart], argv: Sequence[str], environ: Mapping[str, str]
) -> int:
    """Run until SIGTERM or a drain. Exit code 2 for a bad configuration or model, 1 for an engine that failed."""
    parser = argparse.ArgumentParser(prog=f"services.{role.value}_worker")
    parser.add_argument("--config", help="YAML file; environment variables NANODEPLOY_SECTION__FIELD override it")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config, environ)
        worker = config.prefill if role is Role.PREFILL else config.decode
        worker = worker.model_copy(update={"engine": resolve_engine(worker.engine, role)})
        configure_logging(config.log, f"{role.value}_worker")
        configure_tracing(config.log, f"{role.value}_worker", environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""))
        configure_tls(config.tls)

        gc.collect()
        gc.freeze()  # what was imported stays: a full collection that looks through it would hold tokens up

        async def serve() -> None:
            await WorkerApp(role, worker, config.log, environ, make_part).run()

        uvloop.run(serve())
    except NanoDeployError as error:
        flush_logs()
        print(f"error: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        close_tracing()
    return 0
