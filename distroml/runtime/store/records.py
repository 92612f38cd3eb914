"""What history is made of: the key of a stream, and its records as bytes and back.

Every other part of ``runtime.store`` moves records as opaque bytes; only this module knows their form. Agents
encode here, the routes and queries decode here.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE
from distroml.runtime.control import MAX_METRIC_NAME_CHARS, MAX_METRIC_NAMES, MetricRecord

MAX_RECORD_BYTES = 64 * 1024
"""Limit of one encoded record; ``HistoryStore.append`` refuses larger ones."""
MAX_LINE_CHARACTERS = 4096

Kind = Literal["metrics", "logs"]
KINDS: tuple[Kind, ...] = ("logs", "metrics")

ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}\Z"
"""Ids become names of directories and files, so they are held to this on every way in."""
Id = Annotated[str, Meta(pattern=ID_PATTERN)]
_ID = re.compile(ID_PATTERN)
MAX_GENERATION = 2**31 - 1
MAX_RANK = 65_535


class StreamKey(Struct, frozen=True, order=True, array_like=True):
    """Names one append-only stream; only the node that runs this rank originates records of it."""

    job_id: Id
    run_id: Id
    generation: Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
    rank: Annotated[int, Meta(ge=0, le=MAX_RANK)]
    kind: Kind


class LogRecord(Struct, frozen=True, array_like=True):
    """One line of a worker's output."""

    at: float
    """Unix seconds when the agent read it."""
    line: str


class _MetricTime(Struct, frozen=True, array_like=True):
    step: int
    epoch: int
    at: float


class _LogTime(Struct, frozen=True, array_like=True):
    at: float


_encoder = msgspec.msgpack.Encoder()
_metric_decoder = msgspec.msgpack.Decoder(MetricRecord)
_log_decoder = msgspec.msgpack.Decoder(LogRecord)
_metric_time = msgspec.msgpack.Decoder(_MetricTime)
_log_time = msgspec.msgpack.Decoder(_LogTime)

UndecodableRecord = UNDECODABLE
"""Raised by the decoders below; a reader skips such a record."""


def valid_id(value: str) -> bool:
    """Whether ``value`` may be part of a file name here."""
    return _ID.match(value) is not None


def check_id(value: str, what: str) -> str:
    """Return ``value`` if it may be part of a file name.

    Raises:
        ValueError: it is not 1 to 64 letters, digits, '_' or '-'.
    """
    if not valid_id(value):
        raise ValueError(f"{what} must be 1 to 64 letters, digits, '_' or '-', not {value!r}")
    return value


def check_key(key: StreamKey) -> None:
    """Raise ValueError for a key that was built with a part out of range."""
    check_id(key.job_id, "job_id")
    check_id(key.run_id, "run_id")
    if not 0 <= key.generation <= MAX_GENERATION or not 0 <= key.rank <= MAX_RANK:
        raise ValueError(f"generation or rank out of range in {key}")
    if key.kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {key.kind!r}")


def encode_metric(record: MetricRecord) -> bytes:
    """A metric record as stored; with too many names, the first ``MAX_METRIC_NAMES`` are kept."""
    values = record.values
    if len(values) > MAX_METRIC_NAMES or any(len(name) > MAX_METRIC_NAME_CHARS for name in values):
        kept = sorted(values)[:MAX_METRIC_NAMES]
        values = {name[:MAX_METRIC_NAME_CHARS]: values[name] for name in kept}
        record = MetricRecord(step=record.step, epoch=record.epoch, at=record.at, values=values)
    return _encoder.encode(record)


def decode_metric(raw: bytes) -> MetricRecord:
    """Raises UndecodableRecord."""
    return _metric_decoder.decode(raw)


def encode_log(at: float, line: str) -> bytes:
    """A log line as stored: cut to ``MAX_LINE_CHARACTERS`` with a mark, lone surrogates replaced."""
    if len(line) > MAX_LINE_CHARACTERS:
        line = f"{line[:MAX_LINE_CHARACTERS]}… [{len(line) - MAX_LINE_CHARACTERS} characters cut]"
    try:
        return _encoder.encode(LogRecord(at, line))
    except UnicodeEncodeError:
        return _encoder.encode(LogRecord(at, line.encode("utf-8", "replace").decode("utf-8")))


def decode_log(raw: bytes) -> LogRecord:
    """Raises UndecodableRecord."""
    return _log_decoder.decode(raw)


def record_time(kind: Kind, raw: bytes) -> float:
    """When the record was made, in Unix seconds; 0.0 for one that cannot be read."""
    try:
        return _metric_time.decode(raw).at if kind == "metrics" else _log_time.decode(raw).at
    except UndecodableRecord:
        return 0.0
