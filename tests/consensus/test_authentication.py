"""Proof of the cluster key and tags on frames, over connections in memory: any changed bit is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus.authentication import (
    NO_SECRETS,
    FrameTags,
    LinkSecurity,
    derive_secrets,
    load_link_security,
)
from distroml.consensus.connections import Inbound, Outbound
from distroml.consensus.frames import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    BadFrame,
    Confirm,
    FrameReader,
    Hello,
    Lane,
    Welcome,
    encode_link_message,
    encode_tagged_frame,
    transcript,
)
from distroml.credentials import ClusterKeys, key_id, load_cluster_keys, new_key
from distroml.errors import ConfigError
from tests.consensus.memory_links import (
    FRAMES,
    KEY,
    OTHER_KEY,
    WITH_KEY,
    Change,
    End,
    Memory,
    Wire,
    flipped,
)


def test_two_nodes_with_the_key_talk() -> None:
    wire = Wire()
    wire.run()
    assert wire.b.delivered == list(FRAMES)
    assert not wire.a.refusals | wire.b.refusals
    assert len(wire.sent) == 3 + len(FRAMES)


def test_without_security_frames_are_as_short_as_can_be() -> None:
    wire = Wire(LinkSecurity(), LinkSecurity())
    wire.run()
    assert wire.b.delivered == list(FRAMES)
    assert [len(data) for _, data in wire.sent[3:]] == [5 + len(frame) for frame in FRAMES]


@pytest.mark.parametrize(
    ("a", "b", "at_a", "at_b"),
    [
        (ClusterKeys(KEY), ClusterKeys(OTHER_KEY), "refused_wrong_key", "refused_by_dialer"),
        (ClusterKeys(KEY), ClusterKeys(), "refused_wrong_key", "refused_by_dialer"),
        (ClusterKeys(), ClusterKeys(KEY), "refused_wrong_key", "refused_by_dialer"),
        (ClusterKeys(KEY), ClusterKeys(OTHER_KEY, KEY), "refused_wrong_key", "refused_by_dialer"),
    ],
)
def test_another_key_or_none_is_refused_and_both_sides_know(
    a: ClusterKeys, b: ClusterKeys, at_a: str, at_b: str
) -> None:
    wire = Wire(LinkSecurity(keys=a), LinkSecurity(keys=b))
    wire.run()
    assert wire.a.refusals == {at_a}
    assert wire.b.refusals == {at_b}
    assert not wire.b.established
    assert wire.b.delivered == []


@pytest.mark.parametrize(
    ("a", "b"),
    [
        # the steps of a rotation from KEY to OTHER_KEY, each with a node that is one step behind
        (ClusterKeys(KEY, OTHER_KEY), ClusterKeys(KEY)),
        (ClusterKeys(OTHER_KEY, KEY), ClusterKeys(KEY, OTHER_KEY)),
        (ClusterKeys(OTHER_KEY), ClusterKeys(OTHER_KEY, KEY)),
    ],
)
def test_every_step_of_a_rotation_keeps_the_links(a: ClusterKeys, b: ClusterKeys) -> None:
    for dialer, acceptor in ((a, b), (b, a)):
        wire = Wire(LinkSecurity(keys=dialer), LinkSecurity(keys=acceptor))
        wire.run()
        assert wire.b.delivered == list(FRAMES)


# ---------------------------------------------------------------------- attacks


def clean_run() -> Wire:
    wire = Wire()
    wire.run()
    return wire


SIZES = [len(data) for _, data in clean_run().sent]


@given(st.data())
def test_any_flipped_bit_of_any_message_is_refused(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(SIZES) - 1), label="message")
    bit = data.draw(st.integers(0, SIZES[number] * 8 - 1), label="bit")
    check_flip(number, bit)


def test_each_single_bit_of_the_handshake_counts() -> None:
    for number in range(3):
        for bit in range(SIZES[number] * 8):
            if bit % 8 == bit // 8 % 8:  # one bit of each byte here; hypothesis looks at the others
                check_flip(number, bit)


def check_flip(number: int, bit: int) -> None:
    wire = Wire()
    wire.run(lambda sent, data: [flipped(data, bit)] if sent == number else [data])
    # What came whole before the changed message may arrive; nothing after it ever does.
    assert wire.b.delivered == list(FRAMES[: max(0, number - 3)])
    assert wire.b.established == (number > 2)
    length_grew = bit < 32  # then the reader waits for bytes that a deadline ends
    assert length_grew or wire.a.refusals | wire.b.refusals


@given(st.integers(0, 2), st.binary(min_size=1, max_size=80))
def test_injected_bytes_after_the_handshake_are_refused(place: int, injected: bytes) -> None:
    wire = Wire()
    wire.run(lambda sent, data: [injected, data] if sent == 3 + place else [data])
    assert wire.b.delivered == list(FRAMES[:place])


@pytest.mark.parametrize(
    "change",
    [
        lambda sent, data: [data, data] if sent == 3 else [data],
        lambda sent, data: [] if sent == 3 else [data],
        lambda sent, data: [data, b"\x00\x00\x00\x05\x01hello"] if sent == 3 else [data],
    ],
    ids=["repeated", "dropped", "untagged"],
)
def test_repeated_dropped_and_untagged_frames_end_the_link(change: Change) -> None:
    wire = Wire()
    wire.run(change)
    assert len(wire.b.delivered) <= 1
    assert "refused_tampered" in wire.b.refusals


def test_a_recorded_conversation_cannot_be_replayed() -> None:
    recorded = [data for name, data in clean_run().sent if name == "a"]

    async def replay(end: End, *, whole: bool) -> None:
        acceptor, transport = Inbound(end), Memory()
        acceptor.connection_made(transport)
        for data in [b"".join(recorded)] if whole else recorded:
            if not transport.closed:
                acceptor.data_received(data)
        acceptor.connection_lost(None)

    for whole in (False, True):
        end = End("b", WITH_KEY)
        asyncio.run(replay(end, whole=whole))
        assert end.refusals == {"refused_wrong_key"}
        assert not end.established
        assert end.delivered == []


def test_recorded_frames_do_not_fit_into_a_new_conversation() -> None:
    recorded = clean_run().sent[3][1]
    wire = Wire()
    wire.run(lambda sent, data: [recorded] if sent == 3 else [data])
    assert wire.b.delivered == []
    assert "refused_tampered" in wire.b.refusals


def test_what_a_node_said_cannot_be_reflected_to_it() -> None:
    async def reflect() -> End:
        end = End("a", WITH_KEY)
        dialer, from_dialer = Outbound(end, Wire().hello()), Memory()
        acceptor, from_acceptor = Inbound(end), Memory()
        acceptor.connection_made(from_acceptor)
        dialer.connection_made(from_dialer)
        acceptor.data_received(from_dialer.written[0])
        dialer.data_received(from_dialer.written[0])
        for connection in (dialer, acceptor):
            assert not connection.established
            connection.connection_lost(None)
        return end

    end = asyncio.run(reflect())
    assert end.refusals == {"refused_unknown_peer", "refused_garbage"}


def test_the_acceptors_proof_is_none_of_the_dialers() -> None:
    """An attacker who got a proof from b for its own hello hands the same proof back as its own."""

    async def echo() -> End:
        end = End("b", WITH_KEY)
        acceptor, transport = Inbound(end), Memory()
        acceptor.connection_made(transport)
        acceptor.data_received(encode_link_message(Wire().hello()))
        body = transport.written[0][5:]
        welcome = msgspec.msgpack.decode(body, type=Welcome)
        acceptor.data_received(encode_link_message(Confirm(welcome.proof)))
        acceptor.connection_lost(None)
        return end

    end = asyncio.run(echo())
    assert end.refusals == {"refused_wrong_key"}
    assert not end.established


FIELDS = st.sampled_from(
    [
        ("version", 9),
        ("cluster_id", "other"),
        ("name", "c"),
        ("target", "c"),
        ("incarnation", 4),
        ("epoch", 8),
        ("lane", Lane.BULK),
        ("nonce", b"m" * NONCE_BYTES),
        ("voters", b"others"),
    ]
)
ANSWERS = st.sampled_from(
    [("version", 9), ("name", "c"), ("incarnation", 9), ("nonce", b"o" * NONCE_BYTES)]
)


@given(st.one_of(st.tuples(st.just(0), FIELDS), st.tuples(st.just(1), ANSWERS)))
def test_a_proof_is_bound_to_every_field_that_was_said(
    changed: tuple[int, tuple[str, object]],
) -> None:
    said: list[Hello | Welcome] = [
        Wire().hello(),
        Welcome(PROTOCOL_VERSION, "b", 5, b"w" * NONCE_BYTES, b""),
    ]
    before = derive_secrets(KEY, transcript(*said))  # type: ignore[arg-type]
    place, (field, value) = changed
    said[place] = msgspec.structs.replace(said[place], **{field: value})
    after = derive_secrets(KEY, transcript(*said))  # type: ignore[arg-type]
    ours, theirs = msgspec.structs.astuple(before), msgspec.structs.astuple(after)
    assert len({*ours, *theirs}) == 8


def test_secrets_are_those_of_another_hkdf() -> None:
    said = b"what both said"
    secrets = derive_secrets(KEY, said)
    for info, secret in (
        (b"distroml peer link acceptor proof", secrets.acceptor_proof),
        (b"distroml peer link dialer proof", secrets.dialer_proof),
        (b"distroml peer link dialer frames", secrets.dialer_tag_key),
        (b"distroml peer link acceptor frames", secrets.acceptor_tag_key),
    ):
        salt = hashlib.sha256(said).digest()
        assert HKDF(hashes.SHA256(), length=32, salt=salt, info=info).derive(KEY) == secret


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 30))
def test_tagged_frames_survive_any_cutting(bodies: list[bytes], piece: int) -> None:
    sender, reader = FrameTags(KEY), FrameReader(64)
    reader.expect_tags(FrameTags(KEY).next, 16)
    stream = b"".join(encode_tagged_frame(1, body, sender.next) for body in bodies)
    seen = []
    for start in range(0, len(stream), piece):
        seen += list(reader.feed(stream[start : start + piece]))
    assert seen == [(1, body) for body in bodies]
    assert not reader.partial


@given(st.binary(max_size=200))
def test_random_bytes_never_pass_a_reader_that_expects_tags(data: bytes) -> None:
    reader = FrameReader(64)
    reader.expect_tags(FrameTags(KEY).next, 16)
    seen: list[tuple[int, bytes]] = []
    with suppress(BadFrame):
        seen += reader.feed(data)
    assert seen == []


def test_no_key_accepts_no_proof_only() -> None:
    nothing = LinkSecurity()
    assert nothing.as_dialer(b"said", b"") is NO_SECRETS
    assert nothing.as_dialer(b"said", b"x" * 32) is None
    assert WITH_KEY.as_dialer(b"said", b"") is None
    assert not nothing.authenticates
    assert WITH_KEY.authenticates


# ---------------------------------------------------------------------- key files


def key_file(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "cluster.key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_new_key_file_is_read_and_keys_do_not_show(tmp_path: Path) -> None:
    text = new_key()
    keys = load_cluster_keys(key_file(tmp_path, text))
    (key,) = keys.all
    assert len(key) == 32
    assert new_key() != text
    security = load_link_security(
        name="a", cluster_id="test", cluster_key_file=tmp_path / "cluster.key"
    )
    for shown in (repr(keys), repr(security), repr(derive_secrets(key, b""))):
        assert key.hex() not in shown
        assert repr(key) not in shown
    assert key_id(key) in repr(keys)


def test_two_keys_of_either_encoding_are_read_in_order(tmp_path: Path) -> None:
    text = f"# next\n{OTHER_KEY.hex()}\n\n{base64.b64encode(KEY).decode()}\n"
    assert load_cluster_keys(key_file(tmp_path, text)).all == (OTHER_KEY, KEY)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("hunter2\n", "neither hexadecimal nor base64"),
        ("abcd\n", "must have 32 to 256"),
        (f"{KEY.hex()[:-2]}\n", "a key of 31 bytes"),
        (f"{'00' * 32}\n", "is not random"),
        (f"{'ab' * 32}\n", "is not random"),
        (f"{KEY.hex()}\n{KEY.hex()}\n", "the same key twice"),
        (f"{KEY.hex()}\n{OTHER_KEY.hex()}\n{bytes(range(50, 82)).hex()}\n", "holds 3 keys"),
        ("x" * 70_000, "larger than"),
    ],
)
def test_bad_key_files_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_cluster_keys(key_file(tmp_path, text))
    assert caught.value.field == "cluster_key_file"
    assert KEY.hex() not in caught.value.detail


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o644, 0o666])
def test_a_key_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="Run: chmod 600"):
        load_cluster_keys(key_file(tmp_path, new_key(), mode))


def test_the_group_may_read_a_key_file(tmp_path: Path) -> None:
    assert load_cluster_keys(key_file(tmp_path, new_key(), 0o640))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path, complaint in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Is a directory|not a plain file"),
        (fifo, "not a plain file"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_cluster_keys(path)
