"""Who this node is across restarts: its data directory, held by one process, its incarnation, its checkpoint store."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from distroml.errors import ConfigError, StoreError
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.interface import exists

_FILE = "node.json"
_STORE_NOTE = "store-dir"
"""In the data directory: the path of the store that was marked last."""
_STORE_MARK = ".distroml-local-store"


def unusable(path: Path, error: OSError) -> ConfigError:
    """What is told of a data directory that the operating system refuses."""
    where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
    return ConfigError(
        f"data_dir {path} cannot be used: {error.strerror or error}{where}.", field="data_dir"
    )


class DataDirectory:
    """Exclusive hold of a node's data directory; released when the process ends, however it ends."""

    def __init__(self, path: Path, *, name: str, cluster_id: str) -> None:
        """Lock the directory and read who wrote it.

        Raises:
            ConfigError: it cannot be made, another process holds it, or it belongs to another node.
        """
        self.path = path
        self._identity = {"name": name, "cluster_id": cluster_id}
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[bytes] = (path / "lock").open("ab")
        except OSError as error:
            raise unusable(path, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._last = self._read()
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"data_dir {path} is in use by another distroml-node; each node needs its own.",
                field="data_dir",
            ) from None
        except OSError as error:
            self.close()
            raise unusable(path, error) from None
        except ConfigError:
            self.close()
            raise

    def next_incarnation(self, at_least: int = 1) -> int:
        """A number higher than any this directory has seen, durable before it is returned.

        Raises:
            ConfigError: it cannot be written.
        """
        incarnation = max(self._last + 1, at_least)
        try:
            document = json.dumps({**self._identity, "incarnation": incarnation})
            _write(self.path / _FILE, document.encode())
        except OSError as error:
            raise unusable(self.path, error) from None
        self._last = incarnation
        return incarnation

    def claim_store(self, store_dir: Path) -> None:
        """See that the store is the one of this node's last life: where a disk is not mounted, all its files seem lost.

        A store in the data directory goes with it, and needs no mark.

        Raises:
            ConfigError: it was there before and is not, or it cannot be made.
        """
        if store_dir.is_relative_to(self.path):
            return
        store, note, told = FileStore(store_dir), self.path / _STORE_NOTE, os.fsencode(store_dir)
        try:
            if not exists(store, _STORE_MARK):
                if note.exists() and note.read_bytes() == told:
                    raise ConfigError(
                        f"store_dir {store_dir} has no file {_STORE_MARK}, which this node had put there: the disk is "
                        f"not mounted. Mount it; or, if it was replaced by an empty one, delete {note} first.",
                        field="store_dir",
                    )
                # durable with all directories above it, before the note tells of it
                owner = f"checkpoint store of node {self._identity['name']}\n"
                store.put_if_absent(_STORE_MARK, [owner.encode()])
            _write(note, told)
        except StoreError as error:
            raise ConfigError(
                f"store_dir {store_dir} cannot be used: {error.detail}", field="store_dir"
            ) from None
        except OSError as error:
            raise unusable(self.path, error) from None

    def close(self) -> None:
        """Let another process have it."""
        self._lock.close()

    def _read(self) -> int:
        path = self.path / _FILE
        try:
            document: dict[str, Any] = json.loads(path.read_text())
            incarnation = int(document["incarnation"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path} is damaged: restore it, or move the data directory away to join afresh.",
                field="data_dir",
            ) from None
        for key, value in self._identity.items():
            if document.get(key) != value:
                raise ConfigError(
                    f"data_dir {self.path} belongs to {key} '{document.get(key)}', not '{value}'.",
                    field="data_dir",
                )
        return incarnation


def _write(path: Path, content: bytes) -> None:
    """Replace a file, durably."""
    fresh = path.with_name(f"{path.stem}.tmp")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
