"""The state machine: ``apply_entry(state, index, entry) -> Applied``, pure and total.

Runs on every node for every committed entry, in order. It never raises for a command: what cannot be done is an
``Outcome`` with an error, the same on every node, and leaves the jobs as they were. What a command does is up to its
handler (``handlers``, one module per noun); here is what all commands have in common: each takes effect once.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from distroml import commands as c
from distroml.commands import Entry, Outcome
from distroml.consensus.handlers import checkpoints, generations, jobs, nodes
from distroml.consensus.handlers.change import Context, Handlers, Refused
from distroml.consensus.state import (
    MAX_KEYS,
    MAX_OUTSTANDING,
    ClusterState,
    KeyRecord,
    ProposerRecord,
)
from distroml.model import Event


class Applied(Struct, frozen=True):
    """What one entry led to."""

    state: ClusterState
    outcome: Outcome
    events: tuple[Event, ...] = ()


def apply_entry(state: ClusterState, index: int, entry: Entry) -> Applied:
    """Apply one decoded entry: at most once per (proposer, incarnation, sequence)."""
    state = replace(state, index=index)
    record = state.proposers.get(entry.proposer, ProposerRecord(entry.incarnation))
    if entry.incarnation < record.incarnation:
        outcome = Outcome(
            index,
            "stale-proposer",
            f"{entry.proposer} restarted (incarnation {record.incarnation}); a proposal of "
            f"incarnation {entry.incarnation} has no effect any more",
        )
        return Applied(_count(state, outcome.error), outcome)
    if entry.incarnation > record.incarnation:
        record = ProposerRecord(entry.incarnation)
    known = record.outcomes.get(entry.sequence)
    if known is not None:
        return Applied(state, known)
    if entry.sequence < record.settled:
        return Applied(state, Outcome(index, "stale-proposer", "this proposal was settled before"))
    applied = _once(state, index, entry)
    return replace(applied, state=_remember(applied.state, entry, record, applied.outcome))


def _once(state: ClusterState, index: int, entry: Entry) -> Applied:
    command = entry.command
    context = Context(index, entry.at)
    try:
        replayed = _replayed(state, command)
        if replayed is not None:
            return Applied(state, replayed)
        change = _HANDLERS[type(command)](state, context, command)
    except Refused as refusal:
        return Applied(_count(state, refusal.slug), Outcome(index, refusal.slug, refusal.detail))
    outcome = Outcome(index, job_id=change.job_id)
    return Applied(_keep_key(change.state, command, outcome), outcome, change.events)


# --- remembering what was done ---------------------------------------------------------------------------------


def _remember(
    state: ClusterState, entry: Entry, record: ProposerRecord, outcome: Outcome
) -> ClusterState:
    settled = max(record.settled, entry.settled)
    outcomes = {seq: kept for seq, kept in record.outcomes.items() if seq >= settled}
    outcomes[entry.sequence] = outcome
    while len(outcomes) > MAX_OUTSTANDING:
        oldest = min(outcomes)
        del outcomes[oldest]
        settled = oldest + 1
    updated = ProposerRecord(entry.incarnation, settled, outcomes)
    return replace(state, proposers={**state.proposers, entry.proposer: updated})


def _replayed(state: ClusterState, command: c.AnyCommand) -> Outcome | None:
    if not isinstance(command, c.Write) or command.key is None:
        return None
    record = state.keys.get(command.key)
    if record is None:
        return None
    if record.request_sha256 != command.request_sha256:
        raise Refused(
            "idempotency-key-reused",
            f"Idempotency-Key '{command.key}' was used before with a different request; "
            "use a new key for a new request.",
        )
    return replace(record.outcome, replayed=True)


def _keep_key(state: ClusterState, command: c.AnyCommand, outcome: Outcome) -> ClusterState:
    if not isinstance(command, c.Write) or command.key is None:
        return state
    keys = {**state.keys, command.key: KeyRecord(command.request_sha256, outcome)}
    while len(keys) > MAX_KEYS:
        del keys[next(iter(keys))]
    return replace(state, keys=keys)


def _count(state: ClusterState, slug: str) -> ClusterState:
    return replace(state, refused={**state.refused, slug: state.refused.get(slug, 0) + 1})


_HANDLERS: Final[Handlers] = {
    **nodes.HANDLERS,
    **jobs.HANDLERS,
    **generations.HANDLERS,
    **checkpoints.HANDLERS,
}
