"""Where the ranks of a generation find each other's addresses: a store that needs no server.

Gloo wants a key-value store to exchange addresses through. Here ``set`` publishes to the agent, which passes keys
on to the other ranks' agents with its reports, and their keys come back through ``feed``. So there is no TCP store,
no port to agree on and no host whose death takes the rendezvous with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as c10d

RENDEZVOUS_TIMEOUT_S = 120.0
"""How long to wait for the other ranks' addresses; they may still be importing or reading data."""


class CollectiveBroken(RuntimeError):
    """A collective or the rendezvous failed: another rank is gone, or the agent called this one away.

    Never the fault of this rank's code, and never the end of its process.
    """


class Bereft(CollectiveBroken):
    """No rank has the state that the generation was to go on from."""


class RendezvousStore(c10d.Store):
    """What Gloo needs of a store, carried by the control link; keys live under the generation's prefix.

    Args:
        generation: keys of any other generation are never seen.
        publish: hands (key, value) to the agent, which relays it to the other ranks.
    """

    def __init__(self, generation: int, publish: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._prefix = f"g{generation}/"
        self._publish = publish
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._aborted = False

    def feed(self, keys: dict[str, bytes]) -> None:
        """Take keys that other ranks published; those of other generations are ignored."""
        with self._changed:
            self._values |= {k: v for k, v in keys.items() if k.startswith(self._prefix)}
            self._changed.notify_all()

    def abort(self) -> None:
        """Make every present and future wait raise ``CollectiveBroken``."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    # --- called by Gloo, from C++ ------------------------------------------------------------------------------

    def set(self, key: str, value: bytes | str) -> None:
        value = value if isinstance(value, bytes) else value.encode()
        self.feed({self._prefix + key: value})
        self._publish(self._prefix + key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[self._prefix + key]

    def wait(
        self, keys: list[str], timeout: timedelta = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
    ) -> None:
        wanted = [self._prefix + key for key in keys]
        with self._changed:
            complete = self._changed.wait_for(
                lambda: self._aborted or all(key in self._values for key in wanted),
                timeout.total_seconds(),
            )
            if self._aborted:
                raise CollectiveBroken("the rendezvous was aborted")
            if not complete:
                missing = [key for key in wanted if key not in self._values]
                raise CollectiveBroken(
                    f"no address of other ranks within {timeout.total_seconds():g} s: {missing}"
                )

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(self._prefix + key in self._values for key in keys)

    def set_timeout(self, timeout: timedelta) -> None:
        """Waits carry their own timeout."""
