"""What the workload and the observers need of a cluster, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from chaos.records import Record


class Node(Protocol):
    """One node under test."""

    @property
    def name(self) -> str: ...
    @property
    def url(self) -> str:
        """Base URL of its API."""
        ...

    @property
    def pid(self) -> int | None:
        """Of its agent, while that runs."""
        ...


class History(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None: ...


class Target(Protocol):
    """The cluster under test."""

    @property
    def nodes(self) -> Mapping[str, Node]: ...
    @property
    def history(self) -> History: ...
    @property
    def stores(self) -> Mapping[str, str]:
        """URLs of the checkpoint stores that all nodes see, by their kind (``specs.FILE``, ``specs.OBJECTS``)."""
        ...

    def clock(self) -> float:
        """Seconds since the run began, monotonic."""
        ...
