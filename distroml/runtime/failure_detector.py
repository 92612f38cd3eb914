"""Who is gone: from what the leader heard of each node to ALIVE, SUSPECT or LOST, with the reason.

Pure; the coordinator feeds it one ``NodeObservation`` per registered node and hands the verdicts on to
``runtime.reconciler``. Two signals count. A *closed connection* is strong: the kernel of a node closes it the
moment the process dies, so only a short silence must follow (a node that merely lost its link reconnects within
it). *Silence* on an open connection is weak (a loaded host is slow too) and takes longer.

What the leader itself missed is never held against a node: a new leader, and one whose own loop stood still,
first listens for a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from msgspec import Struct


class Health(StrEnum):
    """The detector's opinion of one node; only LOST has consequences."""

    ALIVE = "ALIVE"
    SUSPECT = "SUSPECT"
    LOST = "LOST"


class DetectorSettings(Struct, frozen=True, kw_only=True):
    """Thresholds in seconds on the leader's monotonic clock."""

    closed_silence_s: float = 0.5
    """LOST when the connection has been closed, and nothing was heard, for this long."""
    silence_s: float = 3.0
    """LOST when nothing was heard for this long although the connection is open."""
    suspect_silence_s: float = 1.0
    """SUSPECT when nothing was heard for this long on an open connection."""
    first_word_s: float = 3.0
    """How long a node that this leader never heard may take, counted from its election."""


class NodeObservation(Struct, frozen=True, kw_only=True):
    """What the leader knows of one node's voice. Times are the leader's monotonic seconds."""

    node: str
    incarnation: int
    """The one last heard; the registered one if nothing was heard."""
    last_heard_s: float | None
    connected: bool
    down_since_s: float | None = None
    """When the connection was seen closed; None while it is open or if there never was one."""


class Verdict(Struct, frozen=True, kw_only=True):
    """The opinion of one node and why."""

    node: str
    incarnation: int
    health: Health
    reason: str


class Listening(Struct, frozen=True, kw_only=True):
    """Since when the leader can judge others at all (its monotonic seconds)."""

    own_node: str
    leader_since_s: float
    awake_since_s: float = 0.0
    """End of the last time that the leader's own loop stood still."""


_DEFAULTS = DetectorSettings()


def assess(
    observations: Iterable[NodeObservation],
    *,
    now_s: float,
    listening: Listening,
    settings: DetectorSettings = _DEFAULTS,
) -> dict[str, Verdict]:
    """Verdict of each observed node, by name in sorted order."""
    verdicts = (judge(o, now_s=now_s, listening=listening, settings=settings) for o in observations)
    return {v.node: v for v in sorted(verdicts, key=lambda v: v.node)}


def judge(
    seen: NodeObservation,
    *,
    now_s: float,
    listening: Listening,
    settings: DetectorSettings = _DEFAULTS,
) -> Verdict:
    """The verdict of one node. The leader's own node is always ALIVE."""
    if seen.node == listening.own_node:
        health, reason = Health.ALIVE, "this node leads"
    elif seen.last_heard_s is None:
        health, reason = _never_heard(now_s, listening, settings)
    elif seen.connected:
        health, reason = _open(seen.last_heard_s, now_s, listening, settings)
    else:
        health, reason = _closed(seen, seen.last_heard_s, now_s, listening, settings)
    return Verdict(node=seen.node, incarnation=seen.incarnation, health=health, reason=reason)


_Opinion = tuple[Health, str]


def _never_heard(now_s: float, listening: Listening, settings: DetectorSettings) -> _Opinion:
    waited_s = now_s - max(listening.leader_since_s, listening.awake_since_s)
    if waited_s >= settings.first_word_s:
        return Health.LOST, f"never heard in {waited_s:.1f} s since the election"
    return Health.SUSPECT, "not heard yet since the election"


def _open(
    last_heard_s: float, now_s: float, listening: Listening, settings: DetectorSettings
) -> _Opinion:
    # An agent may report to the leader only, so silence before the election proves nothing.
    since_s = max(last_heard_s, listening.leader_since_s, listening.awake_since_s)
    silent_s = now_s - since_s
    if silent_s >= settings.silence_s:
        return Health.LOST, f"silent for {silent_s:.1f} s"
    if silent_s >= settings.suspect_silence_s:
        return Health.SUSPECT, f"silent for {silent_s:.1f} s"
    return Health.ALIVE, "heard"


def _closed(
    seen: NodeObservation,
    last_heard_s: float,
    now_s: float,
    listening: Listening,
    settings: DetectorSettings,
) -> _Opinion:
    # A follower sees connections close just as a leader does, so the election does not restart this one:
    # the node of the leader that died is LOST as soon as its successor looks.
    down_s = last_heard_s if seen.down_since_s is None else seen.down_since_s
    silent_s = now_s - max(last_heard_s, down_s, listening.awake_since_s)
    reason = f"connection closed and silent for {max(0.0, silent_s):.1f} s"
    return (Health.LOST if silent_s >= settings.closed_silence_s else Health.SUSPECT), reason
