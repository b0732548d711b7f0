"""`python -m services.controller --config FILE`: run one controller until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import uvloop

from common.config import ControllerConfig
from common.config.load import load
from common.errors import ConfigError
from common.rpc.tls import configure_tls
from common.telemetry import configure_logging, flush_logs
from services.controller.app import Controller


async def serve(config: ControllerConfig) -> None:
    controller = Controller(config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await controller.start()
    await stopping.wait()
    await controller.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.controller", description=__doc__)
    parser.add_argument("--config", help="YAML file; NANODEPLOY_CONTROLLER__PORT and the like override it")
    args = parser.parse_args()
    try:
        config = load(args.config, os.environ)
        configure_logging(config.log, "controller")
        configure_tls(config.tls)
        uvloop.run(serve(config.controller))
    except ConfigError as error:
        flush_logs()
        print(f"controller: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
