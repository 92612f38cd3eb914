"""``python -m chaos.under_test.node``: ``distroml-node`` with failpoints, and with a mutant where one was asked for.

Nothing of the product is imported before both are in place. The forkserver is started through
``chaos.under_test.forkserver``, so that workers have them too.
"""

from __future__ import annotations

import asyncio
from typing import Any

from chaos.under_test import deaths, edits, failpoints

FORKSERVER = "distroml.runtime.worker.forkserver"
INSTEAD = "chaos.under_test.forkserver"


def reroute_forkserver() -> None:
    """Have the agent start our forkserver wherever it means to start the product's."""
    start: Any = asyncio.create_subprocess_exec

    async def rerouted(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process: asyncio.subprocess.Process = await start(
            *(INSTEAD if part == FORKSERVER else part for part in command), **options
        )
        return process

    setattr(asyncio, start.__name__, rerouted)


def main() -> None:
    """The process."""
    failpoints.install_if_asked()
    edits.install_if_asked()
    reroute_forkserver()
    from distroml.node.process import main as node

    deaths.install_if_asked(deaths.AGENT_POINTS)
    node()


if __name__ == "__main__":
    main()
