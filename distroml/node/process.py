"""The process ``distroml-node``: settings, signals, the data directory, and one life of the node after another."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from distroml.config import NodeConfig, load
from distroml.consensus.raft_types import ConsensusError
from distroml.errors import ConfigError
from distroml.node.composition import Node
from distroml.node.endings import SHUTDOWN_LIMIT_S, NodeBroken, directory_errors, leave_within
from distroml.node.registration import Reincarnate
from distroml.runtime.identity import DataDirectory
from distroml.settings import unknown_variables

_log = logging.getLogger("distroml.node")


async def _serve(config: NodeConfig) -> None:
    stop = asyncio.Event()

    def ask_to_stop() -> None:
        if not stop.is_set():
            leave_within(SHUTDOWN_LIMIT_S)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    directory = DataDirectory(
        config.data_dir, name=config.name, cluster_id=config.settings.cluster_id
    )
    at_least = 1
    try:
        directory.claim_store(config.store_dir)
        while not stop.is_set():
            try:
                with directory_errors(config):
                    node = Node(config, directory.next_incarnation(at_least))
                await node.run(stop)
            except Reincarnate as again:
                _log.warning("starting anew: %s", again)
                at_least = again.at_least
    finally:
        directory.close()


def _leave_quietly(number: int, frame: object) -> NoReturn:
    """A signal before anything was started."""
    sys.exit(0)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``distroml-node``."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_quietly)
    try:
        config = load(sys.argv[1:] if argv is None else argv, os.environ)
        logging.basicConfig(
            level=config.settings.log_level.upper(),
            format=f"%(asctime)s %(levelname)-7s {config.name} %(name)s: %(message)s",
            stream=sys.stderr,
        )
        for warning in unknown_variables(os.environ):
            _log.warning("%s", warning)
        asyncio.run(_serve(config))
    except ConfigError as error:
        print(f"distroml-node: {error.detail}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (NodeBroken, ConsensusError) as error:
        print(f"distroml-node: {error}", file=sys.stderr)
        sys.exit(1)
