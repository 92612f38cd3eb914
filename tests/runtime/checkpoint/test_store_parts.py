"""The pure parts of object stores: parts of files, pauses between attempts, what is left out of texts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.runtime.checkpoint.stores import parts, retrying
from distroml.runtime.checkpoint.stores.parts import MAX_PARTS, PART_BYTES, Parts, part_size
from distroml.runtime.checkpoint.stores.redaction import HIDDEN, MAX_CHARACTERS, redacted
from distroml.runtime.checkpoint.stores.retrying import (
    MAX_ATTEMPTS,
    MAX_PAUSE_S,
    MAX_RETRY_S,
    asked_wait_s,
    attempt_timeout_s,
    pause_s,
)

GIB = 1024**3


@given(st.integers(0, 5 * 1024 * GIB))
def test_parts_are_16_mib_and_more_only_where_they_would_be_too_many(size: int) -> None:
    each = part_size(size)
    assert -(-size // each) <= MAX_PARTS
    assert each == PART_BYTES or size > MAX_PARTS * PART_BYTES
    assert each % (1024 * 1024) == 0


@given(st.data())
def test_pieces_in_any_order_become_the_file(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    content = bytes(n % 251 for n in range(size))
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size)))})
    pieces = data.draw(st.permutations(list(pairwise(cuts))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", 16)
        patch.setattr(parts, "_MIB", 1)
        made = Parts(size)
        found: dict[int, bytes] = {}
        for begin, end in pieces:
            for number, views in made.add(begin, content[begin:end]):
                assert number not in found
                found[number] = b"".join(views)
    assert made.missing_bytes == 0
    assert sorted(found) == list(range(1, -(-size // 16) + 1))
    assert b"".join(found[number] for number in sorted(found)) == content
    assert all(len(found[number]) == 16 for number in sorted(found)[:-1])


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([(0, b"abc"), (2, b"c")], "came twice"),
        ([(0, b"ab"), (1, b"bc")], "came twice"),
        ([(2, b"cd")], "of a file of 3"),
        ([(-1, b"a")], "of a file of 3"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces: list[tuple[int, bytes]], said: str) -> None:
    made = Parts(3)
    *before, (offset, data) = pieces
    for one in before:
        made.add(*one)
    with pytest.raises(ValueError, match=said):
        made.add(offset, data)


@given(st.floats(0, 1), st.floats(0, 60), st.floats(0, 1e6))
def test_attempts_end_in_number_and_time(chance: float, elapsed_s: float, asked_s: float) -> None:
    for attempt in range(1, MAX_ATTEMPTS):
        pause = pause_s(attempt, elapsed_s, asked_s, chance)
        if pause is None:
            assert elapsed_s + max(MAX_PAUSE_S, asked_s) > MAX_RETRY_S
        else:
            assert pause >= asked_s
            assert elapsed_s + pause <= MAX_RETRY_S
    assert pause_s(MAX_ATTEMPTS, 0.0, 0.0, chance) is None


def test_pauses_grow_and_differ() -> None:
    pauses = [pause_s(attempt, 0.0, 0.0, 1.0) for attempt in range(1, MAX_ATTEMPTS)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_PAUSE_S
    assert pause_s(3, 0.0, 0.0, 0.0) != pause_s(3, 0.0, 0.0, 1.0)
    assert attempt_timeout_s(32 * 1024 * 1024) > retrying.ATTEMPT_S


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("nan", 0.0),
        ("Sat, 28 Nov 2026 00:00:10 GMT", 10.0),
        ("Fri, 27 Nov 2026 00:00:10 GMT", 0.0),
        ("soon", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float) -> None:
    assert asked_wait_s(header, 1795824000.0) == seconds


def test_texts_of_others_are_told_without_secrets() -> None:
    environ = {"AZURE_STORAGE_ACCOUNT_KEY": "topsecretvalue==", "HOME": "/home/someone"}
    told = redacted(
        "bad key topsecretvalue== in /home/someone, given abcdef, at http://me:pass@host\nmore",
        ["abcdef", "", "x"],
        environ,
    )
    assert told == f"bad key {HIDDEN} in /home/someone, given {HIDDEN}, at http://{HIDDEN}@host"
    assert redacted("", [], {}) == ""
    assert len(redacted("y" * 10_000, [], {})) == MAX_CHARACTERS
