"""All kinds of faults, as data: what each does, what it needs of the machine, how long it lasts, what may be chosen.

``schedule`` draws from this table, ``faults`` knows how to inflict each of them, ``python -m chaos list-faults`` shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import Any

from msgspec import Struct


class Family(StrEnum):
    """What is broken."""

    PROCESS = "process"
    NETWORK = "network"
    DISK = "disk"
    STORE = "store"
    TIME = "time"


class Need(StrEnum):
    """What a fault needs of the machine."""

    NAMESPACES = "namespaces"
    """A network namespace per node: root, iproute2 and nftables."""
    DISKS = "disks"
    """A small tmpfs per node and for the store: root."""
    DELAYS = "delays"
    """A kernel with the queueing discipline netem, or with taps and traffic control for ``chaos.delayer``."""
    OBJECTS = "objects"
    """An object store like S3: the packages moto and aiobotocore."""


class Kind(Struct, frozen=True, kw_only=True):
    """One kind of fault."""

    name: str
    family: Family
    does: str
    needs: tuple[Need, ...] = ()
    lasts_s: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest; drawn evenly on a logarithmic scale. 0: it needs no taking back."""
    choices: dict[str, tuple[Any, ...]] = {}
    """What is drawn with it; resolved when it strikes ("leader" is whoever leads then)."""


_NODE = ("leader", "follower", "any")
_THEN = ("worker", "agent", "node", "leader")
_BLINK_OR_LONG = (0.1, 30.0)
_DOWN = (0.3, 10.0)
_P, _N, _D, _S = Family.PROCESS, Family.NETWORK, Family.DISK, Family.STORE
_CUT = (Need.NAMESPACES,)
_OBJECTS = (Need.OBJECTS,)

KINDS: tuple[Kind, ...] = (
    Kind(name="worker-kill", family=_P, does="SIGKILL of one worker", choices={"count": (1,)}),
    Kind(
        name="workers-kill",
        family=_P,
        does="SIGKILL of several workers at once",
        choices={"count": (2, 3, 4)},
    ),
    Kind(name="worker-term", family=_P, does="SIGTERM of one worker", choices={"count": (1,)}),
    Kind(
        name="worker-stop",
        family=_P,
        does="SIGSTOP of one worker, then SIGCONT",
        lasts_s=_BLINK_OR_LONG,
        choices={"count": (1,)},
    ),
    Kind(
        name="forkserver-kill",
        family=_P,
        does="SIGKILL of a node's forkserver, and so of its workers",
        choices={"node": _NODE},
    ),
    Kind(
        name="agent-kill",
        family=_P,
        does="SIGKILL of a node's agent alone; its workers may be adopted by the next one",
        lasts_s=_DOWN,
        choices={"node": ("follower", "any")},
    ),
    Kind(
        name="agent-term",
        family=_P,
        does="SIGTERM of a node's agent",
        lasts_s=_DOWN,
        choices={"node": _NODE},
    ),
    Kind(
        name="agent-stop",
        family=_P,
        does="SIGSTOP of a node's agent, then SIGCONT",
        lasts_s=_BLINK_OR_LONG,
        choices={"node": ("follower", "any")},
    ),
    Kind(
        name="leader-kill",
        family=_P,
        does="SIGKILL of the leader's agent",
        lasts_s=_DOWN,
        choices={"node": ("leader",)},
    ),
    Kind(
        name="leader-stop",
        family=_P,
        does="SIGSTOP of the leader's agent, then SIGCONT",
        lasts_s=_BLINK_OR_LONG,
        choices={"node": ("leader",)},
    ),
    Kind(
        name="node-off",
        family=_P,
        does="power failure of a node: agent, forkserver and workers at once",
        lasts_s=_DOWN,
        choices={"node": _NODE},
    ),
    Kind(name="majority-off", family=_P, does="power failure of a majority", lasts_s=_DOWN),
    Kind(name="all-off", family=_P, does="power failure of all nodes at once", lasts_s=_DOWN),
    Kind(
        name="kill-in-recovery",
        family=_P,
        does="kills a worker and, while its job recovers, something else",
        lasts_s=_DOWN,
        choices={"then": _THEN},
    ),
    Kind(
        name="kill-in-commit",
        family=_P,
        does="kills something when the files of a checkpoint appear and it is not committed",
        lasts_s=_DOWN,
        choices={"then": _THEN},
    ),
    Kind(
        name="kill-in-election",
        family=_P,
        does="kills the leader's agent and, while there is none, another one",
        lasts_s=_DOWN,
    ),
    Kind(
        name="crash-loop",
        family=_P,
        does="kills a node's agent again and again, soon after each start",
        lasts_s=(3.0, 15.0),
        choices={"node": ("follower", "any"), "up_s": (0.1, 0.6, 1.5)},
    ),
    Kind(
        name="partition",
        family=_N,
        does="cuts one node off from all others, both ways",
        needs=_CUT,
        lasts_s=(0.5, 15.0),
        choices={"node": ("follower", "any"), "clients": (False, True)},
    ),
    Kind(
        name="partition-one-way",
        family=_N,
        does="drops what a node sends, or what it should receive",
        needs=_CUT,
        lasts_s=(0.5, 15.0),
        choices={"node": _NODE, "way": ("inbound", "outbound")},
    ),
    Kind(
        name="link-cut",
        family=_N,
        does="cuts the link between two nodes; both still reach the others",
        needs=_CUT,
        lasts_s=(0.5, 15.0),
        choices={"node": _NODE},
    ),
    Kind(
        name="leader-isolated",
        family=_N,
        does="cuts the leader off from all other nodes; clients still reach it",
        needs=_CUT,
        lasts_s=(0.5, 15.0),
        choices={"node": ("leader",), "clients": (False,)},
    ),
    Kind(
        name="link-flaps",
        family=_N,
        does="cuts and mends a node's links again and again",
        needs=_CUT,
        lasts_s=(2.0, 15.0),
        choices={"node": _NODE, "period_s": (0.1, 0.5, 2.0)},
    ),
    Kind(
        name="delay",
        family=_N,
        does="delays what a node sends, with jitter",
        needs=(Need.NAMESPACES, Need.DELAYS),
        lasts_s=(2.0, 15.0),
        choices={"node": _NODE, "delay_ms": (5, 30, 120)},
    ),
    Kind(
        name="loss",
        family=_N,
        does="loses a part of the packets that a node sends",
        needs=_CUT,
        lasts_s=(2.0, 15.0),
        choices={"node": _NODE, "loss": (0.01, 0.05, 0.2)},
    ),
    Kind(
        name="slow-link",
        family=_N,
        does="bounds the rate at which a node sends: its peers and clients read slowly",
        needs=_CUT,
        lasts_s=(2.0, 15.0),
        choices={"node": _NODE, "rate_kbit": (256, 2_000, 20_000)},
    ),
    Kind(
        name="reset",
        family=_N,
        does="resets all connections of a node, those of its workers and clients included",
        needs=_CUT,
        lasts_s=(0.2, 1.0),
        choices={"node": _NODE},
    ),
    Kind(
        name="disk-full",
        family=_D,
        does="leaves no byte free on a node's disk",
        needs=(Need.DISKS,),
        lasts_s=(1.0, 12.0),
        choices={"node": _NODE},
    ),
    Kind(
        name="sync-error",
        family=_D,
        does="fsync fails with EIO on a node's disk (failpoint)",
        lasts_s=(0.5, 10.0),
        choices={"node": _NODE},
    ),
    Kind(
        name="sync-slow",
        family=_D,
        does="fsync takes longer on a node's disk (failpoint)",
        lasts_s=(2.0, 15.0),
        choices={"node": _NODE, "pause_s": (0.02, 0.2, 2.0)},
    ),
    Kind(
        name="shard-deleted",
        family=_D,
        does="deletes a file of a checkpoint, and perhaps kills all workers of its job",
        lasts_s=(3.0, 12.0),
        choices={"checkpoint": ("newest", "any"), "then_kill": (True, False)},
    ),
    Kind(
        name="shard-truncated",
        family=_D,
        does="cuts a file of a checkpoint short, and perhaps kills all workers of its job",
        lasts_s=(3.0, 12.0),
        choices={"checkpoint": ("newest", "any"), "then_kill": (True, False)},
    ),
    Kind(
        name="shard-flipped",
        family=_D,
        does="flips a bit in a file of a checkpoint, and perhaps kills all workers of its job",
        lasts_s=(3.0, 12.0),
        choices={"checkpoint": ("newest", "any"), "then_kill": (True, False)},
    ),
    Kind(
        name="directory-lost",
        family=_D,
        does="power failure of a node that comes back without its data directory; of a minority per run",
        lasts_s=(0.5, 8.0),
        choices={"node": _NODE},
    ),
    Kind(
        name="directory-stale",
        family=_D,
        does="power failure of a node that comes back with an older copy of all its data but the Raft log; likewise",
        lasts_s=(0.5, 6.0),
        choices={"node": _NODE, "age_s": (2.5, 5.0)},
    ),
    Kind(
        name="store-down",
        family=_S,
        does="the checkpoint store cannot be reached by anybody",
        lasts_s=(1.0, 12.0),
    ),
    Kind(
        name="store-full",
        family=_S,
        does="leaves no byte free in the checkpoint store",
        needs=(Need.DISKS,),
        lasts_s=(1.0, 12.0),
    ),
    Kind(
        name="store-slow",
        family=_S,
        does="fsync in the checkpoint store takes longer (failpoint)",
        lasts_s=(2.0, 15.0),
        choices={"pause_s": (0.1, 0.5, 2.0)},
    ),
    Kind(
        name="store-error",
        family=_S,
        does="fsync in the checkpoint store fails with EIO (failpoint)",
        lasts_s=(1.0, 12.0),
    ),
    Kind(
        name="s3-down",
        family=_S,
        does="the object store refuses connections, or resets them",
        needs=_OBJECTS,
        lasts_s=(1.0, 12.0),
        choices={"how": ("refused", "reset")},
    ),
    Kind(
        name="s3-slow",
        family=_S,
        does="the object store answers later",
        needs=_OBJECTS,
        lasts_s=(2.0, 15.0),
        choices={"delay_s": (0.2, 1.0, 5.0)},
    ),
    Kind(
        name="s3-errors",
        family=_S,
        does="the object store answers 503, or resets requests in the middle of a part or once they were done",
        needs=_OBJECTS,
        lasts_s=(1.0, 12.0),
        choices={"share": (0.3, 0.7, 1.0)},
    ),
    Kind(
        name="clock-jump",
        family=Family.TIME,
        does="the wall clock of a node's processes jumps, and back again",
        lasts_s=(1.0, 20.0),
        choices={"node": _NODE, "offset_s": (-86_400.0, -30.0, 0.5, 30.0, 3_600.0, 86_400.0)},
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}


class UnknownFault(Exception):
    """What was asked for is neither a family nor a kind."""


def chosen(words: str) -> tuple[Kind, ...]:
    """The kinds that a comma-separated list of families and kinds means; ``all`` means all.

    Raises:
        UnknownFault: a word is neither.
    """
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    known = {"all", *(family.value for family in Family), *BY_NAME}
    if unknown := sorted(set(wanted) - known) or (["(nothing)"] if not wanted else []):
        raise UnknownFault(
            f"{', '.join(unknown)}: neither a family ({', '.join(f.value for f in Family)}), "
            "nor a kind that 'python -m chaos list-faults' shows, nor 'all'"
        )
    return tuple(k for k in KINDS if {"all", k.family.value, k.name} & set(wanted))


def possible(kinds: Iterable[Kind], has: Collection[Need]) -> tuple[Kind, ...]:
    """Those for which the machine has what they need."""
    return tuple(kind for kind in kinds if all(need in has for need in kind.needs))
