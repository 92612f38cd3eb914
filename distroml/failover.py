"""Which node to ask next, how long to wait before, and when to give up: the client's retry policy.

Pure: the time and the random numbers come from the caller. ``client`` asks ``next`` for an attempt, makes it, and
tells ``failed`` what came of it. Nodes are tried in turn, beginning with the one that answered last; only after a
full round does the client wait (exponential back-off with jitter), so one dead node costs no delay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from msgspec import Struct

from distroml.errors import ConfigError, OutcomeUnknown, Unavailable

DEFAULT_URL = "http://127.0.0.1:8101"
MAX_URLS = 64
MAX_ATTEMPTS = 512
"""Hard bound on one call, whatever its deadline is."""
BACKOFF_BASE_S = 0.1
BACKOFF_CAP_S = 2.0
_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]@?#]+)(:\d{1,5})?(/[^\s?#]*)?\Z")
UNREACHED_ROUNDS = 4
"""Rounds after which a call ends early if not one node could even be connected to (about a second)."""


def parse_urls(text: str) -> tuple[str, ...]:
    """Base URLs of a comma-separated list; ``host:port`` means ``http://host:port``.

    Raises:
        ConfigError: nothing is named, a scheme other than http(s), or no host.
    """
    urls: list[str] = []
    for part in text.split(","):
        url = part.strip().rstrip("/")
        if not url:
            continue
        if "://" not in url:
            url = f"http://{url}"
        if not _URL.match(url):
            raise ConfigError(
                f"{part.strip()!r} is not a node's URL; write it like {DEFAULT_URL} "
                "(several are separated by commas).",
                field="url",
            )
        if url not in urls:
            urls.append(url)
    if not 1 <= len(urls) <= MAX_URLS:
        raise ConfigError(
            f"Name 1 to {MAX_URLS} nodes in --url or DISTROML_URL, for example {DEFAULT_URL}.",
            field="url",
        )
    return tuple(urls)


class Attempt(Struct, frozen=True):
    """One try: sleep ``wait_s``, then ask ``url`` and take at most ``timeout_s`` for it."""

    url: str
    wait_s: float
    timeout_s: float


class Failover:
    """The attempts of one call.

    Args:
        urls: the nodes, each once.
        start: index of the node to begin with.
        deadline: when the call must be over, on the caller's clock.
        random: uniform numbers in [0, 1).
        persist: go on until the deadline even while no node can be reached (a cluster that restarts).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        start: int,
        deadline: float,
        random: Callable[[], float],
        persist: bool = False,
    ) -> None:
        self._urls = urls
        self._start = start % len(urls)
        self._deadline = deadline
        self._random = random
        self._persist = persist
        self._attempts = 0
        self._failures: dict[str, str] = {}
        self._reached = False
        self._maybe_done = False
        self._retry_after_s = 0.0

    @property
    def index(self) -> int:
        """Index of the node of the latest attempt."""
        return (self._start + max(0, self._attempts - 1)) % len(self._urls)

    def next(self, now: float) -> Attempt | None:
        """The next attempt, or None when it is time to give up."""
        round_number, position = divmod(self._attempts, len(self._urls))
        if self._attempts >= MAX_ATTEMPTS or now >= self._deadline:
            return None
        if round_number >= UNREACHED_ROUNDS and not (self._reached or self._persist):
            return None
        wait_s = 0.0
        if position == 0 and round_number > 0:
            wait_s = self._backoff_s(round_number - 1)
            self._retry_after_s = 0.0
        if now + wait_s >= self._deadline:
            return None
        url = self._urls[(self._start + self._attempts) % len(self._urls)]
        self._attempts += 1
        return Attempt(url, wait_s, self._deadline - now - wait_s)

    def failed(
        self, why: str, *, reached: bool, maybe_done: bool = False, retry_after_s: float = 0.0
    ) -> None:
        """Note why the latest attempt failed.

        Args:
            why: a few words, shown to people beside the URL.
            reached: a connection was made, so there is a living host.
            maybe_done: the node may have taken the request before it failed.
            retry_after_s: what the node asked for.
        """
        self._failures[self._urls[self.index]] = why
        self._reached = self._reached or reached
        self._maybe_done = self._maybe_done or maybe_done
        self._retry_after_s = max(self._retry_after_s, min(retry_after_s, BACKOFF_CAP_S))

    def renew(self, deadline: float) -> None:
        """The latest attempt works (a stream delivers): what follows starts after it, with a new deadline."""
        self._start, self._attempts, self._deadline = self.index, 1, deadline
        self._failures.clear()
        self._retry_after_s = 0.0

    def error(self, what: str, key: str | None = None) -> Unavailable:
        """The exception for a call that was given up; names every URL tried and why it failed.

        Args:
            what: the request, such as ``GET /api/jobs``.
            key: the Idempotency-Key of a write, None for a read.
        """
        tried = "; ".join(f"{url} ({why})" for url, why in self._failures.items())
        if not tried:
            tried = ", ".join(self._urls) + " (no time was left to ask)"
        if key is not None and self._maybe_done:
            return OutcomeUnknown(
                f"{what}: it is not known whether this took effect. Tried {tried}. "
                f"Retry with Idempotency-Key {key}; it then takes effect at most once.",
                idempotency_key=key,
                urls=list(self._urls),
            )
        return Unavailable(
            f"{what}: no node answered. Tried {tried}. "
            "Check that distroml-node runs there, or name other nodes with --url or DISTROML_URL.",
            urls=list(self._urls),
        )

    def _backoff_s(self, exponent: int) -> float:
        full = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(exponent, 16))
        return max(self._retry_after_s, full * (0.5 + 0.5 * self._random()))
