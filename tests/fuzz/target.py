"""What a fuzz target is, and what every target uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

MAX_INPUT_BYTES: Final = 64 * 1024
"""Inputs are cut here: nothing of interest needs more, and slow decoders show long before."""


class Target(msgspec.Struct, frozen=True):
    name: str
    run: Callable[[bytes], None]
    """Raises where the product does what it must not."""
    seeds: Callable[[], list[bytes]]
    """Inputs that are valid, or nearly, from which others are made; always the same."""
    share: int = 2
    """How many inputs it gets in a run, relative to others: less for what is slow."""


def caught(
    decode: Callable[[bytes], Any],
    data: bytes,
    documented: type[Exception] | tuple[type[Exception], ...],
) -> Any:
    """What `decode` gives, or None where it refuses as documented."""
    try:
        return decode(data)
    except documented:
        return None
