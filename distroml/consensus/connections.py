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
from typing import Final, Protocol, cast

import msgspec

from distroml.consensus.authentication import (
    NO_SECRETS,
    TAG_BYTES,
    FrameTags,
    LinkSecrets,
    LinkSecurity,
    same,
)
from distroml.consensus.frames import (
    HEADER_BYTES,
    LINK_CHANNEL,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    BadFrame,
    Confirm,
    FrameReader,
    Hello,
    Lane,
    LinkLimits,
    LinkMessage,
    Ping,
    Refused,
    TagOf,
    Welcome,
    decode_link_message,
    encode_frame,
    encode_tagged_frame,
    transcript,
    welcome_refusal,
)
from distroml.consensus.link_tls import TlsEndpoint

logger = logging.getLogger(__name__)

_TOLD: Final = {
    "wrong_key": "it says that this node does not have its cluster's key",
    "wrong_certificate": "it says that this node's certificate names another node",
    "cluster": "it is of another cluster",
    "unknown_peer": "it does not have this node among its peers",
    "other_voters": "it was given other voters in --peers than this node",
    "name_taken": "another node of this node's name is there already",
    "too_many_learners": "it has as many learners as it takes",
    "learner_address": "it cannot use the address that this learner gave",
    "wrong_target": "it has another name than this node believes",
    "version": "it speaks another version of the protocol",
    "tampered": "a frame did not arrive as this node sent it",
}
"""What a peer's refusal means here; a reason of a stranger is only shown quoted."""


class Owner(Protocol):
    """What a connection needs of `PeerLinks`."""

    name: str
    incarnation: int
    limits: LinkLimits
    security: LinkSecurity

    def count(self, counter: str, by: int = 1) -> int: ...
    def count_loudly(self, counter: str, peer: str) -> tuple[int, bool]:
        """Counts; the total, and whether to warn of this peer ("": a stranger)."""

    def admit(self, connection: Inbound, hello: Hello) -> str | None:
        """Why this hello is refused, as a counter's name, or None."""

    def established_inbound(self, connection: Inbound) -> None: ...
    def closed_inbound(self, connection: Inbound) -> None: ...
    def frame(self, connection: Inbound, channel: int, body: bytes) -> None: ...


class _Connection(asyncio.Protocol):
    """What both ends share: framing, TLS and tags, orderly refusal, a deadline for the handshake."""

    def __init__(self, owner: Owner, tls: TlsEndpoint | None) -> None:
        self.owner = owner
        self.transport: asyncio.Transport | None = None
        self.established = False
        self.closed = asyncio.get_running_loop().create_future()
        self.last_heard = asyncio.get_running_loop().time()
        self.last_frame = self.last_heard
        self._reader = FrameReader(MAX_HANDSHAKE_BYTES)
        self._deadline: asyncio.TimerHandle | None = None
        self._tls = tls
        self._tag_of: TagOf | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        tune_socket(self.transport.get_extra_info("socket"), self.owner.limits)
        loop = asyncio.get_running_loop()
        limit_s = self.owner.limits.handshake_timeout_s
        self._deadline = loop.call_later(limit_s, self._handshake_late)
        if self._tls is None:
            self.on_secured()
        elif not self._tls.server_side:
            self._tls.handshake()
            self.transport.write(self._tls.outgoing())

    def on_secured(self) -> None:
        """The stream is ready for frames: at once, or after the TLS handshake."""

    def _handshake_late(self) -> None:
        if not self.established:
            self.refuse("handshake_timeout", "no handshake in time")

    def data_received(self, data: bytes) -> None:
        self.last_heard = asyncio.get_running_loop().time()
        try:
            if self._tls is not None:
                data = self._decrypted(self._tls, data)
            for channel, body in self._reader.feed(data):
                if self.closing:
                    return
                self.last_frame = self.last_heard
                self.on_frame(channel, body)
        except BadFrame as error:
            self.refuse(error.reason, f"{self.other}: {error}")

    def _decrypted(self, tls: TlsEndpoint, data: bytes) -> bytes:
        was_secured = tls.secured
        try:
            plain = tls.receive(data)
        finally:
            # Also the alert that tells the other side what was wrong.
            if not self.closing and (answer := tls.outgoing()):
                cast(asyncio.Transport, self.transport).write(answer)
        if tls.secured and not was_secured:
            self.on_secured()
        return plain

    def on_frame(self, channel: int, body: bytes) -> None:
        raise NotImplementedError

    def eof_received(self) -> None:
        if self._reader.partial and not self.closing:
            self._log("refused_truncated", f"lost a connection within a frame: {self.other}")

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    @property
    def closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    @property
    def peer(self) -> str:
        """Name of the peer at the other end, or empty for a stranger."""
        raise NotImplementedError

    @property
    def known_as(self) -> str:
        """Name of the peer, or empty where there is no more to it than the other end's own word."""
        return self.peer

    @property
    def other(self) -> str:
        """The other end as people know it."""
        name = self.known_as
        return f"peer {name}" if name else f"{self._certified()} at {self._address()}"

    def _certified(self) -> str:
        return (self._tls.peer_names() if self._tls else "") or "a stranger"

    def _address(self) -> str:
        name = self.transport.get_extra_info("peername") if self.transport else None
        return f"{name[0]}:{name[1]}" if name else "an unknown address"

    def write(self, channel: int, body: bytes) -> None:
        """Sends one frame, with what protects this connection."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._tag_of is None:
            frame = encode_frame(channel, body)
        else:
            frame = encode_tagged_frame(channel, body, self._tag_of)
        transport.write(frame if self._tls is None else self._tls.encrypt(frame))

    def say(self, message: LinkMessage) -> None:
        self.write(LINK_CHANNEL, msgspec.msgpack.encode(message))

    def refuse(self, reason: str, detail: str) -> None:
        """Counts, says why, and closes."""
        if self.closing:
            return
        self._log(f"refused_{reason}", f"closes a connection: {detail}")
        if self._tls is None or self._tls.secured:
            self.say(Refused(reason))
        assert self.transport is not None
        self.transport.close()

    def was_refused(self, reason: str, counter: str) -> None:
        """Counts and says what the other end had against this one, and closes."""
        meaning = _TOLD.get(reason, f"reason {reason[:64]!r}")
        self._log(counter, f"was refused by {self.other}: {meaning}")
        self.abort()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _log(self, counter: str, what: str) -> None:
        """Counts, and warns now and then: a stranger must not fill the log."""
        total, loud = self.owner.count_loudly(counter, self.known_as)
        level = logging.WARNING if loud else logging.DEBUG
        logger.log(level, "%s %s (%s, %d so far)", self.owner.name, what, counter, total)

    def _establish(self, limit_bytes: int, send_key: bytes, receive_key: bytes) -> None:
        self.established = True
        self._reader.limit_bytes = limit_bytes
        if self.owner.security.tags_frames:
            self._tag_of = FrameTags(send_key).next
            self._reader.expect_tags(FrameTags(receive_key).next, TAG_BYTES)
        if self._deadline is not None:
            self._deadline.cancel()


class Outbound(_Connection):
    """The dialing end: says hello, then only sends."""

    def __init__(self, owner: Owner, hello: Hello) -> None:
        tls = owner.security.tls
        super().__init__(owner, tls.dial() if tls else None)
        self.hello = hello
        self.peer_incarnation = 0
        self._idle = True
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def peer(self) -> str:
        return self.hello.target

    def on_secured(self) -> None:
        tls = self.owner.security.tls
        if tls and self._tls and not tls.names(self._tls, self.hello.target):
            detail = f"{self.other} shows the certificate of {self._certified()}"
            self.refuse("wrong_certificate", detail)
            return
        self.say(self.hello)

    def on_frame(self, channel: int, body: bytes) -> None:
        if channel != LINK_CHANNEL:
            raise BadFrame("garbage", "an acceptor sends no channel frames")
        match decode_link_message(body):
            case Welcome() as welcome if not self.established:
                self._on_welcome(welcome)
            case Refused(reason=reason):
                self.was_refused(reason, f"refused_by_{self.hello.target}")
            case _:
                raise BadFrame("garbage", "an acceptor sent an unexpected message")

    def _on_welcome(self, welcome: Welcome) -> None:
        reason = welcome_refusal(welcome, expected=self.hello.target)
        if reason is not None:
            self.refuse(reason, f"{self.other} did not answer as itself")
            return
        spoken = transcript(self.hello, welcome)
        secrets = self.owner.security.as_dialer(spoken, welcome.proof)
        if secrets is None:
            self.refuse("wrong_key", self._about_key(welcome))
            return
        self.peer_incarnation = welcome.incarnation
        self.say(Confirm(secrets.dialer_proof))
        self._establish(MAX_HANDSHAKE_BYTES, secrets.dialer_tag_key, secrets.acceptor_tag_key)
        if not self.ready.done():
            self.ready.set_result(True)

    def _about_key(self, welcome: Welcome) -> str:
        if not self.owner.security.keys:
            return f"{self.other} has a cluster key, this node has none"
        lack = "does not have this cluster's key" if welcome.proof else "has no cluster key"
        return f"{self.other} {lack}"

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if not self.ready.done():
            self.ready.set_result(False)

    def send(self, channel: int, body: bytes, queue_bytes: int) -> bool:
        """Queues a frame unless more than `queue_bytes` would then be unsent."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        waiting = transport.get_write_buffer_size()
        if waiting and waiting + HEADER_BYTES + len(body) > queue_bytes:
            return False
        self.write(channel, body)
        self._idle = False
        return True

    def ping(self) -> None:
        """Says something where nothing was said since the last call."""
        idle, self._idle = self._idle, True
        if idle and self.transport is not None and self.transport.get_write_buffer_size() == 0:
            self.say(Ping())


class Inbound(_Connection):
    """The accepting end: lets the dialer prove itself, then only receives."""

    def __init__(self, owner: Owner) -> None:
        tls = owner.security.tls
        super().__init__(owner, tls.accept() if tls else None)
        self.hello: Hello | None = None
        self._secrets: LinkSecrets = NO_SECRETS

    @property
    def peer(self) -> str:
        return "" if self.hello is None else self.hello.name

    @property
    def known_as(self) -> str:
        # Anybody can say that he is a learner of some name: names without end would be kept and logged.
        unproved = self.hello is None or (self.hello.learner_at and not self.established)
        return "" if unproved else self.peer

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
                self.was_refused(reason, "refused_by_dialer")
            case _:
                raise BadFrame("garbage", "a dialer sent an unexpected message")

    def _on_hello(self, hello: Hello) -> None:
        reason = self._certificate_refusal(hello) or self.owner.admit(self, hello)
        if reason is not None:
            said = f"it is {hello.name!r} of cluster {hello.cluster_id!r}"
            self.refuse(reason, f"{self.other} says that {said}, incarnation {hello.incarnation}")
            return
        self.hello = hello
        owner, nonce = self.owner, secrets.token_bytes(NONCE_BYTES)
        welcome = Welcome(PROTOCOL_VERSION, owner.name, owner.incarnation, nonce, b"")
        self._secrets = owner.security.as_acceptor(transcript(hello, welcome))
        self.say(msgspec.structs.replace(welcome, proof=self._secrets.acceptor_proof))

    def _certificate_refusal(self, hello: Hello) -> str | None:
        tls = self.owner.security.tls
        if tls is None or (self._tls is not None and tls.names(self._tls, hello.name)):
            return None
        return "wrong_certificate"

    def _on_confirm(self, proof: bytes) -> None:
        agreed = self._secrets
        if not same(proof, agreed.dialer_proof):
            self.refuse("wrong_key", f"{self.other} does not have this cluster's key")
            return
        limit_bytes = self.owner.limits.frame_bytes
        self._establish(limit_bytes, agreed.acceptor_tag_key, agreed.dialer_tag_key)
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
