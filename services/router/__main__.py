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
from common.telemetry import configure_logging
from services.router.server import Router


async def serve(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    members = Membership(config.controllers, watcher_id=f"router-{config.host}:{config.port}")
    router = Router(config, members)
    await router.start()
    members.start()
    _relax_collector()
    try:
        await stop.wait()
    finally:
        await router.stop()
        await members.stop()


def _relax_collector() -> None:
    """What was imported stays: the garbage collector looks at what came since, and not at every few requests.

    What is left in a cycle and has outlived a collection waits for one of the next generation, which must not be too
    far off: with (20, 50), when a cut stream still left some eighty objects in cycles, 200 of them cost 4 MB.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 4, 4)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.router", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file; the defaults serve one machine")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config, os.environ)
        configure_logging(config.log, "router")
        configure_tls(config.tls)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config.router))
    except ConfigError as error:
        print(f"router: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
