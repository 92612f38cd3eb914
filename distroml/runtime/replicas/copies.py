"""All of this package on one node: builds its parts, answers its peers, starts and stops."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from distroml.consensus.state import ClusterState
from distroml.model import Node, NodeStatus
from distroml.runtime.replicas.bringing import Bringer
from distroml.runtime.replicas.cluster_store import ClusterStore
from distroml.runtime.replicas.exchange import Exchange, Links
from distroml.runtime.replicas.fetching import Fetcher
from distroml.runtime.replicas.for_workers import ForWorkers
from distroml.runtime.replicas.keeping import Keeper, Neighbours
from distroml.runtime.replicas.own_copies import OwnCopies
from distroml.runtime.replicas.upkeep import Upkeep
from distroml.runtime.replicas.wire import ABSENT, File

LEFT_S = 600.0
"""For how long a learner that said goodbye may be back with all it had: hosts are restarted in good order, too.

Not less than that after this node began: where all were stopped, the others may only be slower to begin again. Voters
are part of the cluster for good, and may always be back.
"""

_log = logging.getLogger(__name__)


class Copies:
    """The copies that this node has, makes and fetches.

    Args:
        voters: of the cluster; every node has links with them, learners have none with each other.
        directory: this node's own part of the store ``local``.
        current: whether ``state`` has all that was acknowledged before this node began; once true, it stays true.
        shared: returns once other nodes have what this one has recorded of a job by now.
        landed: called with the path of each file that came from another node.
        leaving: whether this node is about to stop.
    """

    def __init__(
        self,
        *,
        node: str,
        voters: frozenset[str],
        directory: Path,
        links: Links,
        state: Callable[[], ClusterState],
        current: Callable[[], bool],
        leads: Callable[[], bool],
        shared: Callable[[str], Awaitable[None]] | None = None,
        landed: Callable[[str], None] = lambda path: None,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._node, self._voters = node, voters
        self._state, self._current, self._leaving = state, current, leaving
        self._begun_s = time.time()
        self.own = OwnCopies(directory, landed)
        self._exchange = Exchange(links)
        self._fetcher = Fetcher(self.own, self._exchange)
        self._keeper = Keeper(node, self._exchange, self.neighbours, self._replicas)
        self.bringer = Bringer(node, self.own, self._fetcher, self.neighbours)
        self.store = ClusterStore(self.own, self._exchange, self._keeper)
        self.for_workers = ForWorkers(self._keeper, self.bringer, state, current, shared)
        self.upkeep = Upkeep(
            node,
            voters,
            own=self.own,
            exchange=self._exchange,
            fetcher=self._fetcher,
            bringer=self.bringer,
            state=state,
            leads=leads,
            monotonic=time.monotonic,
        )

    def start(self) -> None:
        """Answer peers and look after copies from now on."""
        self._exchange.start(self)
        self.store.start()
        self.upkeep.start()

    async def stop(self) -> None:
        """End all that is under way; it is begun again by whoever needs it."""
        await self.upkeep.stop()
        await self.for_workers.stop()
        await self._fetcher.stop()
        await self._exchange.stop()
        self.own.close()

    def neighbours(self) -> Neighbours:
        """The other nodes by the log."""
        others = dict(self._state().nodes)
        own = others.pop(self._node, None)
        draining = own is not None and own.status is NodeStatus.DRAINING
        return Neighbours(
            others=frozenset(
                name
                for name, node in others.items()
                if node.status is NodeStatus.ALIVE and self._may_link(name)
            ),
            complete=self._current(),
            must_share=draining or self._leaving() or self._node not in self._voters,
            may_have=self._voters - {self._node}
            | {name for name, node in others.items() if self._may_be_back(node)},
        )

    def _may_be_back(self, node: Node) -> bool:
        """Whether a learner is there, or may be again."""
        since_s = max(node.changed_at, self._begun_s)
        return node.status is not NodeStatus.LEFT or time.time() - since_s < LEFT_S

    def _may_link(self, name: str) -> bool:
        """Learners have links with voters only."""
        return self._node in self._voters or name in self._voters

    @property
    def counts(self) -> dict[str, int]:
        """What happened to files, for ``/metrics``."""
        kept, fetched = self._keeper.counts, self._fetcher.counts
        return {
            **{f"copies_{name}": count for name, count in kept.items()},
            **fetched,
            "mended": self.bringer.counts["mended"],
            "restored": self.upkeep.counts["restored"],
            "not_restored": self.upkeep.counts["failed"],
            "messages_refused": self._exchange.counts["refused"],
            "messages_malformed": self._exchange.counts["malformed"],
        }

    @property
    def bytes_moved(self) -> dict[str, int]:
        """Bytes of files, by direction."""
        counts = self._exchange.counts
        return {"sent": counts["sent_bytes"], "received": counts["received_bytes"]}

    def _replicas(self, job_id: str) -> int | None:
        job = self._state().jobs.get(job_id)
        return job.spec.checkpointing.replicas if job else None

    # --- what peers ask ----------------------------------------------------------------------------------------

    async def holds(self, files: tuple[File, ...]) -> tuple[int, ...]:
        return await self.own.run(partial(self.own.sizes, files))

    async def part(self, path: str, offset: int, length: int) -> tuple[bytes, int]:
        return await self.own.run(partial(self.own.part, path, offset, length))

    async def keep(self, file: File, sources: tuple[str, ...]) -> None:
        if await self.own.run(partial(self.own.size, file)) == ABSENT:
            await self._fetcher.fetch(file, sources)

    async def listing(self, directory: str, after: str) -> tuple[str, ...]:
        return await self.own.run(partial(self.own.listing, directory, after))

    async def doubt(self, file: File) -> None:
        problem = await self.own.run(partial(self.own.drop_if_broken, file))
        if problem:
            _log.error(
                "copies: this node (%s) drops its broken %s: %s", self._node, file.path, problem
            )
