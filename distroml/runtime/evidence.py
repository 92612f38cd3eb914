"""Why a generation is over: from facts about its ranks to one ``Cause`` and a sentence.

Pure; used by ``runtime.reconciler``. Each rank gives at most one ``Evidence``. When one rank dies, the collectives
of the others break within milliseconds, so most evidence is *echo*; the cause is the first that is not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from msgspec import Struct

from distroml.model import Cause, FailureKind, Generation, Job, Member
from distroml.reports import WorkerFact
from distroml.runtime.facts import Facts, ReconcilerSettings, has_failed, members_facts, sighting_of
from distroml.runtime.node_survey import GoneNode, Survey

MAX_ERROR_BYTES = 1024
MAX_TRACEBACK_BYTES = 8192
MAX_LAST_LINES = 20
MAX_LINE_BYTES = 400
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
    fact: WorkerFact | None = None


class Blame(Struct, frozen=True, kw_only=True):
    """The verdict over a failed generation."""

    cause: Cause
    collateral: tuple[int, ...]
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
) -> list[Evidence]:
    """All that speaks against the ranks of ``generation``, by rank."""
    known = members_facts(job, facts)
    places = {(member.node, member.incarnation): member for member in generation.members}
    gone = {place: survey.gone(member) for place, member in places.items()}
    found: list[Evidence] = []
    for member in generation.members:
        fact = known.get(member.rank)
        if fact is not None and fact.outcome is not None:
            continue  # its work is done and its last shard durable, whatever became of it since
        node_gone = gone[member.node, member.incarnation]
        evidence: Evidence | None = None
        # A node that announced its end explains how its workers ended.
        left = node_gone is not None and node_gone.kind is FailureKind.NODE_LEFT
        if fact is not None and has_failed(fact) and not left:
            evidence = _of_worker(member, fact)
        elif node_gone is not None:
            evidence = _of_node(member, node_gone, generation, facts)
        elif fact is None:
            evidence = _of_absence(job, member, generation, facts, settings)
        if evidence is not None:
            found.append(evidence)
    return found


def blame(evidence: Sequence[Evidence], generation: Generation, wall_s: float) -> Blame:
    """Choose the root cause among at least one piece of evidence.

    Genuine before echo, then the earliest, then the lowest rank.
    """
    root = min(evidence, key=lambda e: (e.echo, e.at, e.rank))
    own_fault = {e.rank for e in evidence if not e.echo}
    together = [e.rank for e in evidence if root.of_node and e.of_node and e.node == root.node]
    ranks = [member.rank for member in generation.members]
    return Blame(
        cause=_cause(root, alone=len(together) <= 1),
        collateral=tuple(rank for rank in ranks if rank not in own_fault and rank != root.rank),
        observed_at=min(root.at, wall_s),
        reason=clip(_sentence(root, together), MAX_REASON_BYTES),
        echoes_only=root.echo,
    )


def describe_end(fact: WorkerFact) -> str:
    """How a worker ended, such as ``killed by SIGKILL``."""
    if fact.failure is not None:
        error = clip(fact.failure.error, MAX_ERROR_BYTES)
        return f"lost its peers: {error}" if _is_echo(fact) else f"failed: {error}"
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


def _of_worker(member: Member, fact: WorkerFact) -> Evidence:
    failure = fact.failure
    ended_at = fact.ended_at if fact.ended_at is not None else fact.started_at
    return Evidence(
        rank=member.rank,
        node=member.node,
        kind=failure.kind if failure else FailureKind.EXIT,
        said=describe_end(fact),
        at=failure.at if failure else ended_at,
        echo=_is_echo(fact),
        fact=fact,
    )


def _is_echo(fact: WorkerFact) -> bool:
    failure = fact.failure
    if failure is None or failure.kind is FailureKind.CORRUPT_CHECKPOINT:
        return False
    return failure.collateral or _ECHO.search(failure.error) is not None


def _of_node(member: Member, gone: GoneNode, generation: Generation, facts: Facts) -> Evidence:
    # It was alive when it last spoke, and what its end did to others came later: this puts it first.
    node = facts.nodes.get(member.node)
    heard_at = node.heard_at if node else None
    return Evidence(
        rank=member.rank,
        node=member.node,
        kind=gone.kind,
        said=gone.said,
        at=generation.formed_at if heard_at is None else heard_at,
        of_node=True,
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
    if report is None or report.incarnation != member.incarnation:
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
