"""Links with a cluster key and with certificates, over real sockets: who gets in and what is logged."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.certificates import make_authority, make_node
from distroml.consensus.authentication import LinkSecurity, load_link_security
from distroml.consensus.frames import encode_frame, encode_link_message
from distroml.consensus.link_tls import MAX_TLS_HANDSHAKE_BYTES, load_link_tls
from distroml.consensus.peers import Channel, LinkLimits, PeerLinks
from distroml.credentials import ClusterKeys
from distroml.errors import ConfigError
from tests.consensus.live import free_addresses, until
from tests.consensus.memory_links import FRAMES, KEY, OTHER_KEY, WITH_KEY, Wire, flipped


class Pair:
    """Nodes a and b, each with the security of its own."""

    def __init__(self) -> None:
        self.addresses = free_addresses("a", "b")
        self.links: list[PeerLinks] = []
        self.received: list[tuple[str, bytes]] = []

    async def start(
        self, name: str, security: LinkSecurity, limits: LinkLimits | None = None
    ) -> PeerLinks:
        links = PeerLinks(
            name=name,
            incarnation=1,
            cluster_id="test",
            listen=self.addresses[name],
            peers=self.addresses,
            security=security,
            limits=limits,
        )
        for channel in Channel:
            links.subscribe(channel, lambda peer, body: self.received.append((peer, body)))
        await links.start()
        self.links.append(links)
        return links

    async def both(self, a: LinkSecurity, b: LinkSecurity) -> tuple[PeerLinks, PeerLinks]:
        return await self.start("a", a), await self.start("b", b)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    for links in pair.links:
        await links.close()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a, b and c by one CA in `ours`, and of b by another in `theirs`."""
    directory = tmp_path_factory.mktemp("pki")
    for name, nodes in (("ours", "abc"), ("theirs", "b")):
        make_authority(directory / name, cluster="test", days=2, force=False)
        for node in nodes:
            make_node(directory / name, node, hosts=(), days=1, force=False)
    return directory


def certified(pki: Path, name: str, ca: str = "ours", keys: tuple[bytes, ...] = ()) -> LinkSecurity:
    directory = pki / ca
    tls = load_link_tls(
        name=name,
        cluster_id="test",
        certificate=directory / f"{name}.crt",
        private_key=directory / f"{name}.key",
        authority=directory / "ca.crt",
    )
    return LinkSecurity(keys=ClusterKeys(*keys), tls=tls)


async def check_talk(pair: Pair, a: PeerLinks, b: PeerLinks) -> None:
    await until(lambda: a.connected("b") and b.connected("a"), "both nodes are connected")
    await until(lambda: a.send("b", Channel.STORE, b"bulk"), "the bulk lane is up")
    body = bytes(a.limits.frame_bytes)
    assert a.send("b", Channel.RAFT, body)
    assert b.send("a", Channel.RAFT, b"back")
    await until(lambda: len(pair.received) == 3, "all frames arrived")
    assert set(pair.received) == {("a", b"bulk"), ("a", body), ("b", b"back")}
    for links in (a, b):
        assert not [counter for counter in links.counters if counter.startswith("refused")]


async def check_apart(a: PeerLinks, b: PeerLinks, at_a: str, at_b: str) -> None:
    """Each refuses the other for its reason, more than once, and neither is ever connected."""
    await until(lambda: a.counters.get(at_a, 0) > 1, f"a counted {at_a}")
    await until(lambda: b.counters.get(at_b, 0) > 1, f"b counted {at_b}")
    assert not a.connected("b")
    assert not b.connected("a")
    assert a.counters.get("links_up", 0) == b.counters.get("links_up", 0) == 0
    assert a.counters["frames_in"] == b.counters["frames_in"] == 0


# ---------------------------------------------------------------------- cluster key


async def test_nodes_with_the_same_key_talk(pair: Pair) -> None:
    await check_talk(pair, *await pair.both(WITH_KEY, WITH_KEY))


async def test_pings_are_tagged_too(pair: Pair) -> None:
    limits = LinkLimits(ping_s=0.02, idle_timeout_s=0.4)
    a = await pair.start("a", WITH_KEY, limits)
    b = await pair.start("b", WITH_KEY, limits)
    await until(lambda: a.connected("b") and b.connected("a"), "both nodes are connected")
    await asyncio.sleep(0.6)  # pings through more than one idle timeout are the input here
    assert a.send("b", Channel.RAFT, b"after the pings")
    await until(lambda: bool(pair.received), "the frame arrived")
    assert a.counters["links_up"] == b.counters["links_up"] == 1


@pytest.mark.parametrize("theirs", [(OTHER_KEY,), ()], ids=["another", "none"])
async def test_a_wrong_key_is_told_on_both_sides(
    pair: Pair, theirs: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    a, b = await pair.both(WITH_KEY, LinkSecurity(keys=ClusterKeys(*theirs)))
    await check_apart(a, b, "refused_wrong_key", "refused_wrong_key")
    if theirs:
        assert "a closes a connection: peer b does not have this cluster's key" in caplog.text
        assert "b closes a connection: peer a does not have this cluster's key" in caplog.text
    else:
        assert "a closes a connection: peer b has no cluster key" in caplog.text
        assert "b closes a connection: peer a has a cluster key, this node has none" in caplog.text
    refusals = a.counters["refused_wrong_key"] + b.counters["refused_wrong_key"]
    assert KEY.hex() not in caplog.text
    assert refusals >= 4


async def test_refusals_that_go_on_do_not_fill_the_log(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    a = await pair.start("a", WITH_KEY)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    for _ in range(40):
        reader, writer = await asyncio.open_connection("127.0.0.1", a.listen.port)
        writer.write(encode_frame(0, b"\xc1rubbish"))
        await reader.read()
        writer.close()
    assert a.counters["refused_garbage"] == 40
    assert len(caplog.messages) == 6  # the 1st, 2nd, 4th … 32nd


async def test_the_text_of_a_strangers_refusal_cannot_forge_log_lines(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    from distroml.consensus.frames import Refused

    a = await pair.start("a", WITH_KEY)
    caplog.set_level(logging.WARNING)
    reader, writer = await asyncio.open_connection("127.0.0.1", a.listen.port)
    writer.write(encode_link_message(Refused("x\n\x1b[2JERROR all is lost")))
    with suppress(ConnectionError):
        await reader.read()
    writer.close()
    assert a.counters["refused_by_dialer"] == 1
    assert "\\n\\x1b[2J" in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


async def test_a_connection_that_ends_within_a_frame_is_counted(pair: Pair) -> None:
    a = await pair.start("a", WITH_KEY)
    _, writer = await asyncio.open_connection("127.0.0.1", a.listen.port)
    writer.write(b"\x00\x00\x00\x20\x00half a hello")
    writer.write_eof()
    await until(lambda: a.counters.get("refused_truncated", 0) == 1, "the torn frame was counted")
    writer.close()


async def test_trickling_bytes_are_no_sign_of_life(pair: Pair) -> None:
    limits = LinkLimits(ping_s=0.02, idle_timeout_s=5, frame_timeout_s=0.2)
    a = await pair.start("a", LinkSecurity(), limits)
    b = await pair.start("b", LinkSecurity(), limits)
    await until(lambda: a.connected("b") and b.connected("a"), "both nodes are connected")
    # As if the length of a frame had been changed on the way: what follows never completes it.
    outbound = next(iter(b._outbound.values()))
    assert outbound.transport is not None
    outbound.transport.write(b"\x00\x30\x00\x00\x01")
    await until(lambda: a.counters.get("stalled_closed", 0) == 1, "a gave up on the frame")
    await until(lambda: a.connected("b"), "the link was made anew")


# ---------------------------------------------------------------------- certificates


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["certificates", "certificates and key"])
async def test_nodes_with_certificates_talk(pair: Pair, pki: Path, keys: tuple[bytes, ...]) -> None:
    await check_talk(
        pair, *await pair.both(certified(pki, "a", keys=keys), certified(pki, "b", keys=keys))
    )


async def test_a_certificate_of_another_ca_is_refused(pair: Pair, pki: Path) -> None:
    a, b = await pair.both(certified(pki, "a"), certified(pki, "b", "theirs"))
    await check_apart(a, b, "refused_certificate", "refused_certificate")


async def test_a_certificate_of_another_node_is_refused(
    pair: Pair, pki: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who stole the certificate of c is not let in as b, neither dialing nor answering."""
    a, b = await pair.both(certified(pki, "a"), certified(pki, "c"))
    await check_apart(a, b, "refused_wrong_certificate", "refused_by_a")
    await until(lambda: b.counters.get("refused_by_dialer", 0) > 0, "a also refused what it dialed")
    shown = "shows the certificate of distroml://test/node/c"
    await until(lambda: f"peer b {shown}" in caplog.text, "a said what it dialed")
    assert "distroml://test/node/c at 127.0.0.1" in caplog.text
    assert "says that it is 'b' of cluster 'test'" in caplog.text
    assert "this node's certificate names another node" in caplog.text


async def test_the_right_certificate_does_not_replace_the_key(pair: Pair, pki: Path) -> None:
    a, b = await pair.both(certified(pki, "a", keys=(KEY,)), certified(pki, "b", keys=(OTHER_KEY,)))
    await check_apart(a, b, "refused_wrong_key", "refused_wrong_key")


async def test_a_name_holds_in_its_own_cluster_only(pair: Pair, pki: Path) -> None:
    other = certified(pki, "b")
    assert other.tls is not None
    a = await pair.start("a", certified(pki, "a"))
    assert a.security.tls is not None
    a.security.tls.cluster_id = "prod"
    b = await pair.start("b", other)
    await check_apart(a, b, "refused_wrong_certificate", "refused_by_a")


async def test_plaintext_and_tls_do_not_mix(pair: Pair, pki: Path) -> None:
    a, b = await pair.both(certified(pki, "a"), WITH_KEY)
    await check_apart(a, b, "refused_tls", "refused_oversize")


async def test_a_client_without_a_certificate_is_refused(pair: Pair, pki: Path) -> None:
    a = await pair.start("a", certified(pki, "a"))
    context = ssl.create_default_context(cafile=pki / "ours" / "ca.crt")
    with suppress(OSError):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", a.listen.port, ssl=context, server_hostname="localhost"
        )
        await reader.read()
        writer.close()
    assert a.counters["refused_certificate"] == 1


async def test_tls_handshakes_are_bounded_in_time_and_size(pair: Pair, pki: Path) -> None:
    a = await pair.start("a", certified(pki, "a"), LinkLimits(handshake_timeout_s=0.2))
    silent, silent_writer = await asyncio.open_connection("127.0.0.1", a.listen.port)
    loud, loud_writer = await asyncio.open_connection("127.0.0.1", a.listen.port)
    # Handshake records of a ClientHello of 100,000 bytes, which OpenSSL alone would wait for.
    record = b"\x16\x03\x01\x40\x00" + b"\x01\x01\x86\xa0" + bytes(0x4000 - 4)
    with suppress(ConnectionError):
        for _ in range(MAX_TLS_HANDSHAKE_BYTES // len(record) + 2):
            loud_writer.write(record)
            await loud_writer.drain()
    for reader in (silent, loud):
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                await reader.read()
    assert a.counters["refused_handshake_timeout"] == 1
    assert a.counters["refused_oversize"] == 1
    assert not a._pending
    for writer in (silent_writer, loud_writer):
        writer.close()


SECURED: dict[str, LinkSecurity] = {}


@given(st.data())
def test_no_flipped_bit_gets_through_tls(pki: Path, data: st.DataObject) -> None:
    for name in "ab":
        SECURED.setdefault(name, certified(pki, name))
    number = data.draw(st.integers(0, 8), label="write")
    place = data.draw(st.integers(0, 10**6), label="place")

    def change(sent: int, written: bytes) -> list[bytes]:
        return [flipped(written, place % (len(written) * 8)) if sent == number else written]

    wire = Wire(SECURED["a"], SECURED["b"])
    wire.run(change)
    assert wire.b.delivered == list(FRAMES[: len(wire.b.delivered)])


def test_tls_in_memory_delivers_when_nobody_interferes(pki: Path) -> None:
    wire = Wire(certified(pki, "a"), certified(pki, "b"))
    wire.run()
    assert wire.b.delivered == list(FRAMES)
    assert all(frame not in data for frame in FRAMES for _, data in wire.sent)


# ---------------------------------------------------------------------- files


def test_certificates_are_tried_out_at_the_start(pki: Path, tmp_path: Path) -> None:
    ours = pki / "ours"
    good = {"tls_cert": ours / "a.crt", "tls_key": ours / "a.key", "tls_ca": ours / "ca.crt"}
    garbage, open_key = tmp_path / "garbage", tmp_path / "open.key"
    garbage.write_text("no PEM")
    garbage.chmod(0o600)
    open_key.write_bytes((ours / "a.key").read_bytes())
    open_key.chmod(0o644)
    assert load_link_security(name="a", cluster_id="test", **good).tls is not None
    for change, field, complaint in (
        ({"tls_cert": None}, "tls_cert", "belong together; tls_cert is not set"),
        ({"tls_ca": None, "tls_key": None}, "tls_key", "tls_key and tls_ca is not set"),
        ({"tls_cert": tmp_path / "absent"}, "tls_cert", "No such file"),
        ({"tls_cert": garbage}, "tls_cert", "cannot be used"),
        ({"tls_key": garbage}, "tls_cert", "cannot be used"),
        ({"tls_key": ours / "b.key"}, "tls_cert", "key values mismatch"),
        ({"tls_key": open_key}, "tls_key", "chmod 600"),
        ({"tls_ca": garbage}, "tls_ca", "cannot be used"),
        ({"tls_ca": pki / "theirs" / "ca.crt"}, "tls_cert", "does not work with CA"),
        (
            {"tls_cert": ours / "b.crt", "tls_key": ours / "b.key"},
            "tls_cert",
            "is for distroml://test/node/b; this node is distroml://test/node/a",
        ),
    ):
        with pytest.raises(ConfigError, match=complaint) as caught:
            load_link_security(name="a", cluster_id="test", **{**good, **change})
        assert caught.value.field == field
