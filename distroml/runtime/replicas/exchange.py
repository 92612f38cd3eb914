"""Questions about copies to other nodes, and their answers, over the bulk lane of the peer links.

Each question has a number and a time in which something must be heard of it, and a longer one in which it must get on: a
node whose disk hangs is alive, and would be waited for without end. A link that breaks ends all that is open with that
peer. Answering is bounded too: whoever asks for more at once than is answered hears that, and tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from distroml.consensus.frames import Channel
from distroml.errors import DistroMLError
from distroml.runtime.replicas import wire
from distroml.runtime.replicas.wire import (
    MAX_PROBLEM_CHARS,
    Answer,
    Doubt,
    Failed,
    File,
    Have,
    Holds,
    Keep,
    Kept,
    List,
    Listing,
    Message,
    Part,
    Read,
    Working,
)

ANSWER_S = 10.0
"""In which an answer must come, or word that it is being worked on."""
WORKING_S = 2.0
"""How often that is said."""
STALLED_S = 20.0
"""In which an answer must come, or bytes to a node that fetches a copy."""
MAX_ANSWERING = 256
"""Questions of all peers that are being answered."""

_log = logging.getLogger(__name__)
_A = TypeVar("_A", Holds, Part, Kept, Listing)


class NotAnswered(DistroMLError):
    """A node did not give what it was asked for: it is gone, slow, or says why it cannot."""


class Links(Protocol):
    """What is needed of ``consensus.peers.PeerLinks``."""

    def subscribe(self, channel: Channel, handler: Callable[[str, bytes], None]) -> None: ...
    def on_link(self, handler: Callable[[str, bool], None]) -> None: ...
    def connected_peers(self) -> list[str]: ...
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class Answers(Protocol):
    """Who answers the questions of peers; what is raised is told to them."""

    async def holds(self, files: tuple[File, ...]) -> tuple[int, ...]: ...
    async def part(self, path: str, offset: int, length: int) -> tuple[bytes, int]: ...
    async def keep(self, file: File, sources: tuple[str, ...]) -> None: ...
    async def listing(self, directory: str, after: str) -> tuple[str, ...]: ...
    async def doubt(self, file: File) -> None: ...


@dataclass(slots=True)
class _Asked:
    peer: str
    answer: asyncio.Future[Answer]
    heard_s: float
    got_on_s: float
    come_bytes: int = 0


class Exchange:
    """One node's end."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._answers: Answers | None = None
        self._asked: dict[int, _Asked] = {}
        self._next = 1
        self._answering: set[asyncio.Task[None]] = set()
        self.counts = {"sent_bytes": 0, "received_bytes": 0, "malformed": 0, "refused": 0}

    def start(self, answers: Answers) -> None:
        """Answer from now on."""
        self._answers = answers
        self._links.subscribe(Channel.COPIES, self._on_body)
        self._links.on_link(self._on_link)

    async def stop(self) -> None:
        """Answer and await nothing more."""
        self._answers = None
        for asked in self._asked.values():
            asked.answer.cancel()
        for task in tuple(self._answering):
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    def connected(self) -> list[str]:
        """Peers that can be asked now."""
        return self._links.connected_peers()

    # --- asking ------------------------------------------------------------------------------------------------

    async def holds(self, peer: str, files: tuple[File, ...]) -> tuple[int, ...]:
        """Sizes of ``files`` (``wire.MAX_FILES`` at most) at a peer, ``wire.ABSENT`` for what it has not.

        Raises:
            NotAnswered: as all that asks.
        """
        answer = await self._ask(peer, lambda number: Have(number, files), Holds)
        if len(answer.sizes) != len(files):
            raise NotAnswered(f"Node '{peer}' told of {len(answer.sizes)} files, not {len(files)}.")
        return answer.sizes

    async def read(self, peer: str, path: str, offset: int, length: int) -> Part:
        """A part of a file of a peer."""
        part = await self._ask(peer, lambda number: Read(number, path, offset, length), Part)
        self.counts["received_bytes"] += len(part.data)
        return part

    async def keep(self, peer: str, file: File, sources: tuple[str, ...]) -> None:
        """Have a peer fetch a copy; returns when that is durable."""
        await self._ask(peer, lambda number: Keep(number, file, sources), Kept)

    async def listing(self, peer: str, directory: str, after: str) -> tuple[str, ...]:
        """Files of a peer behind ``after``, in their order, ``wire.MAX_PATHS`` at most."""
        answer = await self._ask(peer, lambda number: List(number, directory, after), Listing)
        return answer.paths

    def doubt(self, peer: str, file: File) -> None:
        """Have a peer look at its copy."""
        self._send(peer, Doubt(file))

    async def _ask(self, peer: str, question: Callable[[int], Message], kind: type[_A]) -> _A:
        loop = asyncio.get_running_loop()
        number, self._next = self._next, self._next + 1
        asked = _Asked(peer, loop.create_future(), loop.time(), loop.time())
        self._asked[number] = asked
        try:
            if not self._send(peer, question(number)):
                raise NotAnswered(f"Node '{peer}' cannot be reached.")
            answer = await self._await(asked)
        finally:
            del self._asked[number]
        if isinstance(answer, Failed):
            raise NotAnswered(f"Node '{peer}': {answer.problem}")
        if not isinstance(answer, kind):
            raise NotAnswered(f"Node '{peer}' answered something else.")
        return answer

    async def _await(self, asked: _Asked) -> Answer:
        loop = asyncio.get_running_loop()
        while True:
            until_s = min(asked.heard_s + ANSWER_S, asked.got_on_s + STALLED_S)
            done, _ = await asyncio.wait([asked.answer], timeout=max(0.0, until_s - loop.time()))
            if done:
                return asked.answer.result()
            if loop.time() >= asked.heard_s + ANSWER_S:
                raise NotAnswered(f"Node '{asked.peer}' has not answered for {ANSWER_S:g} s.")
            if loop.time() >= asked.got_on_s + STALLED_S:
                raise NotAnswered(f"Node '{asked.peer}' has not got on for {STALLED_S:g} s.")

    def _send(self, peer: str, message: Message) -> bool:
        sent = self._links.send(peer, Channel.COPIES, wire.encode(message))
        if sent and isinstance(message, Part):
            self.counts["sent_bytes"] += len(message.data)
        return sent

    # --- what comes --------------------------------------------------------------------------------------------

    def _on_link(self, peer: str, up: bool) -> None:
        for asked in self._asked.values() if not up else ():
            if asked.peer == peer and not asked.answer.done():
                gone = NotAnswered(f"The connection with node '{peer}' broke.")
                asked.answer.set_exception(gone)

    def _on_body(self, peer: str, body: bytes) -> None:
        try:
            message = wire.decode(body)
        except ValueError as error:
            self.counts["malformed"] += 1
            _log.warning("copies: a message of %s is refused: %s", peer, error)
            return
        if isinstance(message, Have | Read | Keep | List | Doubt):
            self._take_question(peer, message)
        else:
            self._take_answer(peer, message)

    def _take_answer(self, peer: str, answer: Answer) -> None:
        asked = self._asked.get(answer.number)
        if asked is None or asked.peer != peer or asked.answer.done():
            return  # late, or not for us
        if isinstance(answer, Working):
            asked.heard_s = asyncio.get_running_loop().time()
            if answer.come_bytes > asked.come_bytes:
                asked.come_bytes, asked.got_on_s = answer.come_bytes, asked.heard_s
        else:
            asked.answer.set_result(answer)

    def _take_question(self, peer: str, question: Have | Read | Keep | List | Doubt) -> None:
        if self._answers is None or len(self._answering) >= MAX_ANSWERING:
            self.counts["refused"] += 1
            if not isinstance(question, Doubt):
                self._send(peer, Failed(question.number, "it is busy with others' copies"))
            return
        task = asyncio.create_task(self._respond(peer, question, self._answers))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _respond(
        self, peer: str, question: Have | Read | Keep | List | Doubt, answers: Answers
    ) -> None:
        if isinstance(question, Doubt):
            await answers.doubt(question.file)
            return
        work = asyncio.ensure_future(_answer(question, answers))
        try:
            while not (await asyncio.wait([work], timeout=WORKING_S))[0]:
                come_bytes = self.counts["received_bytes"] if isinstance(question, Keep) else 0
                self._send(peer, Working(question.number, come_bytes))
            answer = work.result()
        except DistroMLError as error:
            answer = Failed(question.number, error.detail[:MAX_PROBLEM_CHARS])
        except Exception as error:
            _log.exception("copies: a question of %s could not be answered", peer)
            answer = Failed(question.number, f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])
        finally:
            work.cancel()
        self._send(peer, answer)


async def _answer(question: Have | Read | Keep | List, answers: Answers) -> Answer:
    number = question.number
    match question:
        case Have(files=files):
            return Holds(number, await answers.holds(files))
        case Read(path=path, offset=offset, length=length):
            data, size_bytes = await answers.part(path, offset, length)
            return Part(number, data, size_bytes)
        case Keep(file=file, sources=sources):
            await answers.keep(file, sources)
            return Kept(number)
        case List(directory=directory, after=after):
            return Listing(number, await answers.listing(directory, after))
