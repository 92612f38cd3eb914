"""Targets: the log on disk and what is applied from it: WAL, snapshot files, Raft's inputs, entries, states."""

from __future__ import annotations

import random
import struct
import zlib
from typing import Any, Final

import msgspec

from distroml.commands import CancelJob, CommitCheckpoint, Entry, decode_entry, encode_entry
from distroml.consensus import machine, wal
from distroml.consensus.messages import Message
from distroml.consensus.raft_core import RaftCore
from distroml.consensus.raft_log import (
    AnchorRecord,
    EntryRecord,
    LogImage,
    NonceRecord,
    ProvenRecord,
    Record,
    TermRecord,
    TruncateRecord,
    apply_record,
    blank_image,
)
from distroml.consensus.raft_types import (
    RaftSettings,
    SafetyViolation,
    StorageCorrupt,
    UnreadableEntry,
)
from distroml.consensus.replica import Replica
from distroml.consensus.snapshot import Snapshot, decode_file, encode_file
from distroml.consensus.state import ClusterState, decode_state, encode_state
from distroml.consensus.storage import Recovered
from distroml.errors import UNDECODABLE
from distroml.model import JobStatus
from tests import builders
from tests.consensus.ledger import Ledger
from tests.fuzz.target import Target, caught
from tests.fuzz.typed import encoded

# --- the write-ahead log ---------------------------------------------------------------------------------------

_IDENTITY: Final = wal.Identity("test", "a")
_SALT: Final = 0x1122334455667788
_BATCHES: Final[tuple[list[Record], ...]] = (
    [TermRecord(1, "a"), EntryRecord(b"\x01", 2, 1)],
    [EntryRecord(b"\x00first", 3, 1), EntryRecord(b"\x00" + bytes(range(256)), 4, 1)],
    [TruncateRecord(4), TermRecord(2, None), EntryRecord(b"\x00other", 4, 2), ProvenRecord()],
    [TermRecord(3, "b"), NonceRecord(7)],
    [EntryRecord(b"\x00\xd1BT\x9e" * 3, 5, 3)],
)


def _whole_log() -> tuple[bytes, list[LogImage]]:
    """A log file, and the images after each of its batches."""
    image = blank_image()
    content, images = wal.encode_segment(_IDENTITY, 1, _SALT, image), [image.copy()]
    for sequence, batch in enumerate(_BATCHES, 1):
        content += wal.encode_batch(_SALT, sequence, batch)
        for record in batch:
            apply_record(image, record)
        images.append(image.copy())
    return content, images


_LOG, _IMAGES = _whole_log()
_HEADER_BYTES: Final = 8 + 8 + struct.unpack_from("<I", _LOG, 8)[0]


def _replayed(content: bytes) -> wal.Replayed | None:
    result = caught(lambda data: wal.replay(data, "log", _IDENTITY), content, StorageCorrupt)
    if result is not None:
        assert result.good_bytes + result.cut_bytes == len(content)
        _check_image(result.image)
    return result


def _check_image(image: LogImage) -> None:
    """What is read back is a log that Raft can work on."""
    indexes = [index for _, index, _ in image.entries]
    terms = [term for _, _, term in image.entries]
    assert indexes == list(range(image.anchor_index, image.anchor_index + len(indexes)))
    assert terms == sorted(terms)


def damaged_log(data: bytes) -> None:
    """A written log that was damaged (three bytes a change: where, and what is changed) and maybe cut: what is read
    is what some of the batches had made, and batches with a good one behind them are never given up."""
    content, at = bytearray(_LOG), 0
    while at + 4 <= len(data):
        place, change, extent = struct.unpack_from(">HBB", data, at)
        place %= len(content) + 1
        if extent == 255:
            del content[place:]
        elif place < len(content):
            content[place] ^= change
        at += 4
        if not content:
            break
    result = _replayed(bytes(content))
    if result is not None:
        assert result.image == _IMAGES[result.batches - 1]
        lost = _LOG[result.good_bytes :]
        if content[: len(_LOG)] == _LOG[: len(content)]:
            assert len(lost) < len(_LOG) - _HEADER_BYTES


def _damages() -> list[bytes]:
    rng = random.Random(3)
    made = [b"", b"\x00\x00\x01\x00", struct.pack(">HBB", len(_LOG) - 1, 0, 255)]
    for _ in range(40):
        changes = [(rng.randrange(len(_LOG)), 1 << rng.randrange(8), rng.choice((0, 0, 0, 255)))]
        made.append(b"".join(struct.pack(">HBB", *change) for change in changes))
    return made


def log_file(data: bytes) -> None:
    """Any file: refused by StorageCorrupt, or read by exactly those batches whose checksums hold."""
    result = _replayed(data)
    if result is None:
        return
    length = struct.unpack_from("<I", data, 8)[0]
    salt = msgspec.msgpack.decode(data[16 : 16 + length])["salt"]
    at, image = 16 + length, blank_image()
    for sequence in range(result.batches):
        magic, found, size, checksum = struct.unpack_from("<4sQQI", data, at)
        payload = data[at + 24 : at + 24 + size]
        assert (magic, found) == (b"\xd1BT\x9e", sequence)
        assert zlib.crc32(struct.pack("<QQQ", salt, found, size) + payload) == checksum
        for record in msgspec.msgpack.decode(payload, type=list[Record]):
            apply_record(image, record)
        at += 24 + size
    assert at == result.good_bytes
    assert image == result.image


def log_records(data: bytes) -> None:
    """Records behind a right checksum, which some other program has written: refused, or a log that Raft can use."""
    first = wal.encode_segment(_IDENTITY, 1, _SALT, blank_image())
    checksum = zlib.crc32(data, zlib.crc32(struct.pack("<QQQ", _SALT, 1, len(data))))
    _replayed(first + struct.pack("<4sQQI", b"\xd1BT\x9e", 1, len(data), checksum) + data)


def log_header(data: bytes) -> None:
    """The same of a header: no log of another node, cluster or format is read."""
    body = wal.encode_batch(_SALT, 0, [AnchorRecord(1, 0), TermRecord(0, None)])
    lengths = struct.pack("<II", len(data), zlib.crc32(data))
    result = _replayed(b"DMLWAL\x00\x01" + lengths + data + body)
    if result is not None:
        header = msgspec.msgpack.decode(data, type=wal._Header)
        assert (header.identity.cluster_id, header.identity.name) == ("test", "a")
        assert header.format == wal.FORMAT


def _records() -> list[bytes]:
    batches = [msgspec.msgpack.encode(batch) for batch in _BATCHES]
    return [*batches, msgspec.msgpack.encode([AnchorRecord(9, 4)]), *encoded(list[Record], 30)]


# --- snapshots -------------------------------------------------------------------------------------------------

_SNAPSHOT: Final = Snapshot.take(40, 2, ["a", "b", "c"], b"state " * 20)


def snapshot_file(data: bytes) -> None:
    """Refused by StorageCorrupt, or whole by its own hash."""
    snapshot = caught(lambda content: decode_file(content, "snapshot"), data, StorageCorrupt)
    if snapshot is not None:
        assert Snapshot.take(0, 0, [], snapshot.blob).sha256 == snapshot.sha256
        assert decode_file(encode_file(snapshot), "again") == snapshot


def snapshot_header(data: bytes) -> None:
    """A header with a right checksum of another program's making."""
    snapshot_file(
        b"DMLSNAP\x01" + struct.pack("<II", len(data), zlib.crc32(data)) + data + _SNAPSHOT.blob
    )


def _snapshot_headers() -> list[bytes]:
    content = encode_file(_SNAPSHOT)
    return [content[16 : 16 + struct.unpack_from("<I", content, 8)[0]]]


# --- the state -------------------------------------------------------------------------------------------------


def _lived_in() -> ClusterState:
    """A state with nodes, a running job, a waiting one, one that recovers and one that is over."""
    log = builders.running(builders.Log())
    waiting = msgspec.structs.replace(builders.submit("waits"), key="key", request_sha256="00")
    log.ok(waiting)
    for job_id in ("fell", "over"):
        log.ok(builders.submit(job_id))
        log.ok(builders.form(job_id, 1, builders.members("a", "b")))
    log.ok(builders.fail("fell", 1))
    log.ok(CancelJob(job_id="over", reason="enough"))
    log.ok(CommitCheckpoint(job_id="job-1", generation=1, checkpoint=builders.checkpoint(5)))
    return log.state


_STATE: Final = _lived_in()
_ENCODED_STATE: Final = encode_state(_STATE)


def entry(data: bytes) -> None:
    """Apply takes any entry, always to the same state, and that state survives a snapshot byte for byte; bytes that are
    none change nothing."""
    index = _STATE.index + 1
    read = caught(decode_entry, data, UNDECODABLE)
    if read is None:
        _refused_by_replica(data)
        return
    applied = machine.apply_entry(_STATE, index, read)
    assert applied.state.index == applied.outcome.index == index or applied.outcome.index < index
    blob = encode_state(applied.state)
    assert blob == encode_state(machine.apply_entry(_STATE, index, read).state)
    assert encode_state(decode_state(blob)) == blob
    assert len(applied.state.jobs) <= len(_STATE.jobs) + 1
    for job in applied.state.jobs.values():
        assert job.status in JobStatus
    msgspec.json.encode((applied.outcome, applied.events, applied.state))  # clients get to see all


def _refused_by_replica(data: bytes) -> None:
    replica = Replica()
    replica.restore(_STATE.index, _ENCODED_STATE)
    before = replica.state
    try:
        replica.apply(before.index + 1, data)
    except UnreadableEntry:
        assert replica.state is before
    else:
        raise AssertionError("an entry that cannot be read was passed over")


def _entries() -> list[bytes]:
    """Commands of all kinds, most of them about jobs and nodes that the state knows."""
    rng = random.Random(4)
    found = [caught(decode_entry, one, UNDECODABLE) for one in encoded(Entry, 400, seed=5)]
    jobs = ("job-1", "job-1", "job-1", "fell", "over", "waits", "new")
    entries = []
    for sequence, one in enumerate([one for one in found if one is not None], 100):
        known: dict[str, Any] = {
            "job_id": rng.choice(jobs),
            "generation": rng.choice((1, 1, 1, 0)),
            "name": rng.choice("abc"),
            "incarnation": rng.choice((1, 1, 2)),
        }
        fields = {
            name: value
            for name, value in known.items()
            if isinstance(getattr(one.command, name, None), type(value))
        }
        command = msgspec.structs.replace(one.command, **fields)
        entries.append(Entry("a", 1, sequence, 0, 1.5, command))
    for number, job_id in ((1, "waits"), (2, "fell")):
        command = builders.form(job_id, number, builders.members("a", "b"))
        entries.append(Entry("b", 1, number, 0, 1.5, command))
    return [encode_entry(one) for one in entries]


_several: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(list[msgspec.Raw])


def entries(data: bytes) -> None:
    """Several entries: each takes effect once however often it is applied, and a replica that starts from a snapshot
    between them ends in the same bytes."""
    chosen = caught(_several.decode, data, UNDECODABLE)
    if chosen is None:
        return
    replica, joined = Replica(), Replica()
    replica.restore(_STATE.index, _ENCODED_STATE)
    readable = [raw for raw in chosen[:24] if caught(decode_entry, bytes(raw), UNDECODABLE)]
    for number, raw in enumerate(readable):
        if number == len(readable) // 2:
            joined.restore(replica.state.index, replica.snapshot())
        for one in (replica, joined):
            if one.state.index:
                one.apply(one.state.index + 1, bytes(raw))
        once = _effects(replica.state)
        for one in (replica, joined):
            if one.state.index:
                one.apply(one.state.index + 1, bytes(raw))
        assert _effects(replica.state) == once
    if joined.state.index:
        assert joined.snapshot() == replica.snapshot()


def _effects(state: ClusterState) -> bytes:
    return msgspec.msgpack.encode((state.jobs, state.nodes, state.keys))


def _several_entries() -> list[bytes]:
    rng, raws = random.Random(9), [msgspec.Raw(one) for one in _entries()]
    return [msgspec.msgpack.encode(rng.choices(raws, k=rng.randrange(1, 12))) for _ in range(60)]


def snapshot_state(data: bytes) -> None:
    """A snapshot's bytes: refused by ValueError with the state as it was, or the state from now on."""
    replica = Replica()
    replica.restore(_STATE.index, _ENCODED_STATE)
    try:
        replica.restore(_STATE.index + 9, data)
    except ValueError:
        assert replica.snapshot() == _ENCODED_STATE
        return
    blob = replica.snapshot()
    assert encode_state(decode_state(blob)) == blob


# --- Raft's inputs ---------------------------------------------------------------------------------------------

_messages: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(
    list[tuple[int, msgspec.Raw]]
)


def raft_inputs(data: bytes) -> None:
    """Any well-formed messages from anybody: the core goes on, or stops by SafetyViolation; it never goes back."""
    from distroml.consensus import messages

    spoken = caught(_messages.decode, data, UNDECODABLE)
    if spoken is None:
        return
    clock = [100.0]
    image = LogImage([(b"\x01", 1, 0), (b"\x00x", 2, 1), (b"\x00y", 3, 1)], 1, None, True)
    core = RaftCore(
        name="a",
        voters=("a", "b", "c"),
        settings=RaftSettings(compaction_entries=4, trailing_entries=1, snapshot_chunk_bytes=8),
        machine=Ledger(),
        recovered=Recovered(image, None, []),
        clock=lambda: clock[0],
        rng=random.Random(7),
    )
    core.raft.log.take_ops()
    for peer in ("b", "c", "learner"):
        core.set_link(peer, True)
    term = commit = 0
    try:
        for number, raw in spoken[:64]:
            message: Message | None = caught(messages.decode, bytes(raw), messages.BadMessage)
            clock[0] += number % 7 * 0.1
            core.begin()
            if message is not None:
                core.receive(("b", "c", "learner", "a", "stranger")[number % 5], message)
            turn = core.finish_turn()
            raft = core.raft
            assert raft.term >= term
            assert raft.commit_index >= commit
            assert raft.applied_index <= raft.commit_index <= raft.log.last_index
            assert not raft.apply_failures
            term, commit = raft.term, raft.commit_index
            for _, said in turn.messages:
                messages.encode(said)
    except SafetyViolation:
        return


def _conversations() -> list[bytes]:
    rng = random.Random(6)
    spoken = [msgspec.Raw(one) for one in encoded(Message, 12, seed=8)]
    sensible = _sensible()
    made = []
    for _ in range(60):
        chosen = rng.choices(spoken + sensible * 3, k=rng.randrange(1, 9))
        made.append(msgspec.msgpack.encode([(rng.randrange(36), one) for one in chosen]))
    return made


def _sensible() -> list[msgspec.Raw]:
    """What is said around the log that the core under test holds: entries up to 3, term 1."""
    from distroml.consensus import messages as m

    blob = msgspec.msgpack.encode(([b"s"], 0))
    taken = Snapshot.take(9, 2, [], blob)
    said: list[Message] = [
        m.PreVote(2, 9, 2), m.VoteReply(2, True, 1), m.RequestVote(2, 9, 2, False),
        m.PreVote(2, 9, 2, 7), m.VoteGranted(2, 7), m.AppendReply(2, True, 5, 7),
        m.VoteGranted(2), m.Append(1, 3, 1, 3, []), m.Append(2, 3, 1, 4, [(b"\x00z", 4, 2)]),
        m.Append(2, 2, 1, 2, [(b"\x00w", 3, 2)]), m.AppendReply(2, True, 5),
        m.AppendReply(2, False, 2), m.AppendReply(2, False, 0),
        m.SnapshotChunk(2, 9, 2, taken.sha256, len(blob), 0, blob),
        m.SnapshotReply(2, 9, taken.sha256, 3), m.TimeoutNow(1), m.ReadProbe(2, 1),
        m.ReadEcho(2, 1), m.ReadRequest(5), m.ReadReply(5, 3), m.TransferRequest("b"),
    ]  # fmt: skip
    return [msgspec.Raw(m.encode(one)) for one in said]


TARGETS: Final = (
    Target("damaged_log", damaged_log, _damages, 2),
    Target("log_file", log_file, lambda: [_LOG, _LOG[:-5], _LOG[: _HEADER_BYTES + 60]], 2),
    Target("log_records", log_records, _records, 3),
    Target("log_header", log_header, lambda: [_LOG[16:_HEADER_BYTES]], 1),
    Target("snapshot_file", snapshot_file, lambda: [encode_file(_SNAPSHOT)], 1),
    Target("snapshot_header", snapshot_header, _snapshot_headers, 1),
    Target("entry", entry, _entries, 3),
    Target("entries", entries, _several_entries, 1),
    Target("snapshot_state", snapshot_state, lambda: [_ENCODED_STATE], 1),
    Target("raft_inputs", raft_inputs, _conversations, 1),
)
