"""Why a generation is over: from facts about its ranks to one ``Cause`` and a sentence.

Pure; used by ``runtime.reconciler``. Each rank gives at most one ``Evidence``. When one rank dies, the collectives
of the others break within milliseconds, so most evidence is *echo*; the cause is the first that is not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from distroml.model import Cause, Culprit, FailureKind, Generation, Job, Member
from distroml.reports import CHECKPOINT_ERRORS, WorkerFact, WorkerPhase
from distroml.runtime.facts import (
    Facts,
    ReconcilerSettings,
    is_out,
    ranks_of,
    seats,
    sighting_of,
)
from distroml.runtime.node_survey import GoneNode, Survey

MAX_ERROR_BYTES = 1024
MAX_TRACEBACK_BYTES = 8192
MAX_LAST_LINES = 20
MAX_LINE_BYTES = 400
MAX_CULPRITS = 128
"""Where more fail at once they are dead anyway, and nobody has to kill them."""
STILL_S = 2.0
"""Ranks that advanced within this time train."""
MAX_REASON_BYTES = 500
"""Together well under ``commands.MAX_ENTRY_BYTES``."""

_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by peer|broken pipe|socket closed",
    re.IGNORECASE,
)
"""What the end of a peer looks like to a rank that did not recognise it as an echo itself."""


class Evidence(Struct, frozen=True, kw_only=True):
    """What speaks against one rank."""

    rank: int
    node: str
    kind: FailureKind
    said: str
    """End of a sentence that starts with the worker or the node."""
    at: float
    """Unix seconds on the clock of whoever saw it; orders the evidence."""
    echo: bool = False
    of_node: bool = False
    """True where the node is to blame: all its ranks go with it."""
    joins: bool = False
    """True of a rank that a planned change would add: those that train do not need it."""
    culprit: Culprit | None = None
    """The process, where it is known."""
    fact: WorkerFact | None = None


class Blame(Struct, frozen=True, kw_only=True):
    """The verdict over a failed generation."""

    cause: Cause
    collateral: tuple[int, ...]
    culprits: tuple[Culprit, ...] = ()
    observed_at: float
    reason: str
    """Without the ``generation 4:`` in front."""
    echoes_only: bool
    """True while no root cause is known."""


def gather(
    job: Job,
    generation: Generation,
    facts: Facts,
    survey: Survey,
    settings: ReconcilerSettings,
    *,
    wall_s: float,
    may_move: bool = False,
) -> list[Evidence]:
    """All that speaks against the ranks of ``generation``, by rank; while a planned change lasts, also those before.

    Args:
        wall_s: the present (Unix seconds).
        may_move: whether ranks on nodes that shut down are about to be moved.
    """
    known = seats(job, generation, facts)
    before = ranks_of(job, job.outgoing, facts) if job.outgoing else {}
    scene = _Scene(job, generation, facts, survey, settings, wall_s, may_move)
    found: list[Evidence] = []
    for member in generation.members:
        joins = job.outgoing is not None and member.rank in generation.joining
        evidence = _against(scene, member, known.get(member.rank))
        if evidence is not None:
            found.append(replace(evidence, joins=joins))
    if found and all(one.echo for one in found):
        found += _of_nodes_cut_off(scene, known, {one.rank for one in found})
    places = {(member.rank, member.node) for member in generation.members}
    for member in job.outgoing.members if job.outgoing else ():
        fact = before.get(member.rank)
        stays = (member.rank, member.node) in places
        # Who has left the generation after the last step is not needed any more.
        if not stays and fact is not None and fact.parked_at is None:
            evidence = _against(scene, member, fact)
            if evidence is not None:
                found.append(evidence)
    return found


class _Scene(Struct, frozen=True):
    job: Job
    generation: Generation
    facts: Facts
    survey: Survey
    settings: ReconcilerSettings
    wall_s: float
    may_move: bool


def _against(scene: _Scene, member: Member, fact: WorkerFact | None) -> Evidence | None:
    if fact is not None and fact.outcome is not None:
        return None  # its work is done and its last shard durable, whatever became of it since
    node_gone = scene.survey.gone(member)
    # A node that announced its end explains how its workers ended.
    left = node_gone is not None and node_gone.kind is FailureKind.NODE_LEFT
    if fact is not None and is_out(fact):
        if not left:
            return _of_worker(member, fact)
    elif scene.may_move:
        node_gone = scene.survey.gone(member, may_move=True)
    if node_gone is not None and node_gone.kind is FailureKind.NODE_LOST and _trains_on(scene):
        return None
    if node_gone is not None:
        return _of_node(scene, member, node_gone, fact)
    if fact is None:
        return _of_absence(scene.job, member, scene.generation, scene.facts, scene.settings)
    return None


def blame(
    evidence: Sequence[Evidence],
    generation: Generation,
    wall_s: float,
    outgoing: Generation | None = None,
) -> Blame:
    """Choose the root cause among at least one piece of evidence.

    Genuine before echo, then the earliest, then the lowest rank.
    """
    root = min(evidence, key=lambda e: (e.echo, e.at, e.rank))
    guilty = [e for e in evidence if e is root or not (e.echo or (e.joins and not root.joins))]
    own_fault = {e.rank for e in guilty}
    together = [e.rank for e in evidence if root.of_node and e.of_node and e.node == root.node]
    ranks = all_ranks(generation, outgoing)
    return Blame(
        cause=_cause(root, alone=len(together) <= 1),
        collateral=tuple(rank for rank in ranks if rank not in own_fault),
        culprits=tuple(sorted({e.culprit for e in guilty if e.culprit})[:MAX_CULPRITS]),
        observed_at=min(root.at, wall_s),
        reason=clip(_sentence(root, together), MAX_REASON_BYTES),
        echoes_only=root.echo,
    )


def all_ranks(generation: Generation, outgoing: Generation | None) -> list[int]:
    """The ranks of a generation and of the one that it is to relieve."""
    both = generation.members + (outgoing.members if outgoing else ())
    return sorted({member.rank for member in both})


def describe_end(fact: WorkerFact) -> str:
    """How a worker ended, such as ``killed by SIGKILL``."""
    if fact.failure is not None:
        error = clip(fact.failure.error, MAX_ERROR_BYTES)
        return f"lost its peers: {error}" if _is_echo(fact) else f"failed: {error}"
    if _is_bereft(fact):
        return f"has nothing to go on from: {clip(fact.parked_reason, MAX_ERROR_BYTES)}"
    if fact.exit_code is None and fact.phase is WorkerPhase.PARKED:
        return f"lost its peers: {clip(fact.parked_reason, MAX_ERROR_BYTES)}"
    if fact.exit_code is None:
        return "failed without saying why"
    if fact.exit_code < 0:
        return f"killed by {signal_name(fact.exit_code)}"
    return f"exited with code {fact.exit_code} before it finished"


def signal_name(exit_code: int) -> str:
    """The signal of a negative exit code, such as ``SIGKILL``."""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def clip(text: str, limit_bytes: int) -> str:
    """The beginning of ``text``, at most ``limit_bytes`` in UTF-8."""
    return text.encode()[:limit_bytes].decode(errors="ignore")


def clip_front(text: str, limit_bytes: int) -> str:
    """The end of ``text``, at most ``limit_bytes`` in UTF-8: a traceback ends with what matters."""
    return text.encode()[-limit_bytes:].decode(errors="ignore")


def ranks_text(ranks: Sequence[int]) -> str:
    """Such as ``rank 2`` or ``ranks 2, 3``."""
    return f"rank{'s'[: len(ranks) != 1]} {', '.join(map(str, ranks))}"


def _of_nodes_cut_off(
    scene: _Scene, known: Mapping[int, WorkerFact], out: set[int]
) -> Iterator[Evidence]:
    """Ranks of nodes whose connection closed while others lost their peers: one explains the other.

    The failure detector alone would have to wait, since a closed connection by itself says little.
    """
    for member in scene.generation.members:
        node = scene.facts.nodes.get(member.node)
        if node is not None and not node.connected and member.rank not in out:
            gone = GoneNode(FailureKind.NODE_LOST, "lost (connection closed, as by its ranks)")
            yield _of_node(scene, member, gone, known.get(member.rank))


def _trains_on(scene: _Scene) -> bool:
    """Whether ranks of a node that is lost train, although its agent is silent: the others could not without them."""
    generation = scene.job.at_work or scene.generation
    views = scene.survey.views
    speaking = {name for name, view in views.items() if view.speaks}
    lost = [m for m in generation.members if m.node not in speaking]
    seen = ranks_of(scene.job, generation, scene.facts)
    heard = [seen.get(m.rank) for m in generation.members if m.node in speaking]
    if not heard or any(one is None or not _is_at_work(one) for one in heard):
        return False
    silent_s = max((_silent_s(scene, member) for member in lost), default=0.0)
    still_s = scene.facts.looked_s - sighting_of(scene.job, scene.facts).still_since_s
    slowest_s = max((one.timing.slowest_s for one in heard if one and one.timing), default=0.0)
    finished = any(one and one.outcome for one in heard)  # which takes all of them
    advances = finished or still_s < max(STILL_S, 2 * slowest_s)
    return advances and silent_s < scene.settings.agent_grace_s


def _is_at_work(fact: WorkerFact) -> bool:
    return fact.outcome is not None or fact.phase in (WorkerPhase.TRAINING, WorkerPhase.FINISHING)


def _silent_s(scene: _Scene, member: Member) -> float:
    node = scene.facts.nodes.get(member.node)
    if node is None or node.heard_at is None:
        return float("inf")
    return scene.wall_s - node.heard_at


def _of_worker(member: Member, fact: WorkerFact) -> Evidence:
    failure = fact.failure
    ended_at = fact.ended_at or fact.parked_at or fact.started_at
    return Evidence(
        rank=member.rank,
        node=member.node,
        kind=failure.kind if failure else _kind_of_end(fact),
        said=describe_end(fact),
        at=failure.at if failure else ended_at,
        echo=_is_echo(fact),
        culprit=None if _is_bereft(fact) else Culprit(member.node, fact.worker),
        fact=fact,
    )


def _is_bereft(fact: WorkerFact) -> bool:
    """Whether it lives and is sound, and tells what is wrong with its generation."""
    return fact.bereft and fact.phase is WorkerPhase.PARKED


def _kind_of_end(fact: WorkerFact) -> FailureKind:
    if _is_bereft(fact):
        return FailureKind.STATE_GONE
    return FailureKind.ERROR if fact.phase is WorkerPhase.PARKED else FailureKind.EXIT


def _is_echo(fact: WorkerFact) -> bool:
    failure = fact.failure
    if failure is None:
        return fact.phase is WorkerPhase.PARKED and not fact.bereft
    if failure.kind in CHECKPOINT_ERRORS:
        return False
    return failure.collateral or _ECHO.search(failure.error) is not None


def _of_node(scene: _Scene, member: Member, gone: GoneNode, fact: WorkerFact | None) -> Evidence:
    # It was alive when it last spoke, and what its end did to others came later: this puts it first.
    node = scene.facts.nodes.get(member.node)
    heard_at = node.heard_at if node else None
    return Evidence(
        rank=member.rank,
        node=member.node,
        kind=gone.kind,
        said=gone.said,
        at=scene.generation.formed_at if heard_at is None else heard_at,
        of_node=True,
        culprit=Culprit(member.node, fact.worker) if fact else None,
    )


def _of_absence(
    job: Job,
    member: Member,
    generation: Generation,
    facts: Facts,
    settings: ReconcilerSettings,
) -> Evidence | None:
    """An agent that knows of the generation but lists no such worker."""
    node = facts.nodes.get(member.node)
    report = node.report if node else None
    if node is None or report is None or not node.holds(member):
        return None
    sighting = sighting_of(job, facts)
    if report.applied_index < sighting.index:
        return None
    trained = generation.running_at is not None
    if not trained and not report.ready:
        return None  # it spawns as soon as its forkserver is warm; the start deadline bounds that
    wait_s = settings.gone_worker_wait_s if trained else settings.unspawned_wait_s
    if facts.looked_s - sighting.generation_since_s < wait_s:
        return None
    return Evidence(
        rank=member.rank,
        node=member.node,
        kind=FailureKind.EXIT,
        said="is gone: its agent does not list it",
        at=report.at,
    )


def _cause(root: Evidence, *, alone: bool) -> Cause:
    fact = root.fact
    failure = fact.failure if fact else None
    exit_code = fact.exit_code if fact else None
    return Cause(
        kind=root.kind,
        rank=root.rank if alone else None,
        node=root.node,
        pid=fact.pid if fact else None,
        exit_code=exit_code,
        signal=signal_name(exit_code) if exit_code is not None and exit_code < 0 else None,
        error=clip(failure.error, MAX_ERROR_BYTES) if failure else root.said,
        traceback=clip_front(failure.traceback, MAX_TRACEBACK_BYTES) if failure else None,
        last_lines=tuple(
            clip(line, MAX_LINE_BYTES)
            for line in (fact.last_lines[-MAX_LAST_LINES:] if fact else ())
        ),
    )


def _sentence(root: Evidence, together: Sequence[int]) -> str:
    if root.of_node:
        return f"node {root.node} {root.said}; {ranks_text(together)} with it"
    return f"worker {root.rank} on node {root.node} {root.said}"
