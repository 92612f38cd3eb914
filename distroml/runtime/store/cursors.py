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


class _Streams(Struct, frozen=True, array_like=True):
    """Next sequence numbers of one generation: rank → number, for each kind in the order of ``KINDS``."""

    generation: Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
    next_seqs: Annotated[
        tuple[dict[Annotated[int, Meta(ge=0, le=MAX_RANK)], _Seq], ...],
        Meta(min_length=len(KINDS), max_length=len(KINDS)),
    ]


class _Run(Struct, frozen=True, array_like=True):
    run_id: Id
    floor: Annotated[int, Meta(ge=0, le=MAX_GENERATION + 1)]
    generations: tuple[_Streams, ...]


class _Token(Struct, frozen=True, array_like=True):
    version: int
    job_id: Id
    runs: tuple[_Run, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Token)


@dataclass(slots=True)
class Position:
    """The next record that a reader wants of each stream of a job."""

    job_id: str
    next_seqs: dict[StreamKey, int] = field(default_factory=dict)
    """A stream that is not named is wanted from its start."""
    floors: dict[str, int] = field(default_factory=dict)
    """Per run: generations below are done with."""

    def wanted(self, key: StreamKey) -> int | None:
        """The next sequence number wanted; None for a stream of a folded generation."""
        if key.generation < self.floors.get(key.run_id, 0):
            return None
        return self.next_seqs.get(key, 0)

    def advance(self, key: StreamKey, next_seq: int) -> None:
        """Everything before ``next_seq`` was delivered."""
        wanted = self.wanted(key)
        if wanted is not None and next_seq > wanted:
            self.next_seqs[key] = next_seq

    def foldable(self) -> bool:
        """Whether ``fold`` could make it smaller."""
        generations = {(key.run_id, key.generation) for key in self.next_seqs}
        return len(generations) > KEPT_GENERATIONS or len(self.next_seqs) > MAX_POSITIONS

    def fold(self, heads: Mapping[StreamKey, int], kinds: Collection[Kind] = KINDS) -> None:
        """Forget old generations that were read up to ``heads``, so that the token stays small."""
        unread = {
            (key.run_id, key.generation)
            for key, head in heads.items()
            if key.kind in kinds and (self.wanted(key) or 0) < head
        }
        for run_id in {key.run_id for key in self.next_seqs}:
            generations = sorted({k.generation for k in self.next_seqs if k.run_id == run_id})
            for generation in generations[: -KEPT_GENERATIONS or None]:
                if (run_id, generation) in unread:
                    break
                self._fold_through(run_id, generation)
        self._enforce_limit()

    def _enforce_limit(self) -> None:
        while len(self.next_seqs) > MAX_POSITIONS:
            generation, run_id = min((key.generation, key.run_id) for key in self.next_seqs)
            newest = max((key.generation, key.run_id) for key in self.next_seqs)
            if (generation, run_id) == newest:
                return
            self._fold_through(run_id, generation)

    def _fold_through(self, run_id: str, generation: int) -> None:
        self.floors[run_id] = max(self.floors.get(run_id, 0), generation + 1)
        for key in list(self.next_seqs):
            if key.run_id == run_id and key.generation <= generation:
                del self.next_seqs[key]

    def token(self) -> str:
        """The opaque form for clients: unpadded base64url, usable in a query string."""
        runs: dict[str, dict[int, tuple[dict[int, int], ...]]] = {run: {} for run in self.floors}
        for key, next_seq in self.next_seqs.items():
            of_run = runs.setdefault(key.run_id, {})
            of_generation = of_run.setdefault(key.generation, tuple({} for _ in KINDS))
            of_generation[KINDS.index(key.kind)][key.rank] = next_seq
        token = _Token(
            VERSION,
            self.job_id,
            tuple(
                _Run(
                    run_id,
                    self.floors.get(run_id, 0),
                    tuple(_Streams(number, seqs) for number, seqs in sorted(of_run.items())),
                )
                for run_id, of_run in sorted(runs.items())
            ),
        )
        return base64.urlsafe_b64encode(_encoder.encode(token)).decode().rstrip("=")


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
    position = Position(job_id)
    for run in decoded.runs:
        if run.floor:
            position.floors[run.run_id] = run.floor
        for streams in run.generations:
            for kind, of_kind in zip(KINDS, streams.next_seqs, strict=True):
                for rank, next_seq in of_kind.items():
                    key = StreamKey(job_id, run.run_id, streams.generation, rank, kind)
                    position.next_seqs[key] = next_seq
    return position
