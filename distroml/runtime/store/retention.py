"""Which records make room for newer ones: rules over sizes and ages, and the measuring of a directory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from distroml.runtime.store.jobs import JobHistory
from distroml.runtime.store.streams import Stream


class HistoryLimits(Struct, frozen=True, kw_only=True):
    """What a node's history may occupy."""

    segment_bytes: int = 512 * 1024
    """Size at which a stream goes on in a new file: the grain in which old records are dropped."""
    log_stream_bytes: int = 8 * 1024 * 1024
    metric_stream_bytes: int = 64 * 1024 * 1024
    job_bytes: int = 256 * 1024 * 1024
    total_bytes: int = 4 * 1024 * 1024 * 1024
    streams_per_job: int = 8192
    """Beyond it, the streams of the oldest generations are dropped."""
    pending_bytes: int = 16 * 1024 * 1024
    """Accepted but not yet on disk, all streams together; beyond it nothing is accepted."""
    open_jobs: int = 64
    """Jobs whose streams are held in memory; others are opened when asked for."""
    subscriptions: int = 1024
    flush_s: float = 0.05
    """How long accepted records may wait for a write to start."""


def trim(
    job: JobHistory, written: Iterable[Stream], limits: HistoryLimits
) -> tuple[list[Path], set[Stream]]:
    """Bring a job within its limits; returns the files to remove and the streams that lost some.

    First each stream that was just written loses its own oldest segments. Then the job as a whole: the oldest
    generation first, and of that the largest stream.
    """
    gone: list[Path] = []
    changed: set[Stream] = set()

    def drop_oldest(stream: Stream) -> None:
        before = stream.size_bytes
        gone.extend(stream.drop_through(stream.segments[0].first_seq))
        job.size_bytes += stream.size_bytes - before
        changed.add(stream)

    for stream in written:
        logs = stream.key.kind == "logs"
        limit = limits.log_stream_bytes if logs else limits.metric_stream_bytes
        while stream.size_bytes > limit:
            drop_oldest(stream)
    while job.size_bytes > limits.job_bytes:
        held = [stream for stream in job.streams.values() if stream.size_bytes]
        oldest = min(stream.key.generation for stream in held)
        drop_oldest(
            max(
                (stream for stream in held if stream.key.generation == oldest),
                key=lambda stream: (stream.size_bytes, stream.key),
            )
        )
    return gone, changed


def to_evict(
    sizes: Mapping[str, int],
    touched: Mapping[str, float],
    active: Collection[str],
    excess_bytes: int,
) -> list[str]:
    """Jobs to let go to free ``excess_bytes``: finished ones, the longest untouched first; then active ones.

    The most recently written job of all is never among them.
    """
    order = sorted(sizes, key=lambda job_id: (job_id in active, touched.get(job_id, 0.0), job_id))
    newest = max(order, key=lambda job_id: touched.get(job_id, 0.0), default=None)
    chosen: list[str] = []
    for job_id in order:
        if excess_bytes <= 0:
            break
        if job_id != newest and sizes[job_id]:
            chosen.append(job_id)
            excess_bytes -= sizes[job_id]
    return chosen


def measure(directory: Path, job_ids: Iterable[str]) -> dict[str, int]:
    """Bytes on disk per job; a job that vanishes meanwhile counts 0."""
    sizes: dict[str, int] = {}
    for job_id in job_ids:
        try:
            sizes[job_id] = sum(entry.stat().st_size for entry in (directory / job_id).iterdir())
        except FileNotFoundError:
            sizes[job_id] = 0
    return sizes
