"""``HistoryStore``: the metrics and logs that a node keeps, of all jobs, on disk and bounded.

History is a set of append-only streams (see ``records.StreamKey``). Agents append what their workers produce,
``replication`` appends what other nodes produced, routes read and follow. What is accepted is written in the
background within about ``flush_s`` (no fsync: it must survive this process, not this host, since the other voters
hold it too), and only what is written can be read.

On disk: ``<directory>/<job_id>/<segment files>``; see ``holdings`` for what else is there. All methods
belong to the event loop's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from distroml.runtime.store import retention
from distroml.runtime.store.holdings import Holdings
from distroml.runtime.store.jobs import JobHistory, open_job
from distroml.runtime.store.records import StreamKey, check_id, check_key
from distroml.runtime.store.retention import HistoryLimits
from distroml.runtime.store.streams import Stream, StreamWrite
from distroml.runtime.store.subscriptions import Subscription, Subscriptions, Written
from distroml.runtime.store.writeback import Writeback

log = logging.getLogger(__name__)

READ_BYTES = 256 * 1024


class HistoryStore:
    """All streams that this node holds. Use as an async context manager, or ``start`` and ``close`` it.

    Args:
        directory: made if missing; owned by this store alone.
        active: ids of the jobs that are not finished; their history makes room last.
        clock: Unix seconds, for the order in which old jobs make room.
    """

    def __init__(
        self,
        directory: Path,
        limits: HistoryLimits | None = None,
        *,
        active: Callable[[], Collection[str]] = frozenset,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits or HistoryLimits()
        self._active = active
        self._jobs: dict[str, JobHistory] = {}
        """Jobs whose streams are in memory, the least recently used first."""
        self._digests: dict[str, bytes] = {}
        self._damaged: dict[StreamKey, int] = {}
        self._subscriptions = Subscriptions(self.limits.subscriptions)
        self._listeners: list[Callable[[Written, bool], None]] = []
        self._writeback = Writeback(
            self._committed,
            segment_bytes=self.limits.segment_bytes,
            flush_s=self.limits.flush_s,
        )
        self._held = Holdings(directory, doom=self._writeback.doom, clock=clock)

    async def start(self) -> None:
        """Measure what is there and write in the background from now on (until then only ``flush`` writes)."""
        await self._held.measure()
        self._writeback.start()

    async def close(self) -> None:
        """Write what is pending and end all subscriptions."""
        await self._writeback.close()
        self._subscriptions.close()

    async def __aenter__(self) -> HistoryStore:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- writing -----------------------------------------------------------------------------------------------

    def append(
        self, key: StreamKey, first_seq: int, records: Sequence[bytes], *, local: bool = True
    ) -> int:
        """Accept the records that come next in their stream; returns the next sequence wanted.

        Records before the wanted one are duplicates and ignored. Nothing is accepted when ``first_seq`` lies
        beyond it (a gap) or when too much waits for the disk: the caller looks at the returned number and
        offers again from there. Where this node does not keep the stream any more (evicted job, generation
        below the floor), all is accepted and discarded.

        Args:
            local: whether this node originates the stream (it runs the rank).

        Raises:
            ValueError: the key or a record cannot be stored.
        """
        try:
            stream = self._stream_for(key)
        except OSError as error:  # nothing accepted, as with a full disk
            log.error("history: cannot make %s: %s", key, error)
            return self.next_seq(key)
        if stream is None:
            return first_seq + len(records)
        if self._writeback.pending_bytes <= self.limits.pending_bytes:
            self._writeback.pending_bytes += stream.accept(first_seq, records)
            stream.local = local
            self._writeback.mark(stream)
        return stream.accepted

    def skip_to(self, key: StreamKey, seq: int) -> int:
        """Give up on records before ``seq``, which no reachable node holds; returns the next sequence wanted.

        What is held is dropped, so that a stream never has a hole. Does nothing while records of the stream
        wait to be written: call again later.
        """
        stream = self._stream_for(key)
        if stream is None:
            return seq
        if stream.accepted < seq and not stream.pending and not stream.in_flight:
            before = stream.size_bytes
            self._writeback.doom(stream.restart_at(seq))
            self._grew(self._jobs[key.job_id], -before)
            self._writeback.mark(stream)
        return stream.accepted

    @property
    def pending_bytes(self) -> int:
        """Accepted and not yet written."""
        return self._writeback.pending_bytes

    def hurry(self) -> None:
        """Begin to write what waits: somebody wants to know that it is there."""
        self._writeback.hurry()

    def flush(self) -> None:
        """Write all that is pending now; for a store that was not started."""
        self._writeback.flush()

    async def settled(self) -> None:
        """Return once everything accepted so far is written."""
        await self._writeback.settled()

    def _committed(self, writes: list[StreamWrite]) -> None:
        by_job: dict[str, list[StreamWrite]] = {}
        for write in writes:
            by_job.setdefault(write.stream.key.job_id, []).append(write)
        for job_id, of_job in by_job.items():
            job = self._jobs[job_id]
            self._grew(job, sum(write.added_bytes for write in of_job))
            gone, changed = retention.trim(job, [write.stream for write in of_job], self.limits)
            self._grew(job, 0)
            self._writeback.doom(gone)
            for stream in changed:
                self._writeback.mark(stream)
        self._drop_damaged()
        self._make_room()
        for write in writes:
            if write.records:
                news = Written(write.stream.key, write.first_seq, write.records)
                self._publish(news, write.stream.local)

    def _publish(self, written: Written, local: bool) -> None:
        self._subscriptions.publish(written)
        for listener in self._listeners:
            try:
                listener(written, local)
            except Exception:  # a defect of one listener must not stop the writing
                log.exception("history: a listener failed on %s", written.key)

    # --- reading -----------------------------------------------------------------------------------------------

    def next_seq(self, key: StreamKey) -> int:
        """The next sequence number that ``append`` wants; 0 for an unknown stream."""
        stream = self._stream(key)
        return stream.accepted if stream else 0

    def wanted(self, key: StreamKey) -> int | None:
        """As ``next_seq``; None for a stream that is not kept here (evicted job, old generation)."""
        if key.job_id in self._held.evicted:
            return None
        job = self._job(key.job_id)
        if job is None:
            return 0 if key.job_id not in self._held.touched else None
        if job.below_floor(key):
            return None
        return self.next_seq(key)

    def span(self, key: StreamKey) -> tuple[int, int]:
        """The oldest sequence number held, and the one after the newest readable record.

        The first is not 0 where old records were dropped to stay within the limits.
        """
        stream = self._stream(key)
        return (stream.first_seq, stream.written) if stream else (0, 0)

    def first_seq(self, key: StreamKey) -> int:
        """The oldest sequence number held (``span``)."""
        return self.span(key)[0]

    def spans(self, job_id: str) -> dict[StreamKey, tuple[int, int]]:
        """``span`` of each stream of a job."""
        job = self._job(job_id)
        if job is None:
            return {}
        return {key: (stream.first_seq, stream.written) for key, stream in job.streams.items()}

    def own_heads(self, job_id: str) -> dict[StreamKey, int]:
        """The sequence number after the newest accepted record of the newest streams of a job that originate here.

        Those of the two newest generations: others were written long ago, and may have been dropped elsewhere.
        """
        job = self._job(job_id)
        own = {key: one.accepted for key, one in job.streams.items() if one.local} if job else {}
        newest = max((key.generation for key in own), default=0)
        return {key: head for key, head in own.items() if key.generation >= newest - 1}

    def heads(self, job_id: str | None = None) -> dict[StreamKey, int]:
        """The sequence number after the newest readable record of each stream (None: of all jobs, slow)."""
        if job_id is None:
            return {key: head for known in self.jobs() for key, head in self.heads(known).items()}
        return {key: head for key, (_, head) in self.spans(job_id).items()}

    def digest(self, job_id: str) -> bytes:
        """8 bytes that are equal where two nodes hold equally much of each stream; b'' for an unknown job."""
        if job_id not in self._digests:
            job = self._job(job_id)
            if job is None:
                return b""
            self._digests[job_id] = job.compute_digest()
        return self._digests[job_id]

    def digest_known(self, job_id: str) -> bool:
        """Whether ``digest`` answers without opening files."""
        return job_id in self._digests or job_id in self._jobs or job_id not in self._held.touched

    def read(self, key: StreamKey, from_seq: int, max_bytes: int = READ_BYTES) -> list[bytes]:
        """Records from ``from_seq`` on, up to ``max_bytes`` but at least one.

        [] where there is none yet, or where ``from_seq`` is before ``first_seq(key)``: go on from there then.
        """
        stream = self._stream(key)
        if stream is None:
            return []
        try:
            found, damaged = stream.read(from_seq, max_bytes)
        except OSError as error:  # perhaps only for now, so nothing is dropped
            log.error("history: cannot read %s from %d: %s", key, from_seq, error)
            return []
        if damaged is not None:
            log.error("history: %s is damaged at %d; dropped", key, from_seq + len(found))
            self._damaged[key] = damaged.first_seq
            if not found:
                self._drop_damaged()
        return found

    def jobs(self) -> list[str]:
        """Ids of all jobs with history here, the most recently written first."""
        return sorted(self._held.touched, key=lambda job_id: (-self._held.touched[job_id], job_id))

    def evicted(self, job_id: str) -> bool:
        """Whether this node gave up the history of a job to stay within its total limit."""
        return job_id in self._held.evicted

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, all jobs together, as far as they were measured."""
        return self._held.total_bytes

    # --- following ---------------------------------------------------------------------------------------------

    def subscribe(self, job_id: str) -> Subscription:
        """What is written of a job from now on; ``unsubscribe`` it in the end.

        Raises:
            TooManyRequests: this node serves ``limits.subscriptions`` already.
        """
        return self._subscriptions.open(job_id)

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; harmless if it has ended."""
        self._subscriptions.end(subscription)

    def listen(self, listener: Callable[[Written, bool], None]) -> None:
        """Call ``listener(written, local)`` for all that is written, of any job; it must not wait."""
        self._listeners.append(listener)

    # --- letting go --------------------------------------------------------------------------------------------

    def remove(self, job_id: str) -> None:
        """Forget all of a job, also that it was evicted; its followers end."""
        check_id(job_id, "job_id")
        self._let_go(job_id)
        self._held.forget_eviction(job_id)
        self._subscriptions.end_job(job_id)

    def _let_go(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        for key, stream in job.streams.items() if job else ():
            self._writeback.forget(stream)
            self._damaged.pop(key, None)
        self._digests.pop(job_id, None)
        self._held.let_go(job_id)

    def _make_room(self) -> None:
        excess = self._held.total_bytes - self.limits.total_bytes
        if excess > 0:
            active = self._active()
            for job_id in retention.to_evict(self._held.sizes, self._held.touched, active, excess):
                log.warning("history: job %s makes room (%d bytes over)", job_id, excess)
                self._held.mark_evicted(job_id)
                self._let_go(job_id)
        idle = [job_id for job_id, job in self._jobs.items() if not job.busy]
        for job_id in idle[: max(0, len(self._jobs) - self.limits.open_jobs)]:
            del self._jobs[job_id]

    def _drop_damaged(self) -> None:
        for key, first_seq in list(self._damaged.items()):
            stream = self._stream(key)
            if stream is None or stream.in_flight:
                continue
            del self._damaged[key]
            before = stream.size_bytes
            self._writeback.doom(stream.drop_through(first_seq))
            self._grew(self._jobs[key.job_id], stream.size_bytes - before)
            self._writeback.mark(stream)

    # --- jobs and streams --------------------------------------------------------------------------------------

    def _job(self, job_id: str) -> JobHistory | None:
        if job_id not in self._held.touched:
            return None
        job = self._jobs.pop(job_id, None)
        if job is None:
            try:
                job = open_job(job_id, self._held.path(job_id))
            except OSError as error:
                log.error("history: cannot open job %s: %s", job_id, error)
                return None
            self._held.resize(job_id, job.size_bytes)
        self._jobs[job_id] = job
        return job

    def _stream(self, key: StreamKey) -> Stream | None:
        job = self._job(key.job_id)
        return job.streams.get(key) if job else None

    def _stream_for(self, key: StreamKey) -> Stream | None:
        """The stream to append to, made if new; None where it is not kept any more."""
        if stream := self._stream(key):
            return stream
        check_key(key)
        if key.job_id in self._held.evicted:
            return None
        job = self._job(key.job_id)
        if job is None:
            if key.job_id in self._held.touched:
                return None  # it is there but cannot be read: do not write over it
            job = self._jobs[key.job_id] = JobHistory(key.job_id, self._held.add(key.job_id))
        if job.below_floor(key):
            return None
        stream = job.streams[key] = Stream(key, job.directory)
        if len(job.streams) > self.limits.streams_per_job:
            for dropped in job.raise_floor(self.limits.streams_per_job):
                self._writeback.forget(dropped)
                self._writeback.doom(dropped.path(segment) for segment in dropped.segments)
            self._grew(job, 0)
        return job.streams.get(key)

    def _grew(self, job: JobHistory, added_bytes: int) -> None:
        job.size_bytes += added_bytes
        self._digests.pop(job.job_id, None)
        self._held.resize(job.job_id, job.size_bytes)
        self._held.touch(job.job_id)
