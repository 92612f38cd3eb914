"""The two ends of one TCP connection between nodes, as asyncio protocols.

A connection carries frames one way only: from the node that dialed to the node that accepted. The
other way carries the handshake's answer and, above all, EOF: a killed peer is noticed at once.
`peers.py` owns policy (whom to dial, which connection counts); here is only the conversation.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from typing import Protocol, cast

from distroml.consensus.frames import (
    HEADER_BYTES,
    LINK_CHANNEL,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Authenticator,
    BadFrame,
    Confirm,
    FrameReader,
    Hello,
    Lane,
    LinkLimits,
    Ping,
    Refused,
    Welcome,
    decode_link_message,
    encode_link_message,
    transcript,
    welcome_refusal,
)

logger = logging.getLogger(__name__)

_PING = encode_link_message(Ping())


class Owner(Protocol):
    """What a connection needs of `PeerLinks`."""

    name: str
    incarnation: int
    limits: LinkLimits
    authenticator: Authenticator

    def count(self, counter: str, by: int = 1) -> int: ...
    def admit(self, connection: Inbound, hello: Hello) -> str | None:
        """Why this hello is refused, as a counter's name, or None."""

    def established_inbound(self, connection: Inbound) -> None: ...
    def closed_inbound(self, connection: Inbound) -> None: ...
    def frame(self, connection: Inbound, channel: int, body: bytes) -> None: ...


class _Connection(asyncio.Protocol):
    """What both ends share: framing, orderly refusal, a deadline for the handshake."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.transport: asyncio.Transport | None = None
        self.established = False
        self.closed = asyncio.get_running_loop().create_future()
        self.last_heard = asyncio.get_running_loop().time()
        self._reader = FrameReader(MAX_HANDSHAKE_BYTES)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        tune_socket(self.transport.get_extra_info("socket"), self.owner.limits)
        loop = asyncio.get_running_loop()
        limit_s = self.owner.limits.handshake_timeout_s
        self._deadline = loop.call_later(limit_s, self._handshake_late)

    def _handshake_late(self) -> None:
        if not self.established:
            self.refuse("handshake_timeout", "no handshake in time")

    def data_received(self, data: bytes) -> None:
        self.last_heard = asyncio.get_running_loop().time()
        try:
            for channel, body in self._reader.feed(data):
                if self.closing:
                    return
                self.on_frame(channel, body)
        except BadFrame as error:
            self.refuse(error.reason, str(error))

    def on_frame(self, channel: int, body: bytes) -> None:
        raise NotImplementedError

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    @property
    def closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def write(self, frame: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(frame)

    def refuse(self, reason: str, detail: str) -> None:
        """Counts, says why, and closes."""
        if self.closing:
            return
        self._log(f"refused_{reason}", f"closes a connection: {detail}")
        self.write(encode_link_message(Refused(reason)))
        assert self.transport is not None
        self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _log(self, counter: str, what: str) -> None:
        """Counts; warns at the 1st, 2nd, 4th, 8th … time: a stranger must not fill the log."""
        total = self.owner.count(counter)
        level = logging.WARNING if total & (total - 1) == 0 else logging.DEBUG
        logger.log(level, "%s %s (%s, %d so far)", self.owner.name, what, counter, total)

    def _establish(self, limit_bytes: int) -> None:
        self.established = True
        self._reader.limit_bytes = limit_bytes
        if self._deadline is not None:
            self._deadline.cancel()


class Outbound(_Connection):
    """The dialing end: says hello, then only sends."""

    def __init__(self, owner: Owner, hello: Hello) -> None:
        super().__init__(owner)
        self.hello = hello
        self.peer_incarnation = 0
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.write(encode_link_message(self.hello))

    def on_frame(self, channel: int, body: bytes) -> None:
        if channel != LINK_CHANNEL:
            raise BadFrame("garbage", "an acceptor sends no channel frames")
        match decode_link_message(body):
            case Welcome() as welcome if not self.established:
                self._on_welcome(welcome)
            case Refused(reason=reason):
                self._log(f"refused_by_{self.hello.target}", f"was refused: {reason[:64]}")
                self.abort()
            case _:
                raise BadFrame("garbage", "an acceptor sent an unexpected message")

    def _on_welcome(self, welcome: Welcome) -> None:
        reason = welcome_refusal(welcome, expected=self.hello.target)
        spoken = transcript(self.hello, welcome)
        authenticator = self.owner.authenticator
        if reason is None and not authenticator.verify("acceptor", spoken, welcome.proof):
            reason = "authentication"
        if reason is not None:
            self.refuse(reason, f"{self.hello.target} did not answer as itself")
            return
        self.peer_incarnation = welcome.incarnation
        self.write(encode_link_message(Confirm(authenticator.prove("dialer", spoken))))
        self._establish(MAX_HANDSHAKE_BYTES)
        if not self.ready.done():
            self.ready.set_result(True)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if not self.ready.done():
            self.ready.set_result(False)

    def send(self, frame: bytes, queue_bytes: int) -> bool:
        """Queues a frame unless more than `queue_bytes` would then be unsent."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        waiting = transport.get_write_buffer_size()
        if waiting and waiting + len(frame) > queue_bytes:
            return False
        transport.write(frame)
        return True

    def ping(self) -> None:
        if self.transport is not None and self.transport.get_write_buffer_size() == 0:
            self.write(_PING)


class Inbound(_Connection):
    """The accepting end: lets the dialer prove itself, then only receives."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.hello: Hello | None = None
        self._spoken = b""

    @property
    def peer(self) -> str:
        return "" if self.hello is None else self.hello.name

    @property
    def lane(self) -> Lane:
        return Lane.CONTROL if self.hello is None else self.hello.lane

    def on_frame(self, channel: int, body: bytes) -> None:
        if channel != LINK_CHANNEL:
            if not self.established:
                raise BadFrame("garbage", "a frame came before the handshake")
            self.owner.count("bytes_in", len(body) + HEADER_BYTES)
            self.owner.frame(self, channel, body)
            return
        match decode_link_message(body):
            case Hello() as hello if self.hello is None:
                self._on_hello(hello)
            case Confirm(proof=proof) if self.hello is not None and not self.established:
                self._on_confirm(proof)
            case Ping() if self.established:
                pass
            case Refused(reason=reason):
                self._log("refused_by_dialer", f"was refused: {reason[:64]}")
                self.abort()
            case _:
                raise BadFrame("garbage", "a dialer sent an unexpected message")

    def _on_hello(self, hello: Hello) -> None:
        reason = self.owner.admit(self, hello)
        if reason is not None:
            self.refuse(reason, f"hello of {hello.name!r}, cluster {hello.cluster_id!r}")
            return
        self.hello = hello
        owner, nonce = self.owner, secrets.token_bytes(NONCE_BYTES)
        welcome = Welcome(PROTOCOL_VERSION, owner.name, owner.incarnation, nonce, b"")
        self._spoken = transcript(hello, welcome)
        proof = owner.authenticator.prove("acceptor", self._spoken)
        self.write(
            encode_link_message(
                Welcome(PROTOCOL_VERSION, owner.name, owner.incarnation, nonce, proof)
            )
        )

    def _on_confirm(self, proof: bytes) -> None:
        if not self.owner.authenticator.verify("dialer", self._spoken, proof):
            self.refuse("authentication", f"{self.peer!r} did not prove that it knows the secret")
            return
        self._establish(self.owner.limits.frame_bytes)
        self.owner.established_inbound(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.owner.closed_inbound(self)


def tune_socket(sock: socket.socket | None, limits: LinkLimits) -> None:
    """No Nagle delay; and a dead host is noticed within the idle timeout where the OS can."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = int(limits.idle_timeout_s * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
