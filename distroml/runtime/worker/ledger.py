"""The record of what was learnt from: a rolling digest of the sample ids that each step consumed.

Each logical shard's ids are hashed where they are read, the hashes of a step travel with its note, and every rank
chains them. It is part of the state, so a step that was done again did not count twice and one that was lost is
missing: two runs with the same digest have seen the same samples in the same steps.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

NO_IDS = (0.0, 0.0)
EMPTY_LEDGER = ""


def digest_ids(ids: bytes) -> tuple[float, float]:
    """64 bits of a hash of the ids of one shard, as two floats that hold 32 bits exactly."""
    high, low = struct.unpack(">II", hashlib.blake2b(ids, digest_size=8).digest())
    return float(high), float(low)


def advance(ledger: str, step: int, ids: Iterable[tuple[float, float]]) -> str:
    """The digest (hexadecimal SHA-256) after ``step`` consumed ``ids``, given by shard in order."""
    chain = hashlib.sha256(ledger.encode())
    chain.update(struct.pack(">q", step))
    for high, low in ids:
        chain.update(struct.pack(">II", int(high), int(low)))
    return chain.hexdigest()
