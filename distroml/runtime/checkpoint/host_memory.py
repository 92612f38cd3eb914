"""Large pieces of host memory. What is touched for the first time costs several times what a copy costs, less so in huge
pages: so buffers are kept, and those that cannot be are taken in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

HUGE_FROM_BYTES = 4 * 1024 * 1024
TOUCH_BYTES = 2 * 1024 * 1024
"""Touched at a time; the interpreter does nothing else meanwhile."""


def allocate(size_bytes: int) -> memoryview:
    """``size_bytes`` of zeros, which live as long as any view of them."""
    if size_bytes < HUGE_FROM_BYTES:
        return memoryview(bytearray(size_bytes))
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def touch(memory: memoryview, enough: Callable[[], bool]) -> None:
    """Use all of ``memory`` for the first time, or as much as there is time for."""
    zeros = bytes(TOUCH_BYTES)
    for begin in range(0, len(memory), TOUCH_BYTES):
        if enough():
            return
        part = memory[begin : begin + TOUCH_BYTES]
        part[:] = zeros[: len(part)]
