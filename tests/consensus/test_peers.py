"""Links between nodes over real loopback sockets: who gets in, what arrives, what is refused."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus.frames import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    BadFrame,
    Confirm,
    FrameReader,
    Hello,
    Lane,
    Welcome,
    decode_link_message,
    encode_frame,
    encode_link_message,
    voters_digest,
)
from distroml.consensus.learner_table import FORGET_S
from distroml.consensus.peers import Address, Channel, LinkLimits, PeerLinks
from tests.consensus.live import free_addresses, until

# ---------------------------------------------------------------------- pure


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7101", "127.0.0.1", 7101),
        ("[::1]:7101", "::1", 7101),
        ("node-b.example:0", "node-b.example", 0),
        (" localhost:65535 ", "localhost", 65535),
    ],
)
def test_addresses_are_read_and_written(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":7101",
        "host:",
        "host:x",
        "host:70000",
        "::1:7101",
        "[::1:7101",
        "a b:1",
        "h:-1",
    ],
)
def test_bad_addresses_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not host:port, such as"):
        Address.parse(text)


@given(st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=50)), max_size=8), st.data())
def test_frames_survive_any_cutting_of_the_stream(
    frames: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(encode_frame(channel, body) for channel, body in frames)
    reader, seen = FrameReader(50), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        seen += list(reader.feed(stream[:size]))
        stream = stream[size:]
    assert seen == frames


@given(st.binary(max_size=100))
def test_rubbish_is_refused_without_any_other_error(body: bytes) -> None:
    with suppress(BadFrame):
        list(FrameReader(20).feed(body))
    with suppress(BadFrame):
        decode_link_message(body)


def test_an_oversize_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadFrame, match="announces"):
        list(FrameReader(100).feed(struct.pack(">IB", 101, 1)))


# ---------------------------------------------------------------------- live

Starter = Callable[..., Awaitable[PeerLinks]]


class Net:
    """Links of several nodes, with what each of them received."""

    def __init__(self, *names: str) -> None:
        self.addresses = free_addresses(*names)
        self.links: list[PeerLinks] = []
        self.received: dict[str, list[tuple[str, Channel, bytes]]] = {}
        self.events: dict[str, list[tuple[str, bool]]] = {}

    async def start(self, name: str, incarnation: int = 1, **options: object) -> PeerLinks:
        links = PeerLinks(
            name=name,
            incarnation=incarnation,
            cluster_id=str(options.pop("cluster_id", "test")),
            listen=self.addresses[name],
            peers=options.pop("peers", self.addresses),  # type: ignore[arg-type]
            limits=options.pop("limits", LinkLimits()),  # type: ignore[arg-type]
        )
        received = self.received[name] = []
        events = self.events[name] = []
        for channel in Channel:
            links.subscribe(channel, lambda peer, body, c=channel: received.append((peer, c, body)))
        links.on_link(lambda peer, up: events.append((peer, up)))
        await links.start()
        self.links.append(links)
        return links

    async def pair(self, limits: LinkLimits | None = None) -> tuple[PeerLinks, PeerLinks]:
        a = await self.start("a", limits=limits or LinkLimits())
        b = await self.start("b", limits=limits or LinkLimits())
        await until(lambda: a.connected("b") and b.connected("a"), "both nodes are connected")
        return a, b


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net("a", "b")
    yield net
    for links in net.links:
        await links.close()


async def test_frames_arrive_in_order_on_their_channels(net: Net) -> None:
    a, _ = await net.pair()
    await until(lambda: a.send("b", Channel.REPORT, b"warm"), "the bulk lane is up")
    for number in range(50):
        assert a.send("b", Channel.RAFT, b"%d" % number)
    await until(lambda: len(net.received["b"]) == 51, "all frames arrived")
    control = [frame for frame in net.received["b"] if frame[1] is Channel.RAFT]
    assert control == [("a", Channel.RAFT, b"%d" % number) for number in range(50)]


async def test_a_frame_of_the_largest_size_arrives_and_a_larger_one_is_a_defect(net: Net) -> None:
    a, _ = await net.pair()
    body = bytes(a.limits.frame_bytes)
    assert a.send("b", Channel.RAFT, body)
    await until(lambda: bool(net.received["b"]), "the frame arrived")
    assert net.received["b"][0][2] == body
    with pytest.raises(ValueError, match="limit"):
        a.send("b", Channel.RAFT, body + b"x")


async def test_sending_to_a_peer_that_is_down_says_no(net: Net) -> None:
    a = await net.start("a")
    assert not a.send("b", Channel.RAFT, b"x")
    assert not a.send("nobody", Channel.REPORT, b"x")
    assert a.counters["dropped_control"] == 1
    assert a.counters["dropped_bulk"] == 1


async def test_a_dead_peer_is_noticed_and_its_next_life_is_connected_again(net: Net) -> None:
    a, b = await net.pair()
    await b.close()
    await until(lambda: not a.connected("b"), "a noticed that b died")
    again = await net.start("b", incarnation=2)
    await until(lambda: a.connected("b") and again.connected("a"), "the new b is connected")
    assert net.events["a"] == [("b", True), ("b", False), ("b", True)]
    assert a.send("b", Channel.RAFT, b"hello")
    await until(lambda: bool(net.received["b"]), "the new b received a frame")


async def test_a_newer_connection_replaces_the_older_and_says_so(net: Net) -> None:
    await net.pair()
    old = net.received["a"].copy()
    reader, writer = await speak(net, greeting("b", epoch=10**6))
    await until(lambda: net.events["a"].count(("b", False)) >= 1, "a said that b's link broke")
    writer.write(encode_frame(Channel.RAFT, b"from the newer one"))
    await until(lambda: len(net.received["a"]) > len(old), "the newer connection's frame arrived")
    assert net.received["a"][-1] == ("b", Channel.RAFT, b"from the newer one")
    writer.close()
    del reader


def greeting(peer: str, /, **changes: object) -> Hello:
    hello = Hello(
        version=PROTOCOL_VERSION,
        cluster_id="test",
        name=peer,
        target="a",
        incarnation=1,
        epoch=1,
        lane=Lane.CONTROL,
        nonce=bytes(NONCE_BYTES),
        voters=voters_digest("ab"),
    )
    return msgspec.structs.replace(hello, **changes)


async def speak(net: Net, hello: Hello) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Dials node a by hand and completes the handshake."""
    reader, writer = await half_spoken(net, hello)
    writer.write(encode_link_message(Confirm(b"")))
    return reader, writer


async def half_spoken(net: Net, hello: Hello) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Dials node a by hand and hears its welcome; nothing is proved yet."""
    reader, writer = await connect(net)
    writer.write(encode_link_message(hello))
    header = await reader.readexactly(5)
    body = await reader.readexactly(struct.unpack(">IB", header)[0])
    assert isinstance(decode_link_message(body), Welcome)
    return reader, writer


async def connect(net: Net) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = net.addresses["a"]
    return await asyncio.open_connection(address.host, address.port)


@pytest.mark.parametrize(
    ("changes", "counter"),
    [
        ({"cluster_id": "other"}, "refused_cluster"),
        ({"version": 99}, "refused_version"),
        ({"name": "mallory"}, "refused_unknown_peer"),
        ({"name": "a"}, "refused_unknown_peer"),
        ({"target": "c"}, "refused_wrong_target"),
        ({"voters": voters_digest("abc")}, "refused_other_voters"),
        ({"voters": b""}, "refused_other_voters"),
    ],
)
async def test_strangers_are_refused_and_counted(
    net: Net, changes: dict[str, object], counter: str
) -> None:
    a = await net.start("a")
    reader, writer = await connect(net)
    writer.write(encode_link_message(greeting("b", **changes)))
    async with asyncio.timeout(5):
        await reader.read()  # until the acceptor closes
    assert a.counters[counter] == 1
    assert not a.connected("b")
    writer.close()


async def test_nodes_that_were_given_other_voters_do_not_connect(net: Net) -> None:
    a = await net.start("a", peers=net.addresses | {"c": Address("127.0.0.1", 1)})
    b = await net.start("b")
    await until(
        lambda: all(links.counters.get("refused_other_voters", 0) > 1 for links in (a, b)),
        "both refused the other more than once",
    )
    assert not a.connected("b")
    assert not b.connected("a")


@pytest.mark.parametrize(
    ("sent", "counter"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "refused_oversize"),
        (encode_frame(0, b"\xc1rubbish"), "refused_garbage"),
        (encode_frame(Channel.RAFT, b"too early"), "refused_garbage"),
        (encode_link_message(Confirm(b"")), "refused_garbage"),
    ],
)
async def test_garbage_closes_the_connection_and_is_counted(
    net: Net, sent: bytes, counter: str
) -> None:
    a = await net.start("a")
    reader, writer = await connect(net)
    writer.write(sent)
    async with asyncio.timeout(5):
        await reader.read()
    assert a.counters[counter] == 1
    writer.close()


async def test_garbage_after_the_handshake_closes_the_connection(net: Net) -> None:
    a = await net.start("a")
    reader, writer = await speak(net, greeting("b"))
    writer.write(struct.pack(">IB", a.limits.frame_bytes + 1, 1))
    async with asyncio.timeout(5):
        await reader.read()
    assert a.counters["refused_oversize"] == 1
    writer.close()


async def test_a_frame_on_the_wrong_lane_closes_the_connection(net: Net) -> None:
    a = await net.start("a")
    reader, writer = await speak(net, greeting("b"))
    writer.write(encode_frame(Channel.STORE, b"bulk on the control lane"))
    async with asyncio.timeout(5):
        await reader.read()
    assert a.counters["refused_garbage"] == 1
    assert net.received["a"] == []
    writer.close()


@pytest.mark.parametrize(
    ("changes", "counter"),
    [
        ({"epoch": 4}, "refused_stale_epoch"),
        ({"epoch": 9, "incarnation": 1}, "refused_stale_incarnation"),
    ],
)
async def test_an_older_connection_cannot_replace_a_newer_one(
    net: Net, changes: dict[str, object], counter: str
) -> None:
    a = await net.start("a")
    _, newer = await speak(net, greeting("b", epoch=5, incarnation=2))
    reader, writer = await connect(net)
    writer.write(encode_link_message(greeting("b", **({"incarnation": 2} | changes))))
    async with asyncio.timeout(5):
        await reader.read()
    assert a.counters[counter] == 1
    newer.write(encode_frame(Channel.RAFT, b"still here"))
    await until(lambda: bool(net.received["a"]), "the newer connection still counts")
    writer.close()
    newer.close()


@pytest.mark.parametrize(
    ("older", "newer", "counter"),
    [
        ({"epoch": 1}, {"epoch": 2}, "refused_stale_epoch"),
        ({"epoch": 9}, {"incarnation": 2}, "refused_stale_incarnation"),
    ],
)
async def test_an_older_connection_that_proves_itself_late_replaces_no_newer_one(
    net: Net, older: dict[str, object], newer: dict[str, object], counter: str
) -> None:
    a = await net.start("a")
    reader, late = await half_spoken(net, greeting("b", **older))
    _, current = await speak(net, greeting("b", **newer))
    current.write(encode_frame(Channel.RAFT, b"newer"))
    await until(lambda: len(net.received["a"]) == 1, "the newer connection counts")
    late.write(encode_link_message(Confirm(b"")) + encode_frame(Channel.RAFT, b"older"))
    async with asyncio.timeout(5):
        await reader.read()
    assert a.counters[counter] == 1
    current.write(encode_frame(Channel.RAFT, b"still here"))
    await until(lambda: len(net.received["a"]) == 2, "the newer connection still counts")
    assert [body for _, _, body in net.received["a"]] == [b"newer", b"still here"]
    late.close()
    current.close()


async def test_learners_that_prove_nothing_leave_nothing_behind(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    a = await net.start("a")
    caplog.set_level(logging.WARNING)
    for number in range(32):
        hello = greeting(f"l{number}", learner_at="127.0.0.1:7")
        reader, writer = await half_spoken(net, hello)
        writer.write(encode_link_message(Confirm(b"not a proof")))
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
    assert a.counters["refused_wrong_key"] == 32
    assert not a.learners
    assert len(caplog.messages) == 6, "one stranger after the other: the 1st, 2nd, 4th … 32nd"


async def test_a_learner_that_was_forgotten_while_it_was_cut_off_comes_back(net: Net) -> None:
    a = await net.start("a")
    (at,) = free_addresses("x").values()
    hello = greeting("x", learner_at=str(at))
    reader, writer = await speak(net, hello)
    await until(lambda: "x" in a.peers, "a learner is a peer")
    # It reaches us and we do not reach it: nobody listens there.
    a._forget_learners(asyncio.get_running_loop().time() + FORGET_S + 1)
    assert "x" not in a.peers
    async with asyncio.timeout(5):
        with suppress(ConnectionError):
            assert await reader.read() == b"", "it is told, so that it dials anew"
    _, again = await speak(net, msgspec.structs.replace(hello, epoch=2))
    await until(lambda: "x" in a.peers, "it is taken in again")
    writer.close()
    again.close()


async def test_a_silent_stranger_is_cut_off(net: Net) -> None:
    a = await net.start("a", limits=LinkLimits(handshake_timeout_s=0.1))
    reader, writer = await connect(net)
    async with asyncio.timeout(5):
        await reader.read()
    assert a.counters["refused_handshake_timeout"] == 1
    writer.close()


async def test_unproven_connections_are_bounded(net: Net) -> None:
    a = await net.start("a", limits=LinkLimits(pending_handshakes=3))
    open_connections = [await connect(net) for _ in range(6)]
    await until(lambda: a.counters.get("refused_too_many", 0) == 3, "the oldest were dropped")
    for _, writer in open_connections:
        writer.close()


async def test_a_silent_established_peer_counts_as_dead(net: Net) -> None:
    a = await net.start("a", limits=LinkLimits(ping_s=0.05, idle_timeout_s=0.2))
    reader, writer = await speak(net, greeting("b"))
    async with asyncio.timeout(5):
        with suppress(ConnectionError):
            await reader.read()
    assert a.counters["idle_closed"] == 1
    writer.close()


async def test_pings_keep_an_idle_link_alive(net: Net) -> None:
    a, b = await net.pair(LinkLimits(ping_s=0.05, idle_timeout_s=0.4))
    await asyncio.sleep(1.0)  # several idle timeouts of real silence are the very input here
    assert a.connected("b")
    assert b.connected("a")
    assert a.counters.get("idle_closed", 0) == b.counters.get("idle_closed", 0) == 0


async def test_a_full_lane_refuses_and_does_not_hold_up_the_other(net: Net) -> None:
    """Node b is a peer that reads its control lane but never its bulk lane."""
    received = asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header = await reader.readexactly(5)
        hello = decode_link_message(await reader.readexactly(struct.unpack(">IB", header)[0]))
        assert isinstance(hello, Hello)
        writer.write(
            encode_link_message(Welcome(PROTOCOL_VERSION, "b", 1, bytes(NONCE_BYTES), b""))
        )
        if hello.lane is Lane.CONTROL:
            await reader.readuntil(b"urgent")
            received.set()
        await asyncio.Event().wait()

    server = await asyncio.start_server(
        behave, "127.0.0.1", net.addresses["b"].port, family=socket.AF_INET
    )
    a = await net.start("a", limits=LinkLimits(bulk_queue_bytes=2_000_000, idle_timeout_s=60))
    await until(lambda: a.send("b", Channel.STORE, b"x"), "the bulk lane is up")
    await until(lambda: a.send("b", Channel.RAFT, b"x"), "the control lane is up")
    sent = 0
    while a.send("b", Channel.STORE, bytes(500_000)):
        sent += 1
        assert sent < 100, "the bulk queue is bounded"
    assert a.counters["dropped_bulk"] >= 1
    assert a.send("b", Channel.RAFT, b"urgent")
    async with asyncio.timeout(5):
        await received.wait()
    server.close()


async def test_a_handler_that_raises_does_not_break_the_link(net: Net) -> None:
    a, b = await net.pair()

    def fail(_peer: str, _body: bytes) -> None:
        raise RuntimeError("a defect of a subscriber")

    b.subscribe(Channel.RAFT, fail)
    a.send("b", Channel.RAFT, b"1")
    a.send("b", Channel.PROPOSE, b"2")
    await until(lambda: len(net.received["b"]) == 1, "the next frame arrived all the same")
    assert b.counters["handler_errors"] == 1
    assert b.connected("a")
