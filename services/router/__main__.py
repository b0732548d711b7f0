"""`python -m services.router --config FILE`: the OpenAI API of a cluster."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Sequence

import uvloop

from common.config.load import load
from common.config.schema import RouterConfig
from common.errors import ConfigError
from common.rpc.membership import Membership
from common.rpc.tls import configure_tls
from common.telemetry import configure_logging, flush_logs
from common.telemetry.spans import close_tracing, configure_tracing
from services.router.server import Router
from services.router.workers import Shared, Supervisor, stop_with_parent


async def serve(config: RouterConfig, shared: Shared | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once."""
    stop = _signalled()
    if shared is not None:
        stop_with_parent(stop.set)
    members = Membership(config.controllers, watcher_id=f"router-{config.host}:{config.port}-{os.getpid()}")
    router = Router(config, members, shared=shared)
    await router.start()
    members.start()
    _relax_collector()
    try:
        await stop.wait()
    finally:
        await router.stop()
        await members.stop()


async def supervise(config: RouterConfig, file: str | None) -> int:
    """`config.workers` routers on one port, until SIGTERM or SIGINT; returns the exit code."""
    argv = [sys.executable, "-m", "services.router", *(("--config", file) if file else ())]
    supervisor = Supervisor(config, argv)
    stop = _signalled()
    told = asyncio.create_task(stop.wait())
    told.add_done_callback(lambda _: supervisor.stop())
    try:
        return await supervisor.run()
    finally:
        told.cancel()


def _signalled() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def _relax_collector() -> None:
    """What was imported stays, and the garbage collector looks at what came since only now and then.

    An answered request leaves nothing in cycles (a test holds it), so there is little to find; a cut one leaves some
    eighty objects. A collection amid 256 requests takes 20 ms, which all of them wait for.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 4, 4)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.router", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file; the defaults serve one machine")
    parser.add_argument("--share", type=int, metavar="PORT", help=argparse.SUPPRESS)  # by the supervisor of several
    parser.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config, os.environ)
        configure_logging(config.log, "router")
        configure_tracing(config.log, "router", os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""))
        configure_tls(config.tls)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if arguments.share is not None:
                runner.run(serve(config.router, Shared(arguments.share, arguments.index)))
            elif config.router.workers > 1:
                return runner.run(supervise(config.router, arguments.config))
            else:
                runner.run(serve(config.router))
    except ConfigError as error:
        flush_logs()
        print(f"router: {error.message}", file=sys.stderr)
        return 2
    finally:
        close_tracing()
    return 0


if __name__ == "__main__":
    sys.exit(main())
