"""Texts of others, such as the errors of a server or a library, without what must not be told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

MAX_CHARACTERS = 300
SHORTEST_SECRET = 6
"""What is shorter is no secret, and replacing it would spoil every text."""
HIDDEN = "***"

_HOLDS_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|CONNECTION_STRING|SAS")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def redacted(
    text: str, secrets: Iterable[str] = (), environ: Mapping[str, str] = os.environ
) -> str:
    """The first line of ``text``, cut, without ``secrets`` and what variables named after secrets hold."""
    told = next(iter(text.strip().splitlines()), "")
    held = (value for name, value in environ.items() if _HOLDS_SECRET.search(name.upper()))
    for secret in sorted({*secrets, *held}, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            told = told.replace(secret, HIDDEN)
    return _USER_IN_URL.sub(f"{HIDDEN}@", told)[:MAX_CHARACTERS]
