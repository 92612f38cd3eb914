"""What the HTTP layer needs of a node, as protocols: the only door between ``http`` and the rest.

``distroml.node`` implements ``Services`` over the replica, the proposer, the observed reports and the history
store; tests implement it in memory. Everything here is called in the event loop and must not block it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from distroml.commands import AnyCommand, Outcome
from distroml.consensus.state import ClusterState
from distroml.http.job_events import JobEvents
from distroml.http.limits import HttpSettings
from distroml.http.tally import Tally
from distroml.model import Checkpoint
from distroml.reports import NodeReport
from distroml.runtime.checkpoint.examination import FileCheck, Survey
from distroml.runtime.checkpoint.manifest import Manifest


class RaftView(Protocol):
    """The part of ``consensus`` status that is shown."""

    @property
    def role(self) -> str: ...
    @property
    def term(self) -> int: ...
    @property
    def leader(self) -> str | None: ...
    @property
    def voters(self) -> tuple[str, ...]: ...
    @property
    def commit_index(self) -> int: ...
    @property
    def applied_index(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class ObservedNode(Protocol):
    """The last report of a node as this one received it."""

    @property
    def report(self) -> NodeReport: ...
    @property
    def age_s(self) -> float: ...
    @property
    def connected(self) -> bool: ...


class Counter(Struct, frozen=True, kw_only=True):
    """A number of another part of the node, for ``/metrics``; names end in ``_total`` if they only grow."""

    name: str
    value: float
    help: str = ""
    labels: dict[str, str] = {}


class MetricPoint(Struct, frozen=True, kw_only=True):
    """The values of one completed step, as one rank reported them."""

    step: int
    epoch: int
    generation: int
    rank: int
    at: float
    values: dict[str, float]


class LogLine(Struct, frozen=True, kw_only=True):
    """One line that a worker wrote."""

    generation: int
    rank: int
    at: float
    line: str


class Series(Struct, frozen=True, kw_only=True):
    """One metric over steps, thinned to a bounded number of points, first and last kept."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    total: int
    """Points before thinning."""


class MetricNames(Struct, frozen=True, kw_only=True):
    """Which metrics a job has."""

    names: tuple[str, ...]
    complete: bool
    """False where there are more than history keeps track of."""


class HistoryBatch(Struct, frozen=True, kw_only=True):
    """Records after a position, each with the position right after it."""

    records: tuple[tuple[MetricPoint | LogLine, str], ...]
    position: str
    """Where to read on; moves past records that are no longer kept."""
    more: bool
    """True where another batch is ready now."""


class History(Protocol):
    """Metrics and logs of jobs, as every voter keeps them."""

    async def metric_names(self, job_id: str) -> MetricNames: ...
    async def metric_series(
        self, job_id: str, name: str, from_step: int, to_step: int | None, max_points: int
    ) -> Series: ...
    def latest_metrics(self, job_id: str) -> Mapping[str, float]:
        """Newest value of each metric; from memory, empty where nothing is known."""
        ...

    async def log_lines(self, job_id: str, rank: int | None, tail: int) -> Sequence[LogLine]: ...
    def end_position(self, job_id: str) -> str:
        """The position after everything known now: URL-safe text, as all positions are."""
        ...

    async def read_after(self, job_id: str, position: str | None, limit: int) -> HistoryBatch:
        """Records after ``position`` (None: from the oldest kept), in a stable order.

        Positions are the same on every node.

        Raises:
            ValueError: ``position`` is not one of this store's.
        """
        ...

    def watch(self, job_id: str, wake: asyncio.Event) -> AbstractContextManager[None]:
        """Sets ``wake`` whenever a record of the job arrives; ends with the context."""
        ...


class CheckpointFiles(Protocol):
    """The files of checkpoints, as this node reaches them; see ``distroml.checkpoint_files``."""

    async def describe(self, checkpoint: Checkpoint) -> Manifest: ...
    async def verify(
        self, checkpoint: Checkpoint, others: Collection[Checkpoint]
    ) -> list[FileCheck]: ...
    async def survey(self, store: str, *, thorough: bool) -> Survey: ...
    def export(
        self, checkpoint: Checkpoint, *, everything: bool
    ) -> AbstractAsyncContextManager[Path]: ...


class Services(Protocol):
    """One node, as the HTTP layer sees it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def settings(self) -> HttpSettings: ...
    @property
    def events(self) -> JobEvents: ...
    @property
    def history(self) -> History: ...
    @property
    def files(self) -> CheckpointFiles: ...
    @property
    def tally(self) -> Tally: ...
    def state(self) -> ClusterState:
        """The newest applied state; immutable."""
        ...

    async def state_digest(self) -> tuple[int, str]:
        """Log index and SHA-256 of a state not older than the call; other work goes on meanwhile."""
        ...

    def raft(self) -> RaftView: ...
    def observed(self) -> Mapping[str, ObservedNode]:
        """Newest report per node, this one's included."""
        ...

    async def propose(self, command: AnyCommand, timeout_s: float) -> Outcome:
        """Put a command into the log; returns when *this* node has applied it.

        Raises:
            Unavailable: nothing was done.
            OutcomeUnknown: it may still happen.
        """
        ...

    async def read_barrier(self, timeout_s: float) -> None:
        """Return once this node has applied all that was acknowledged anywhere before the call.

        Raises:
            Unavailable: no leader with a majority confirmed it in time.
        """
        ...

    async def transfer_leadership(self, target: str | None, timeout_s: float) -> str:
        """Have leadership handed to ``target`` (None: to the most advanced voter); who leads then.

        Raises:
            NotFound: there is no such node.
            Conflict: it cannot lead, or did not take over in time; the old leader leads on.
            Unavailable: nobody leads now.
        """
        ...

    def caught_up(self) -> bool:
        """False after a start, until all that was acknowledged before is part of ``state``; then always true."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether this node can serve, and if not, why."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Further JSON-able facts for ``/health``."""
        ...

    def counters(self) -> Iterable[Counter]:
        """Further numbers for ``/metrics``: peer links, write-ahead log, refused entries."""
        ...
