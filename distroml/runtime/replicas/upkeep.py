"""The leader's care for the copies of committed checkpoints: those that were lost are made again.

Level-triggered and without memory that a successor would miss: each round looks at checkpoints that have not been looked
at since the nodes became what they are, asks all nodes what they have, and has copied what too few of them have. What a
crash interrupts is found again. A node that is away for a moment only is waited for: nothing is copied meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.errors import DistroMLError, StoreError
from distroml.model import Checkpoint, CheckpointStatus, Node, NodeStatus
from distroml.runtime.checkpoint.stores.opening import LOCAL
from distroml.runtime.replicas import placement
from distroml.runtime.replicas.bringing import Bringer, manifest_file, shard_files
from distroml.runtime.replicas.exchange import Exchange, NotAnswered
from distroml.runtime.replicas.fetching import Fetcher
from distroml.runtime.replicas.own_copies import OwnCopies
from distroml.runtime.replicas.placement import Repair
from distroml.runtime.replicas.wire import ABSENT, File

LOOK_S = 2.0
"""Pause between two rounds, give or take a quarter."""
PATIENCE_S = 10.0
"""How long a node may be away before what it has counts as lost."""
CHECKPOINTS_PER_ROUND = 32
COPIES_AT_ONCE = 2
"""So many are made at a time: restores and new checkpoints come first."""
RETRY_S = 5.0
"""How long until a checkpoint that lacks copies is looked at again."""
RECHECK_S = 120.0
"""The same of one that lacks none, while no node comes or goes: disks lose files too."""

_log = logging.getLogger(__name__)


class _Look(Struct, frozen=True):
    """What was seen of one checkpoint."""

    nodes: Mapping[str, Node]
    """Nodes that could be asked then, as the log knew them."""
    lacking: int
    lost: int
    """Files that no node had."""
    again_s: float


class Upkeep:
    """Looks after the copies for as long as the node runs, and does something only while it leads.

    Args:
        voters: nodes that all others have links with.
        monotonic: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        node: str,
        voters: frozenset[str],
        *,
        own: OwnCopies,
        exchange: Exchange,
        fetcher: Fetcher,
        bringer: Bringer,
        state: Callable[[], ClusterState],
        leads: Callable[[], bool],
        monotonic: Callable[[], float],
    ) -> None:
        self._node, self._voters = node, voters
        self._own, self._exchange = own, exchange
        self._fetcher, self._bringer = fetcher, bringer
        self._state, self._leads, self._monotonic = state, leads, monotonic
        self._places = asyncio.Semaphore(COPIES_AT_ONCE)
        self._looks: dict[str, _Look] = {}
        """By directory."""
        self._absences = _Absences()
        self.task: asyncio.Task[None] | None = None
        self.counts = {"restored": 0, "failed": 0}

    @property
    def lacking(self) -> int:
        """Copies that committed checkpoints lack, as this leader saw last; 0 elsewhere."""
        return sum(look.lacking for look in self._looks.values())

    @property
    def lost(self) -> int:
        """Files of committed checkpoints that no node had, as this leader saw last; 0 elsewhere."""
        return sum(look.lost for look in self._looks.values())

    def start(self) -> None:
        """Begin the rounds."""
        self.task = asyncio.create_task(self._run(), name="upkeep")

    async def stop(self) -> None:
        """End them."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.25))
            try:
                await self.round()
            except Exception:  # one bad look must not end upkeep
                _log.exception("copies could not be looked after")

    async def round(self) -> None:
        """Look at the checkpoints that are due, as many as fit."""
        if not self._leads():
            self._looks.clear()
            self._absences.clear()
            return
        now_s, state = self._monotonic(), self._state()
        listed = {one.directory: (one, replicas) for one, replicas in _listed(state)}
        self._looks = {name: look for name, look in self._looks.items() if name in listed}
        reachable = {self._node, *self._exchange.connected()}
        if self._absences.wait(state.nodes, reachable, now_s):
            return
        nodes = {name: node for name, node in state.nodes.items() if name in reachable}
        due = [name for name in listed if self._is_due(name, nodes, now_s)]
        for name in due[:CHECKPOINTS_PER_ROUND]:
            if self._leads():
                checkpoint, replicas = listed[name]
                self._looks[name] = await self._look_after(checkpoint, replicas, nodes)

    def _is_due(self, directory: str, nodes: Mapping[str, Node], now_s: float) -> bool:
        look = self._looks.get(directory)
        return look is None or look.nodes != nodes or now_s >= look.again_s

    async def _look_after(
        self, checkpoint: Checkpoint, replicas: int | None, nodes: Mapping[str, Node]
    ) -> _Look:
        """Find what too few nodes have, and have it copied."""
        lacking = lost = 0
        try:
            held_by = await self._holders(checkpoint)
        except DistroMLError as error:
            _log.error("copies of step %d cannot be looked after: %s", checkpoint.step, error)
            lost, held_by = 1, {}
        staying = {name for name, node in nodes.items() if node.status is NodeStatus.ALIVE}
        copies = placement.wanted(replicas, len(staying))
        making = []
        for file, holders in held_by.items():
            if not holders:
                _log.error("copies: no node that can be reached has %s", file.path)
                lost += 1
                continue
            lacking += placement.lacking(holders, staying, copies, self._voters)
            repairs = placement.repairs(file.path, holders, staying, copies, self._voters)
            making += [self._make(checkpoint, file, one) for one in repairs]
        lacking -= sum(await asyncio.gather(*making))
        pause_s = RETRY_S if lacking or lost else RECHECK_S * random.uniform(0.75, 1.25)
        return _Look(nodes, lacking, lost, self._monotonic() + pause_s)

    async def _holders(self, checkpoint: Checkpoint) -> dict[File, set[str]]:
        manifest = await self._bringer.manifest(checkpoint, patience_s=0.0)
        files = [manifest_file(checkpoint), *shard_files(checkpoint, manifest)]
        found = await self._fetcher.sizes(files)
        here = await self._own.run(partial(self._own.sizes, files))
        for file, size in zip(files, here, strict=True):
            found[file][self._node] = size
        return {
            file: {node for node, size in sizes.items() if size != ABSENT}
            for file, sizes in found.items()
        }

    async def _make(self, checkpoint: Checkpoint, file: File, repair: Repair) -> bool:
        """Have one copy made; whether it was."""
        async with self._places:
            if checkpoint.directory not in {one.directory for one, _ in _listed(self._state())}:
                return True  # it is not needed any more
            try:
                if repair.target == self._node:
                    await self._fetcher.fetch(file, repair.sources)
                else:
                    await self._exchange.keep(repair.target, file, repair.sources)
            except (NotAnswered, StoreError) as error:
                self.counts["failed"] += 1
                _log.warning("copies: %s is not copied yet: %s", file.path, error)
                return False
            self.counts["restored"] += 1
            _log.info("copies: node %s has a copy of %s now", repair.target, file.path)
            return True


def _listed(state: ClusterState) -> Iterator[tuple[Checkpoint, int | None]]:
    """Checkpoints whose files are needed and kept by the nodes, with the copies that their jobs want."""
    for job in state.jobs.values():
        begun = [job.initial] if job.initial is not None and not job.terminal else []
        for one in (*begun, *job.checkpoints):
            if one.store == LOCAL and one.status is CheckpointStatus.COMMITTED:
                yield one, job.spec.checkpointing.replicas


class _Absences:
    """Who is away, and whether it is worth waiting for."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        """First sight of an absence, until the node has been back for as long as it may be away."""
        self._back_s: dict[str, float] = {}

    def clear(self) -> None:
        self._since_s.clear()
        self._back_s.clear()

    def wait(self, nodes: Mapping[str, Node], reachable: set[str], now_s: float) -> bool:
        """Whether a node is away and may soon be back."""
        for name in [name for name in self._since_s if name not in nodes]:
            del self._since_s[name]
            self._back_s.pop(name, None)
        away = []
        for name, node in nodes.items():
            if name in reachable:
                if (
                    name in self._since_s
                    and now_s - self._back_s.setdefault(name, now_s) >= PATIENCE_S
                ):
                    del self._since_s[name], self._back_s[name]
            elif node.status is not NodeStatus.LEFT:
                self._back_s.pop(name, None)
                away.append(self._since_s.setdefault(name, now_s))
        return any(now_s - since_s < PATIENCE_S for since_s in away)
