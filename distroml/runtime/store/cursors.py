"""Where a reader of a job's history stands, as a token that any node understands.

A ``Position`` says for each stream which record comes next; its token is opaque to clients and means the same at
every node, since sequence numbers do. Size is bounded: the oldest generations are *folded* (only a number remains)
once they are read to the end, and by force beyond ``MAX_POSITIONS`` streams. What still arrives of a folded
generation, from a node that was away, is not delivered to that reader any more.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE, InvalidRequest
from distroml.runtime.store.records import KINDS, MAX_GENERATION, MAX_RANK, Id, Kind, StreamKey

MAX_TOKEN_CHARACTERS = 32 * 1024
"""A job of 16 ranks stays under 1 KiB; only one of hundreds of ranks comes near the limit."""
MAX_POSITIONS = 1024
"""Streams whose position a token tells exactly; more are folded, oldest generation first."""
KEPT_GENERATIONS = 4
"""The newest generations are never folded just because they are read to the end."""
VERSION = 1

_Seq = Annotated[int, Meta(ge=0, le=2**62)]
_Generation = Annotated[
    tuple[dict[Annotated[int, Meta(ge=0, le=MAX_RANK)], _Seq], ...],
    Meta(min_length=len(KINDS), max_length=len(KINDS)),
]
"""Next sequence numbers of one generation: rank → number, for each kind in the order of ``KINDS``."""
_PLACE_OF_KIND = {kind: place for place, kind in enumerate(KINDS)}


class _Run(Struct, frozen=True, array_like=True):
    run_id: Id
    floor: Annotated[int, Meta(ge=0, le=MAX_GENERATION + 1)]
    generations: tuple[tuple[Annotated[int, Meta(ge=0, le=MAX_GENERATION)], _Generation], ...]


class _Token(Struct, frozen=True, array_like=True):
    version: int
    job_id: Id
    runs: tuple[_Run, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Token)


@dataclass(slots=True)
class RunPosition:
    """The part of a position that is of one run."""

    floor: int = 0
    """Generations below are done with."""
    generations: dict[int, tuple[dict[int, int], ...]] = field(default_factory=dict)
    """By number, as the token has them: a token is made for each record that a client is told."""

    def fold(self, oldest: int) -> int:
        """Be done with the oldest generation; returns how many streams it named."""
        self.floor = max(self.floor, oldest + 1)
        return sum(map(len, self.generations.pop(oldest)))


@dataclass(slots=True)
class Position:
    """The next record that a reader wants of each stream of a job; a stream that is not named, from its start."""

    job_id: str
    runs: dict[str, RunPosition] = field(default_factory=dict)
    _has_new_generation: bool = field(default=True, init=False, compare=False)
    """Since ``fold`` looked for old ones."""

    @classmethod
    def at(cls, job_id: str, next_seqs: Mapping[StreamKey, int]) -> Position:
        """The position that names these streams."""
        position = cls(job_id)
        for key, next_seq in next_seqs.items():
            position._set(key, next_seq)
        return position

    def wanted(self, key: StreamKey) -> int | None:
        """The next sequence number wanted; None for a stream of a folded generation."""
        run = self.runs.get(key.run_id)
        if run is None:
            return 0
        if key.generation < run.floor:
            return None
        generation = run.generations.get(key.generation)
        return generation[_PLACE_OF_KIND[key.kind]].get(key.rank, 0) if generation else 0

    def advance(self, key: StreamKey, next_seq: int) -> None:
        """Everything before ``next_seq`` was delivered."""
        wanted = self.wanted(key)
        if wanted is not None and next_seq > wanted:
            self._set(key, next_seq)

    def _set(self, key: StreamKey, next_seq: int) -> None:
        generations = self.runs.setdefault(key.run_id, RunPosition()).generations
        if key.generation not in generations:
            generations[key.generation] = tuple({} for _ in KINDS)
            self._has_new_generation = True
        generations[key.generation][_PLACE_OF_KIND[key.kind]][key.rank] = next_seq

    def streams(self) -> int:
        """How many are named."""
        return sum(
            len(of_kind)
            for run in self.runs.values()
            for generation in run.generations.values()
            for of_kind in generation
        )

    def foldable(self) -> bool:
        """Whether ``fold`` could make it smaller; at little cost, if it could not."""
        held = [len(run.generations) for run in self.runs.values()]
        has_old = self._has_new_generation and max(held, default=0) > KEPT_GENERATIONS
        return has_old or (sum(held) > 1 and self.streams() > MAX_POSITIONS)

    def fold(self, heads: Mapping[StreamKey, int], kinds: Collection[Kind] = KINDS) -> None:
        """Forget old generations that were read up to ``heads``, so that the token stays small."""
        self._has_new_generation = False
        unread = {
            (key.run_id, key.generation)
            for key, head in heads.items()
            if key.kind in kinds and (self.wanted(key) or 0) < head
        }
        for run_id, run in self.runs.items():
            for generation in sorted(run.generations)[: -KEPT_GENERATIONS or None]:
                if (run_id, generation) in unread:
                    break
                run.fold(generation)
        self._enforce_limit()

    def _enforce_limit(self) -> None:
        excess = self.streams() - MAX_POSITIONS
        oldest_first = sorted(
            (generation, run_id)
            for run_id, run in self.runs.items()
            for generation in run.generations
        )
        for generation, run_id in oldest_first[:-1]:
            if excess <= 0:
                return
            excess -= self.runs[run_id].fold(generation)

    def token(self) -> str:
        """The opaque form for clients: unpadded base64url, usable in a query string."""
        runs = [
            (run_id, run.floor, sorted(run.generations.items()))
            for run_id, run in sorted(self.runs.items())
        ]
        encoded = _encoder.encode((VERSION, self.job_id, runs))
        return base64.urlsafe_b64encode(encoded).decode().rstrip("=")


def parse_token(token: str, job_id: str) -> Position:
    """Inverse of ``Position.token``.

    Raises:
        InvalidRequest: it is not a cursor, or one of another job.
    """
    try:
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise ValueError("too long")
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        decoded = _decoder.decode(raw)
    except UNDECODABLE:
        raise InvalidRequest(
            "cursor is not one that this API gave out; leave it out to start from the beginning.",
            field="cursor",
        ) from None
    if decoded.version != VERSION or decoded.job_id != job_id:
        raise InvalidRequest(
            f"cursor belongs to job {decoded.job_id} (version {decoded.version}), not to {job_id}; "
            "leave it out to start from the beginning.",
            field="cursor",
        )
    runs = {run.run_id: RunPosition(run.floor, dict(run.generations)) for run in decoded.runs}
    return Position(job_id, runs)
