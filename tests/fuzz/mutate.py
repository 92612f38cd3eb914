"""Inputs by mutation: a valid one with some bits, bytes, lengths or spans changed. Deterministic by seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from tests.fuzz.target import MAX_INPUT_BYTES

_NUMBERS: Final = (
    0,
    1,
    2,
    4,
    5,
    127,
    128,
    255,
    4096,
    4097,
    2**16,
    2**22,
    2**22 + 1,
    2**31,
    2**32 - 1,
)
_TOKENS: Final = (
    b"\x90", b"\x91", b"\x80", b"\xc0", b"\xc1", b"\xc2", b"\xc4\x00", b"\xc6\xff\xff\xff\xff",
    b"\xc7\x01\x00\x00", b"\xd6\xff\x00\x00\x00\x01", b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xa1\xff",
    b"\xa3\xed\xa0\x80", b"\x91" * 1500, b"[" * 1500, b'{"a":' * 700, b"1e999", b"-1", b"null", b'"',
    b"\\ud800", b"9" * 400, b"\x00" * 8, b"\xff" * 8,
)  # fmt: skip
"""Pieces that decoders stumble over: extremes of MessagePack and JSON, deep nesting, bad UTF-8."""


class Mutator:
    """An endless source of inputs."""

    def __init__(self, seeds: list[bytes], rng: random.Random) -> None:
        if not seeds:
            raise ValueError("a target needs at least one seed")
        self._seeds, self._rng = seeds, rng

    def next(self) -> bytes:
        """About every fiftieth input is a valid one, and as many are nothing but noise."""
        rng = self._rng
        luck = rng.random()
        if luck < 0.02:
            return rng.choice(self._seeds)
        if luck < 0.04:
            return rng.randbytes(rng.randrange(64))
        data = bytearray(rng.choice(self._seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
            rng.choice(_CHANGES)(self, data)
        return bytes(data[:MAX_INPUT_BYTES])

    def _place(self, data: bytearray) -> int:
        return self._rng.randrange(len(data) + 1)

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)

    def _set(self, data: bytearray) -> None:
        if data:
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)

    def _cut(self, data: bytearray) -> None:
        del data[self._place(data) :]

    def _remove(self, data: bytearray) -> None:
        start = self._place(data)
        del data[start : start + self._rng.choice((1, 1, 2, 4, 8, 32))]

    def _double(self, data: bytearray) -> None:
        start = self._place(data)
        data[start:start] = data[start : start + self._rng.choice((1, 4, 16, 64))]

    def _insert(self, data: bytearray) -> None:
        start = self._place(data)
        data[start:start] = self._rng.choice(_TOKENS)

    def _overwrite(self, data: bytearray) -> None:
        start, token = self._place(data), self._rng.choice(_TOKENS)
        data[start : start + len(token)] = token

    def _number(self, data: bytearray) -> None:
        """A length field, maybe: also near to what it was."""
        rng, size = self._rng, self._rng.choice((1, 2, 4, 8))
        start, order = self._place(data), rng.choice(("big", "little"))
        if rng.random() < 0.5:
            number = rng.choice(_NUMBERS)
        else:
            number = int.from_bytes(data[start : start + size], order) + rng.choice((-1, 1, 2, 16))
        data[start : start + size] = (number % 256**size).to_bytes(size, order)

    def _splice(self, data: bytearray) -> None:
        other = self._rng.choice(self._seeds)
        data[self._place(data) :] = other[self._rng.randrange(len(other) + 1) :]

    def _append(self, data: bytearray) -> None:
        data += self._rng.choice(self._seeds)


_CHANGES: Final[tuple[Callable[[Mutator, bytearray], None], ...]] = (
    Mutator._flip, Mutator._flip, Mutator._set, Mutator._cut, Mutator._remove, Mutator._double,
    Mutator._insert, Mutator._overwrite, Mutator._number, Mutator._number, Mutator._splice,
    Mutator._append,
)  # fmt: skip
