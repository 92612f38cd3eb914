"""Where a reader stands in one job's stream, as text that means the same at every node."""

from __future__ import annotations

import base64

import msgspec
from msgspec import Struct

from distroml.errors import UNDECODABLE, InvalidRequest
from distroml.http.job_events import Position

MAX_CURSOR_CHARACTERS = 24 * 1024


class Cursor(Struct, frozen=True):
    """Where a reader stands in one job's stream."""

    job_id: str
    position: Position
    history: str | None

    def encode(self) -> str:
        """URL-safe text: what is ours, a dot, and the history's own position as it is."""
        ours = msgspec.msgpack.encode((self.job_id, self.position))
        return f"{base64.urlsafe_b64encode(ours).rstrip(b'=').decode()}.{self.history or ''}"


def decode_cursor(text: str, job_id: str) -> Cursor:
    """Read a cursor back.

    Raises:
        InvalidRequest: it is none, or another job's.
    """
    try:
        if len(text) > MAX_CURSOR_CHARACTERS:
            raise ValueError("too long")
        ours, dot, history = text.partition(".")
        raw = base64.b64decode(ours + "=" * (-len(ours) % 4), altchars=b"-_", validate=True)
        of_job, position = msgspec.msgpack.decode(raw, type=tuple[str, Position])
        if not dot or position.index < 0 or position.ordinal < 0:
            raise ValueError("not a place")
    except UNDECODABLE:
        raise InvalidRequest(
            "The cursor is not one that a stream of this API gave out.", field="cursor"
        ) from None
    if of_job != job_id:
        raise InvalidRequest("The cursor belongs to the stream of another job.", field="cursor")
    return Cursor(job_id, position, history or None)
