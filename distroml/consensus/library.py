"""PySyncObj without its clock, randomness, sockets and files: what stands in for each, and the pin of its source.

``adopt_library`` is the one place that changes the library's module. The stand-ins carry the names under which the
library calls them; what it then does is up to ``hardening``.
"""

from __future__ import annotations

import functools
import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pysyncobj import syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from distroml.consensus.messages import NO_OP
from distroml.consensus.raft_log import FIRST_INDEX, RaftLog
from distroml.consensus.raft_types import SafetyViolation, UnsafeLibrary

LIBRARY_SHA256: Final = "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4"
"""Of pysyncobj/syncobj.py in version 0.3.17."""


def check_library(path: Path | None = None) -> None:
    """Raises UnsafeLibrary unless the installed library is the audited source."""
    source = Path(path or syncobj.__file__)
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != LIBRARY_SHA256:
        raise UnsafeLibrary(
            f"{source} has SHA-256 {found}, expected {LIBRARY_SHA256}: it is not the PySyncObj "
            "0.3.17 whose hazards are closed here, and running it could lose acknowledged state. "
            "Install pysyncobj==0.3.17"
        )


class _Ambient(threading.local):
    """Clock and randomness of the core that is running now: cores of one process take turns."""

    now: float = 0.0
    rng: random.Random = random.Random(0)


ambient = _Ambient()
"""Set by ``HardenedRaft.begin`` before each input."""


class _AmbientRandom:
    """Stands in for the module `random` inside the library."""

    def random(self) -> float:
        return ambient.rng.random()


class _NoPoller:
    """The library's poller, with nothing to poll: sockets are ours."""

    def subscribe(self, *_: object) -> None: ...
    def unsubscribe(self, *_: object) -> None: ...
    def poll(self, _timeout_s: float) -> None: ...


@functools.cache
def adopt_library() -> None:
    """Checks the library, then replaces its module globals: the one place that does."""
    check_library()
    syncobj.monotonicTime = lambda: ambient.now
    syncobj.random = _AmbientRandom()
    syncobj.createPoller = lambda _kind: _NoPoller()
    syncobj.createJournal = lambda journal: journal


class Peer(Node):  # type: ignore[misc]
    """A voter or learner. It equals itself only, and its name is a plain attribute: both are asked for
    several times per message. What is sent to all goes out in the order of `others`, never in a set's."""

    id = ""
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, name: str) -> None:
        super().__init__(name)
        object.__setattr__(self, "id", name)  # the library's own makes it a property


class Journal(RaftLog):
    """The names under which the library knows a journal."""

    def __getitem__(self, key: Any) -> Any:
        return self.entries[key]

    def __len__(self) -> int:
        return len(self.entries)

    no_op: bytes = NO_OP
    """What the library's no-op of a new leader is here: the first of a cluster names its founders."""

    def add(self, command: bytes, index: int, term: int) -> None:
        self.append(self.no_op if command == NO_OP else command, index, term)

    def getCurrentTerm(self) -> int:  # noqa: N802
        return self.term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802
        return self.vote

    def setCurrentTerm(self, term: int, vote: str | None) -> None:  # noqa: N802
        self.set_term(term, vote)

    def getRaftCommitIndex(self) -> int:  # noqa: N802
        return FIRST_INDEX  # Raft needs no durable commit index

    def setRaftCommitIndex(self, _index: int) -> None: ...  # noqa: N802
    def onOneSecondTimer(self) -> None: ...  # noqa: N802


class Outbox(Transport):  # type: ignore[misc]
    """The library's transport: collects what it wants sent. Only vote replies are left to it."""

    def __init__(self, grant: Callable[[Any, int], None]) -> None:
        super().__init__(None, None, None)
        self._grant = grant

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        if message["type"] != "response_vote":
            raise SafetyViolation(f"the library sent a {message['type']!r} past its override")
        self._grant(node, message["term"])
        return True
