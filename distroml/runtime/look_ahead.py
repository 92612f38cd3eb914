"""What follows from a failure at once: the next generation, decided with it and proposed in the same breath.

Pure. A recovery would otherwise wait for two commits one after the other, and training stands still meanwhile. So the
decision to fail a generation is carried out on a copy of the state, and if the next generation can be formed there,
that is decided too. Both entries reach the log in order; the state machine refuses the second without the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from distroml.commands import Entry, FailGeneration, FormGeneration, MarkCheckpointCorrupt
from distroml.consensus.machine import apply_entry
from distroml.consensus.state import ClusterState
from distroml.runtime.decisions import Decision, WriteManifest
from distroml.runtime.facts import Facts, Now, ReconcilerSettings, look
from distroml.runtime.reconciler import reconcile

_PROPOSER = "look-ahead"


def with_next_generations(
    state: ClusterState,
    facts: Facts,
    now: Now,
    settings: ReconcilerSettings,
    decisions: Sequence[Decision],
) -> list[Decision]:
    """The decisions, with the next generation of each job that fails one now, where it can be formed at once."""
    failing = [d.action for d in decisions if isinstance(d.action, FailGeneration)]
    if not failing:
        return list(decisions)
    ahead = state
    for number, decision in enumerate(decisions):
        if not isinstance(decision.action, FailGeneration | MarkCheckpointCorrupt | FormGeneration):
            continue
        entry = Entry(_PROPOSER, 1, number, 0, now.wall_s, decision.action)
        applied = apply_entry(ahead, ahead.index + 1, entry)
        if applied.outcome.error:
            return list(decisions)  # the log will say so too; the next turn knows why
        ahead = applied.state
    jobs = {action.job_id for action in failing}
    writing = {
        (effect.job_id, effect.generation, effect.step)
        for effect in (decision.action for decision in decisions)
        if isinstance(effect, WriteManifest)
    }
    seen = look(
        facts,
        ahead,
        facts.nodes,
        now,
        writing=facts.writing | writing,
        write_failures=facts.write_failures,
    )
    following = [
        replace(decision, together=True)
        for decision in reconcile(ahead, seen, now, settings)
        if isinstance(decision.action, FormGeneration) and decision.action.job_id in jobs
    ]
    return [*decisions, *following]
