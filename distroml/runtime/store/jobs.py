"""The streams of one job as a node holds them in memory, and how they are found on disk."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.segments import parse_name
from distroml.runtime.store.streams import Stream, open_stream

log = logging.getLogger(__name__)

DIGEST_BYTES = 8
FLOOR = "floor"
"""``floor.<run_id>.<generation>``: an empty file; older generations of that run are not kept any more."""


@dataclass(slots=True)
class JobHistory:
    """All streams of one job; ``open_job`` makes it, ``HistoryStore`` changes it."""

    job_id: str
    directory: Path
    streams: dict[StreamKey, Stream] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)
    """Per run: the oldest generation that is kept."""
    size_bytes: int = 0

    @property
    def busy(self) -> bool:
        """Whether something waits to be written, so that it must stay in memory."""
        return any(stream.dirty or stream.in_flight for stream in self.streams.values())

    def below_floor(self, key: StreamKey) -> bool:
        return key.generation < self.floors.get(key.run_id, 0)

    def compute_digest(self) -> bytes:
        """A hash over how far each stream is written; where streams begin does not count."""
        parts = [
            (key.run_id, key.generation, key.rank, key.kind, stream.written)
            for key, stream in sorted(self.streams.items())
            if stream.written
        ]
        return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=DIGEST_BYTES).digest()

    def raise_floor(self, limit: int) -> list[Stream]:
        """Take out the streams of the oldest generations until there are ``limit``; returns them.

        The newest generation always stays. On disk the new floor comes first, so that nothing below it returns.
        """
        gone: list[Stream] = []
        generations = sorted({(key.generation, key.run_id) for key in self.streams})
        for generation, run_id in generations[:-1]:
            if len(self.streams) <= limit:
                break
            self.floors[run_id] = generation + 1
            (self.directory / f"{FLOOR}.{run_id}.{generation + 1}").touch()
            for key in [key for key in self.streams if self.below_floor(key)]:
                stream = self.streams.pop(key)
                self.size_bytes -= stream.size_bytes
                gone.append(stream)
        return gone


def open_job(job_id: str, directory: Path) -> JobHistory:
    """Read what is on disk of a job; streams that cannot be read are left out and logged."""
    job = JobHistory(job_id, directory)
    found: dict[StreamKey, list[int]] = {}
    for entry in directory.iterdir():
        if parsed := parse_name(job_id, entry.name):
            found.setdefault(parsed[0], []).append(parsed[1])
        elif entry.name.startswith(f"{FLOOR}."):
            run_id, generation = entry.name.split(".")[1:]
            job.floors[run_id] = max(job.floors.get(run_id, 0), int(generation))
    for key, first_seqs in found.items():
        if job.below_floor(key):
            continue
        try:
            stream = open_stream(key, directory, first_seqs)
        except OSError as error:
            log.error("history: cannot open %s: %s", key, error)
            continue
        job.streams[key] = stream
        job.size_bytes += stream.size_bytes
    return job
