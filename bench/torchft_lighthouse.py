"""torchft's lighthouse as a part of a measurement: it tells replica groups who is in the next step.

Run by ``bench.torchft``; a process of its own, as a user would have it.
"""

from __future__ import annotations

import asyncio

from torchft.coordination import LighthouseServer

from bench.players import take_orders


class Lighthouse:
    """At most one server, until the process ends."""

    def __init__(self) -> None:
        self._server: LighthouseServer | None = None

    async def serve(self, **settings: int) -> str:
        """Listen on a free port of loopback; the address for replica groups."""
        self._server = LighthouseServer(bind="127.0.0.1:0", **settings)
        return f"http://127.0.0.1:{self._server.address().rpartition(':')[2]}"


if __name__ == "__main__":
    asyncio.run(take_orders({"serve": Lighthouse().serve}))
