"""One exception tree for everything DistroML can refuse or fail at.

Every error names what was wrong, where, and what to do. The tree is mapped once, here, to a problem
type and HTTP status (RFC 9457) for the API, and to an exit code for the command line::

    DistroMLError
    ├── InvalidRequest        400  the request itself cannot be read
    │   ├── BodyTooLarge      413
    │   └── UnsupportedMedia  415
    ├── InvalidSpec           422  a field has a wrong type, name or range
    │   └── NotBuilt          422  understood, but this version cannot do it
    ├── KeyReused             422  an Idempotency-Key came back with another body
    ├── Unauthorized          401
    ├── NotFound              404
    ├── MethodNotAllowed      405
    ├── Conflict              409  the state of the job does not allow it
    ├── TooManyRequests       429
    ├── ConfigError                a setting of a node is wrong (exit 2, never over HTTP)
    ├── Unavailable           503  no leader, or the quorum is gone: nothing was done, try again
    │   └── OutcomeUnknown    504  the write may or may not happen: retry with the same key
    ├── StoreError            500  the checkpoint store failed
    │   ├── CorruptCheckpoint 500  bytes do not match their recorded hash
    │   └── CheckpointAway    503  its files may be on nodes that cannot be reached now
    └── (DistroMLError)       500  a defect of ours
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

UNDECODABLE = (ValueError, RecursionError)
"""What msgspec raises for bytes of strangers: its DecodeError and a UnicodeDecodeError are ValueErrors, and deep
nesting under a field that is skipped exhausts the stack."""


class DistroMLError(Exception):
    """Base of all errors; ``detail`` is for people, ``extra`` for programs.

    Args:
        detail: one or two sentences: what is wrong, where, and what to do about it.
        field: dotted path of the offending input, such as ``resources.workers``.
        extra: further members of the problem document; values must be JSON-able.
    """

    slug: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 70

    def __init__(self, detail: str, *, field: str | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.extra = extra


class InvalidRequest(DistroMLError):
    """The request cannot be read: bad JSON, bad query parameter, bad header."""

    slug, title, status, exit_code = "invalid-request", "Invalid request", 400, 2


class BodyTooLarge(InvalidRequest):
    """The body is larger than this endpoint reads."""

    slug, title, status = "body-too-large", "Body too large", 413


class UnsupportedMedia(InvalidRequest):
    """The body has a content type that this endpoint does not read."""

    slug, title, status = "unsupported-media-type", "Unsupported media type", 415


class InvalidSpec(DistroMLError):
    """A job specification is well-formed but wrong; ``field`` names the place."""

    slug, title, status, exit_code = "invalid-spec", "Invalid job specification", 422, 2


class NotBuilt(InvalidSpec):
    """A feature that is understood but that this version does not have."""

    slug, title = "not-built", "Not available in this version"


class KeyReused(DistroMLError):
    """An ``Idempotency-Key`` was used before with a different request."""

    slug, title, status, exit_code = "idempotency-key-reused", "Idempotency key reused", 422, 2


class Unauthorized(DistroMLError):
    """No valid credentials were sent."""

    slug, title, status, exit_code = "unauthorized", "Unauthorized", 401, 77


class NotFound(DistroMLError):
    """No such job, checkpoint, node or path."""

    slug, title, status, exit_code = "not-found", "Not found", 404, 3


class MethodNotAllowed(DistroMLError):
    """The path exists, the method does not."""

    slug, title, status, exit_code = "method-not-allowed", "Method not allowed", 405, 2


class Conflict(DistroMLError):
    """The current state does not allow the operation."""

    slug, title, status, exit_code = "conflict", "Conflict", 409, 4


class TooManyRequests(DistroMLError):
    """A limit on requests, streams or stored jobs is reached."""

    slug, title, status, exit_code = "too-many-requests", "Too many requests", 429, 75


class ConfigError(DistroMLError):
    """A flag, variable or TOML entry of a node is wrong."""

    slug, title, status, exit_code = "config-error", "Configuration error", 500, 2


class Unavailable(DistroMLError):
    """No leader can be reached; nothing was done and a retry is safe."""

    slug, title, status, exit_code = "unavailable", "Temporarily unavailable", 503, 5


class OutcomeUnknown(Unavailable):
    """A write was sent but its outcome is not known; retry with the same key."""

    slug, title, status = "outcome-unknown", "Outcome unknown", 504


class StoreError(DistroMLError):
    """A checkpoint store could not read or write."""

    slug, title, status, exit_code = "store-error", "Checkpoint store error", 500, 74


class CorruptCheckpoint(StoreError):
    """Stored bytes do not match the hash recorded when they were written."""

    slug, title = "corrupt-checkpoint", "Corrupt checkpoint"


class CheckpointAway(StoreError):
    """Nobody who answers has a good copy of a file, and somebody who does not may have one."""

    slug, title, status = "checkpoint-away", "Checkpoint not reachable", 503


def all_kinds(kind: type[DistroMLError] = DistroMLError) -> Iterator[type[DistroMLError]]:
    """The classes of this module, parents first; other modules refine them under the same slugs."""
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == __name__:
            yield from all_kinds(below)
