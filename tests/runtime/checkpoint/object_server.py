"""An S3 server in this process, and the proxy of chaos before it, which fails as a test says of single requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from chaos.object_proxy import Asked, Harm, ObjectProxy
from chaos.object_server import moto
from distroml.runtime.checkpoint.stores import parts, s3, s3_upload

__all__ = ["Asked", "Fault", "FaultProxy", "object_server"]

BUCKET = "bucket"
ACCESS_KEY = "AKIAFAKEACCESSKEY000"
SECRET_KEY = "FakeSecretThatMustAppearNowhere+/0"
SESSION_TOKEN = "FakeSessionTokenThatMustAppearNowhere//=="
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_SESSION_TOKEN": SESSION_TOKEN,
    "AWS_EC2_METADATA_DISABLED": "true",
}


SMALL_PART_BYTES = 5 * 1024 * 1024
"""S3 takes no smaller one."""
WITH_PART_BYTES = (parts, s3, s3_upload)
"""Modules that hold the size of a part."""


@contextmanager
def object_server() -> Iterator[str]:
    """The URL of a server with one empty bucket."""
    with moto(BUCKET) as url:
        yield url


@dataclass
class Fault(Harm):
    """What becomes of the next ``times`` requests for which ``when`` holds."""

    when: Callable[[Asked], bool]
    times: int = 1
    message: str = field(default=f"told by {SECRET_KEY}", kw_only=True)


class FaultProxy(ObjectProxy):
    """Knows what it saw, and how much of it is under way."""

    def __init__(self, upstream: str) -> None:
        self.faults: list[Fault] = []
        self.seen: list[Asked] = []
        self.in_flight_bytes = self.most_in_flight_bytes = 0
        self._lock = threading.Lock()
        super().__init__(upstream)

    def forget(self) -> None:
        """Nothing fails any more, and nothing was seen."""
        with self._lock:
            self.faults.clear()
            self.seen.clear()
            self.most_in_flight_bytes = self.in_flight_bytes

    def harm_of(self, asked: Asked) -> Harm | None:
        self.seen.append(asked)
        for fault in list(self.faults):
            if fault.when(asked):  # without the lock: it may wait for something
                with self._lock:
                    if fault.times > 0:
                        fault.times -= 1
                        return fault
        return None

    def holds(self, size_bytes: int) -> None:
        with self._lock:
            self.in_flight_bytes += size_bytes
            self.most_in_flight_bytes = max(self.most_in_flight_bytes, self.in_flight_bytes)
