"""Where all ranks of a generation meet in the control plane: who has arrived, and when all may go on. Pure.

A rank *arrives* at a named barrier with a value. Once every rank of its generation has, all are *released* with the
largest value, so a barrier is also how ranks agree on a step. An agent speaks for its ranks (``Standing``), and
whoever leads gathers (``Gatherings``); ``barrier_wire`` carries the messages.

Both facts, "these ranks have arrived" and "all have arrived", stay true for ever. So any message may be lost,
repeated, late or told by a deposed leader, and nobody needs to be fenced but by generation. It is level-triggered:
an agent repeats what it waits for until it is answered, and a leader that still misses ranks asks their agents, who
also tell of barriers that they have passed. That is all a new leader needs. A name stands for one meeting: of the
same ranks in the same generation, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.model import TERMINAL, Job
from distroml.spec import MAX_WORKERS

MAX_NAME_CHARS: Final = 128
MAX_OPEN: Final = 16
"""Barriers of one generation at which one rank may stand at the same time."""
MAX_GATHERED: Final = 64
"""Barriers of one generation that a leader gathers at the same time."""
MAX_EARLY: Final = 1024
"""Arrivals that an agent keeps of generations of which it has yet to learn."""
MAX_KEPT: Final = 256
"""Released barriers that are remembered of one generation, the newest ones; see ``Standing``."""
REPEAT_S: Final = 0.25
"""How long an agent waits for an answer before it repeats; twice as long each time, up to ``REPEAT_MOST_S``."""
REPEAT_MOST_S: Final = 1.0
MAX_NAMED: Final = 16
"""Missing ranks that an agent is told of."""
ASK_S: Final = 0.2
"""How often a leader asks for the ranks that one barrier still misses."""

BarrierName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
BarrierValue = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Ranks = Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_WORKERS)]


class RunGeneration(Struct, frozen=True, array_like=True, gc=False):
    """The ranks that meet."""

    job_id: _Text
    run_id: _Text
    number: _Count


class Barrier(Struct, frozen=True, array_like=True, gc=False):
    """One meeting of one generation."""

    generation: RunGeneration
    name: BarrierName


class Arrived(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """agent -> leader: these of its ranks stand there; ``value`` is their largest."""

    barrier: Barrier
    ranks: _Ranks
    value: BarrierValue


class Asked(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """leader -> agent: ranks of yours are missing there; what do you know of it?"""

    barrier: Barrier


class Released(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """leader -> agent, and back where the agent was asked: all ranks have arrived."""

    barrier: Barrier
    value: BarrierValue


class Awaited(Struct, frozen=True, array_like=True, tag=4, gc=False):
    """leader -> an agent that repeats: the first ``MAX_NAMED`` of the ranks that have not arrived."""

    barrier: Barrier
    missing: _Ranks


BarrierMessage = Arrived | Asked | Released | Awaited
Outgoing = tuple[str, BarrierMessage]
"""To which node."""
Roster = Mapping[str, frozenset[int]]
"""The ranks of a generation by node."""


class Rosters:
    """Who belongs to present generations, read off the replicated state once per generation."""

    def __init__(self) -> None:
        self._known: dict[RunGeneration, Roster] = {}

    def of(self, state: ClusterState, generation: RunGeneration) -> Roster | None:
        """The generation's roster; None if it is not a present one of a run that goes on."""
        known = self._known.get(generation)
        if known is None and is_present(state.jobs.get(generation.job_id), generation):
            by_node: dict[str, set[int]] = {}
            job = state.jobs[generation.job_id]
            formed = job.generation if generation.number == job.generation_number else job.outgoing
            for member in formed.members if formed else ():
                by_node.setdefault(member.node, set()).add(member.rank)
            known = {node: frozenset(ranks) for node, ranks in by_node.items()}
            self._known[generation] = known
        return known

    def forget(self, state: ClusterState) -> list[RunGeneration]:
        """Drop what is over; returns it."""
        over = [one for one in self._known if not is_present(state.jobs.get(one.job_id), one)]
        for generation in over:
            del self._known[generation]
        return over

    def __len__(self) -> int:
        return len(self._known)


def is_present(job: Job | None, generation: RunGeneration) -> bool:
    """Whether it is the newest generation of a run that has not ended, or trains until that one relieves it."""
    return (
        job is not None
        and job.status not in TERMINAL
        and job.run_id == generation.run_id
        and generation.number in job.generation_numbers
    )


def is_to_come(job: Job | None, generation: RunGeneration) -> bool:
    """Whether it is newer than what is known here, as with an agent that came back to its workers."""
    return job is None or (
        job.status not in TERMINAL
        and job.run_id == generation.run_id
        and generation.number > job.generation_number
    )


class Standing:
    """An agent's part: at which barriers its ranks stand, and which they have passed.

    A passed barrier is needed only while some other rank has not heard of its release. It can be pushed out by
    ``MAX_KEPT`` later ones, all of which that rank took part in, while its agent repeats.
    """

    def __init__(self) -> None:
        self._waiting: dict[Barrier, dict[int, int]] = {}
        """The value of each rank that arrived and was not released."""
        self._due: set[Barrier] = set()
        """Those that waited already when ``repeat`` was last asked."""
        self._passed = _Passed()

    def arrive(self, barrier: Barrier, rank: int, value: int) -> Released | Arrived:
        """A rank of this agent arrives; its first word counts. Returns its release, or what to tell the leader.

        Raises:
            NotTaken: it stands at ``MAX_OPEN`` other barriers.
        """
        passed = self._passed.value(barrier)
        if passed is not None:
            return Released(barrier, passed)
        ranks = self._waiting.get(barrier, {})
        if rank not in ranks and self._open_to(barrier.generation, rank) >= MAX_OPEN:
            raise NotTaken("too_many_open")
        ranks.setdefault(rank, value)
        self._waiting[barrier] = ranks
        return _arrived(barrier, ranks)

    def release(self, message: Released) -> tuple[int, ...]:
        """All have arrived; returns the ranks that may go on now."""
        ranks = self._waiting.pop(message.barrier, None)
        if ranks is None:
            return ()
        self._passed.add(message.barrier, message.value)
        return tuple(sorted(ranks))

    def answer(self, asked: Asked) -> Arrived | Released | None:
        """What a leader should know of a barrier; None: nothing."""
        value = self._passed.value(asked.barrier)
        if value is not None:
            return Released(asked.barrier, value)
        ranks = self._waiting.get(asked.barrier)
        return _arrived(asked.barrier, ranks) if ranks else None

    def waiting(self, barrier: Barrier) -> tuple[int, ...]:
        """Ranks of this agent that stand there."""
        return tuple(self._waiting.get(barrier, ()))

    def unanswered(self) -> list[Arrived]:
        """All that is not answered yet."""
        return [_arrived(barrier, ranks) for barrier, ranks in self._waiting.items()]

    def repeat(self) -> list[Arrived]:
        """What has not been answered since it was asked for this before: so the newest is given its time."""
        due, self._due = self._due, set(self._waiting)
        return [_arrived(barrier, self._waiting[barrier]) for barrier in due & self._due]

    def forget(self, over: Iterable[RunGeneration]) -> None:
        """Those generations have ended: who waits there is not released any more."""
        gone = set(over)
        self._waiting = {b: r for b, r in self._waiting.items() if b.generation not in gone}
        self._passed.forget(gone)

    def __len__(self) -> int:
        return len(self._waiting)

    def _open_to(self, generation: RunGeneration, rank: int) -> int:
        return sum(
            barrier.generation == generation and rank in ranks
            for barrier, ranks in self._waiting.items()
        )


class _Gathering(Struct):
    missing: set[int]
    value: int
    nodes: set[str]
    """Whose ranks have arrived: who is to be told."""
    asked_s: float


class Gatherings:
    """A leader's part: which ranks have arrived at which barrier."""

    def __init__(self) -> None:
        self._open: dict[RunGeneration, dict[Barrier, _Gathering]] = {}
        self._released = _Passed()

    def arrived(self, roster: Roster, node: str, message: Arrived, now_s: float) -> list[Outgoing]:
        """Take what an agent says of its ranks; returns what is to be sent.

        Args:
            roster: of the message's generation.
            now_s: monotonic seconds.

        Raises:
            NotTaken: the ranks are not that node's, or too many barriers are open.
        """
        barrier = message.barrier
        value = self._released.value(barrier)
        if value is not None:
            return [(node, Released(barrier, value))]
        if not message.ranks or not roster.get(node, frozenset()).issuperset(message.ranks):
            raise NotTaken("not_a_member")
        gathering = self._gathering(roster, message, now_s)
        repeats = node in gathering.nodes
        gathering.missing.difference_update(message.ranks)
        gathering.value = max(gathering.value, message.value)
        gathering.nodes.add(node)
        if not gathering.missing:
            return self._release(barrier, gathering.value)
        missing = tuple(sorted(gathering.missing)[:MAX_NAMED])
        answer: list[Outgoing] = [(node, Awaited(barrier, missing))] if repeats else []
        if now_s - gathering.asked_s < ASK_S:
            return answer
        gathering.asked_s = now_s
        absent = (name for name, ranks in roster.items() if ranks & gathering.missing)
        return [*answer, *((name, Asked(barrier)) for name in absent)]

    def released(self, message: Released) -> list[Outgoing]:
        """Somebody has passed the barrier, so all ranks had arrived: whoever waits here is told."""
        if message.barrier not in self._open.get(message.barrier.generation, {}):
            return []
        return self._release(message.barrier, message.value)

    def missing(self) -> dict[Barrier, tuple[int, ...]]:
        """Ranks that each open barrier still waits for."""
        return {
            barrier: tuple(sorted(one.missing))
            for barriers in self._open.values()
            for barrier, one in barriers.items()
        }

    def forget(self, over: Iterable[RunGeneration]) -> None:
        """Those generations have ended."""
        gone = set(over)
        for generation in gone:
            self._open.pop(generation, None)
        self._released.forget(gone)

    def _gathering(self, roster: Roster, message: Arrived, now_s: float) -> _Gathering:
        barriers = self._open.setdefault(message.barrier.generation, {})
        found = barriers.get(message.barrier)
        if found is None:
            if len(barriers) >= MAX_GATHERED:
                raise NotTaken("too_many_open")
            found = _Gathering(set().union(*roster.values()), message.value, set(), now_s)
            barriers[message.barrier] = found
        return found

    def _release(self, barrier: Barrier, value: int) -> list[Outgoing]:
        gathering = self._open.get(barrier.generation, {}).pop(barrier, None)
        self._released.add(barrier, value)
        message = Released(barrier, value)
        return [(node, message) for node in gathering.nodes] if gathering else []


class NotTaken(Exception):
    """A message that says what cannot be; ``reason`` is a counter's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Passed:
    """Values of released barriers, ``MAX_KEPT`` of each generation."""

    def __init__(self) -> None:
        self._values: dict[RunGeneration, dict[str, int]] = {}

    def add(self, barrier: Barrier, value: int) -> None:
        values = self._values.setdefault(barrier.generation, {})
        values[barrier.name] = value
        if len(values) > MAX_KEPT:
            del values[next(iter(values))]

    def value(self, barrier: Barrier) -> int | None:
        return self._values.get(barrier.generation, {}).get(barrier.name)

    def forget(self, over: Iterable[RunGeneration]) -> None:
        for generation in over:
            self._values.pop(generation, None)


def _arrived(barrier: Barrier, ranks: Mapping[int, int]) -> Arrived:
    return Arrived(barrier, tuple(ranks), max(ranks.values()))
