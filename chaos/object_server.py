"""The object store of a run, a process of its own: moto, and before it a proxy that fails as the faults of the run want.

``python -m chaos.object_server HOST PORT`` prints a line once it serves. Each line that it reads is the whole of what is wrong from
then on, a JSON list of ``Outage``; once that holds it answers with the number of requests that were struck so far. It ends with
its input, and so with the harness.
"""

from __future__ import annotations

import http.client
import logging
import math
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from chaos.object_proxy import LOOPBACK, Asked, Harm, ObjectProxy

BUCKET = "chaos"
CUT_BYTES = 10
REFUSED, RESET = "refused", "reset"
_ERRORS = (
    Harm(answer=(503, "SlowDown")),
    Harm(answer=(500, "InternalError")),
    Harm(reset="request"),
    Harm(reset="answer"),
    Harm(cut=CUT_BYTES),
)


class Outage(Struct, frozen=True, kw_only=True):
    """What one fault does to the object store."""

    down: str = ""
    """``refused``: nobody listens; ``reset``: connections are taken. Either way each request is reset."""
    delay_s: float = 0.0
    """Answers come so much later."""
    errors: float = 0.0
    """Share of the requests that fail: refused by the server, reset in the middle or once they were done, cut short."""


def harm_by(outages: Sequence[Outage], chance: float, pick: float) -> Harm | None:
    """What becomes of a request under all of these.

    Args:
        chance, pick: in [0, 1), drawn for this request.
    """
    if any(one.down for one in outages):
        return Harm(reset="request")
    delay_s = max((one.delay_s for one in outages), default=0.0)
    if chance >= math.prod(1 - one.errors for one in outages):
        return replace(_ERRORS[int(pick * len(_ERRORS))], delay_s=delay_s)
    return Harm(delay_s=delay_s) if delay_s else None


class FailingProxy(ObjectProxy):
    """Fails as a set of outages wants."""

    def __init__(self, upstream: str, host: str = LOOPBACK, port: int = 0) -> None:
        self.struck = 0
        """Requests that did not pass unharmed; of those that nobody accepted nothing is known."""
        self._outages: Sequence[Outage] = ()
        self._rng = random.Random()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        super().__init__(upstream, host, port)

    def suffer(self, outages: Sequence[Outage]) -> None:
        """These hold from now on, and no others; who was held back by a delay goes on."""
        with self._lock:
            self._outages = outages
            before, self._changed = self._changed, threading.Event()
        before.set()
        if any(one.down == REFUSED for one in outages):
            self.refuse()
        else:
            self.accept()

    def harm_of(self, asked: Asked) -> Harm | None:
        """By chance."""
        with self._lock:
            harm = harm_by(self._outages, self._rng.random(), self._rng.random())
            self.struck += harm is not None
        return harm

    def delay(self, delay_s: float) -> None:
        """For as long as the outages stay what they are."""
        self._changed.wait(delay_s)


@contextmanager
def moto(bucket: str) -> Iterator[str]:
    """The URL of an S3 server in this process, with one empty bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(LOOPBACK, 0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        _create(url, bucket)
        yield url
    finally:
        server.stop()


def _create(url: str, bucket: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    try:
        connection.request("PUT", f"/{bucket}")
        status = connection.getresponse().status
    finally:
        connection.close()
    if status != http.HTTPStatus.OK:
        raise RuntimeError(f"moto made no bucket {bucket}: HTTP {status}")


def main() -> None:
    """The process."""
    host, port = sys.argv[1], int(sys.argv[2])
    with moto(BUCKET) as upstream:
        proxy = FailingProxy(upstream, host, port)
        print(proxy.url, flush=True)
        for line in sys.stdin:
            proxy.suffer(msgspec.json.decode(line, type=tuple[Outage, ...]))
            print(proxy.struck, flush=True)


if __name__ == "__main__":
    main()
