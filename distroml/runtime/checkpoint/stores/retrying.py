"""How long a failed request to a store waits before the next attempt, and when there is none. Pure."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

MAX_ATTEMPTS = 8
MAX_RETRY_S = 30.0
"""No attempt begins later than so long after the first one began to be in vain."""
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
LEAST_BYTES_PER_S = 512 * 1024
"""A part or range that arrives slower than this (and ``ATTEMPT_S``) is tried again."""
ATTEMPT_S = 30.0


def pause_s(attempt: int, elapsed_s: float, asked_s: float, chance: float) -> float | None:
    """The wait after so many attempts; None: give up.

    Args:
        elapsed_s: since the first attempt began.
        asked_s: what the server asked for (``Retry-After``), 0 where it did not.
        chance: 0 to 1, at random: who failed together does not come back together.
    """
    if attempt >= MAX_ATTEMPTS:
        return None
    usual_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1)) * (0.5 + chance / 2)
    pause = max(asked_s, usual_s)
    return pause if elapsed_s + pause <= MAX_RETRY_S else None


def attempt_timeout_s(size_bytes: int) -> float:
    """How long one attempt to move so many bytes may take."""
    return ATTEMPT_S + size_bytes / LEAST_BYTES_PER_S


def asked_wait_s(retry_after: str, now: float) -> float:
    """Seconds that a ``Retry-After`` header asks for: a number or a date; 0 where it says nothing usable.

    Args:
        now: Unix seconds.
    """
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
