"""A file that comes in parts is taken only if every byte is as committed, however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.runtime.checkpoint.reader import read_manifest
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.replicas.arriving import Arriving, Differs
from distroml.runtime.replicas.bringing import manifest_file, shard_files
from distroml.runtime.replicas.wire import File
from tests.runtime.checkpoint.shards import committed


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[File, bytes]]:
    store = FileStore(tmp_path_factory.mktemp("store"))
    checkpoint = committed(store)
    files = [manifest_file(checkpoint), *shard_files(checkpoint, read_manifest(store, checkpoint))]
    return [(file, store.read(file.path)) for file in files]


def parts(content: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    return [content[begin:end] for begin, end in pairwise(edges)]


def feed(arriving: Arriving, content: bytes, cuts: list[int]) -> None:
    for part in parts(content, cuts):
        arriving.feed(part)


CUTS = st.lists(st.integers(0, 10_000), max_size=12)


@given(cuts=CUTS)
def test_what_is_right_is_whole_however_it_is_cut(
    contents: list[tuple[File, bytes]], cuts: list[int]
) -> None:
    for file, content in contents:
        arriving = Arriving(file, len(content))
        for part in parts(content, cuts):
            assert not arriving.whole
            arriving.feed(part)
        assert arriving.whole


@settings(max_examples=300)
@given(cuts=CUTS, at=st.integers(0, 100_000), bit=st.integers(0, 7), which=st.integers(0, 2))
def test_a_wrong_bit_is_noticed_and_only_its_piece_comes_again(
    contents: list[tuple[File, bytes]], cuts: list[int], at: int, bit: int, which: int
) -> None:
    file, content = contents[which]
    wrong = bytearray(content)
    wrong[at % len(content)] ^= 1 << bit
    arriving = Arriving(file, len(content))
    with pytest.raises(Differs):
        feed(arriving, bytes(wrong), cuts)
    begin = arriving.rewind()
    assert begin <= at % len(content)
    assert bytes(wrong[:begin]) == content[:begin]
    feed(arriving, content[begin:], cuts)
    assert arriving.whole


def test_more_or_less_than_the_file_is_not_the_file(contents: list[tuple[File, bytes]]) -> None:
    for file, content in contents:
        longer = Arriving(file, len(content) + 1)
        with pytest.raises(Differs):
            longer.feed(content + b"x")
        shorter = Arriving(file, len(content))
        shorter.feed(content[:-1])
        assert not shorter.whole
        with pytest.raises(Differs):
            Arriving(file, len(content)).feed(content + b"x")
