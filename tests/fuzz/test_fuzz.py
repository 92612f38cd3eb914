"""Every target on its seeds, on many mutations of them and on all finds of the past; and that a find is found."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.consensus import connections, frames, messages, wal
from distroml.consensus.frames import FrameReader
from distroml.runtime.checkpoint import manifest, shard_file
from tests.fuzz import __main__ as program
from tests.fuzz import driver, guided
from tests.fuzz.driver import REGRESSIONS, TARGETS, Find, Hangs, keep, run, smallest
from tests.fuzz.link_targets import raft_message
from tests.fuzz.log_targets import entry, raft_inputs
from tests.fuzz.mutate import Mutator
from tests.fuzz.target import MAX_INPUT_BYTES, Target
from tests.fuzz.typed import sample

INPUTS_PER_SHARE = 4_000
SEED = 1


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_target(target: Target) -> None:
    run(target, INPUTS_PER_SHARE * target.share, SEED)


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.bin")), ids=lambda path: path.stem)
def test_find_of_the_past(path: Path) -> None:
    TARGETS[path.stem.rpartition("-")[0]].run(path.read_bytes())


# --- structure, where bytes alone would seldom get it right ----------------------------------------------------

_KINDS = messages.Message.__args__


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 34), st.sampled_from(_KINDS), st.randoms(use_true_random=False)),
        max_size=20,
    )
)
def test_a_core_survives_any_conversation(
    said: list[tuple[int, type, random.Random]],
) -> None:
    spoken = [(who, msgspec.Raw(messages.encode(sample(rng, kind)))) for who, kind, rng in said]
    raft_inputs(msgspec.msgpack.encode(spoken))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(_KINDS), st.randoms(use_true_random=False))
def test_messages_of_right_types_decode_or_are_refused(kind: type, rng: random.Random) -> None:
    raft_message(msgspec.msgpack.encode(sample(rng, kind)))


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.binary(max_size=5), st.lists, max_leaves=9))
def test_entries_of_any_shape_are_applied_or_refused(value: object) -> None:
    try:
        data = msgspec.msgpack.encode(value)
    except OverflowError:
        return  # an integer that MessagePack does not have
    entry(data)


# --- the fuzzer itself -----------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_inputs_again() -> None:
    seeds = TARGETS["raft_message"].seeds()
    one, again, other = (Mutator(seeds, random.Random(seed)) for seed in (5, 5, 6))
    inputs = [one.next() for _ in range(500)]
    assert inputs == [again.next() for _ in range(500)]
    assert inputs != [other.next() for _ in range(500)]
    assert len(set(inputs)) > 400
    assert max(map(len, inputs)) <= MAX_INPUT_BYTES


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_seeds_are_the_same_each_time(target: Target) -> None:
    assert target.seeds() == target.seeds()
    assert target.seeds()


def _finds(name: str, inputs: int = 20_000) -> Find:
    with pytest.raises(Find) as found:
        run(TARGETS[name], inputs, SEED)
    return found.value


def test_a_log_without_checksums_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whatever:
        __ne__ = lambda _self, _other: False  # noqa: E731

    monkeypatch.setattr(wal, "_checksum", lambda _salt, _sequence, _payload: Whatever())
    assert _finds("log_file").target.name == "log_file"


def test_a_checksum_that_misses_a_byte_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "_checksum", lambda salt, *_: zlib.crc32(salt.to_bytes(8, "little")))
    monkeypatch.setattr("tests.fuzz.log_targets._LOG", _log_by_the_product_as_it_is())
    assert _finds("damaged_log")


def _log_by_the_product_as_it_is() -> bytes:
    from tests.fuzz.log_targets import _whole_log

    return _whole_log()[0]


def test_an_unlimited_frame_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FrameReader, "limit_bytes", property(lambda _: 10**9, lambda *_: None), raising=False
    )
    assert _finds("frame_reader")


def test_an_unchecked_tag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameReader, "_check_tag", lambda *_: None)
    assert _finds("tagged_frames")


def test_a_manifest_whose_layout_is_not_checked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_check_layout", lambda *_: None)
    assert _finds("manifest")


def test_frames_that_are_not_checked_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "_check_frames", lambda *_: None)
    assert _finds("manifest")


def test_an_unchecked_proof_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "same", lambda _one, _other: True)
    assert _finds("inbound_with_key")


def test_a_frame_before_the_handshake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(self: connections.Inbound, channel: int, body: bytes) -> None:
        if channel == frames.LINK_CHANNEL:
            frames.decode_link_message(body)
        else:
            self.owner.frame(self, channel, body)

    monkeypatch.setattr(connections.Inbound, "on_frame", trusting)
    assert _finds("inbound_with_key")


def test_an_entry_check_that_is_missing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_check_entries", lambda _message: None)
    assert _finds("raft_message")


def test_a_find_is_made_small_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_two_bytes(data: bytes) -> None:
        assert not (b"\x07" in data and data.endswith(b"\x09"))

    target = Target("small", needs_two_bytes, lambda: [bytes(range(10)) * 20])
    found = smallest(target, bytes(range(10)) * 20, AssertionError())
    assert found == b"\x07\x09"
    monkeypatch.setattr(driver, "REGRESSIONS", tmp_path / "kept")
    path = keep(Find(target, found, AssertionError()))
    assert path.read_bytes() == found
    assert path.stem.rpartition("-")[0] == "small"


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(data: bytes) -> None:
        while data == b"hang":
            pass

    monkeypatch.setattr(driver, "INPUT_LIMIT_S", 0.05)
    with pytest.raises(Find) as found:
        run(Target("hangs", hangs, lambda: [b"fine", b"hang"]), 0, SEED)
    assert isinstance(found.value.__cause__, Hangs)
    assert found.value.data == b"hang"


def test_memory_without_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytearray] = []
    monkeypatch.setattr(driver, "MEMORY_LIMIT_BYTES", 1024 * 1024)
    at_first = driver.peak_bytes()
    monkeypatch.setattr(driver, "peak_bytes", lambda: at_first + sum(len(block) for block in kept))
    target = Target("grows", lambda _: kept.append(bytearray(64 * 1024)), lambda: [b"x"])
    with pytest.raises(MemoryError, match="grows: memory grew by"):
        run(target, 50, SEED)


def test_an_unknown_target_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "nothing"])
    with pytest.raises(SystemExit):
        program.main()
    assert "no such target: nothing; there are frame_reader" in capsys.readouterr().err


def test_without_atheris_it_says_so_and_mutates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guided, "available", lambda: False)
    monkeypatch.setattr(program, "ROUND", 100)
    monkeypatch.setattr(program.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(program.logging, "disable", lambda _: None)
    monkeypatch.setattr("sys.argv", ["fuzz", "raft_message", "--minutes", "0.001", "--seed", "3"])
    assert program.main() == 0
    told = capsys.readouterr()
    assert "atheris is not installed" in told.err
    assert "pip install -c constraints.txt '.[fuzz]'" in told.err
    assert "from seed 3, 0 finds" in told.out
