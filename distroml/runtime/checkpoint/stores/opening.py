"""From what a spec says of a store to the store; a kind that is not used is not loaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from distroml.errors import InvalidSpec, StoreError
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.interface import CheckpointStore
from distroml.store_urls import LOCAL, StoreSettings, StoreUrl, parse_store

__all__ = ["LOCAL", "Stores", "preload"]

MAX_OPENED = 256
"""Stores kept; they hold no connections of their own, so an older one is as good when it is opened again."""

_Open = Callable[[StoreUrl, StoreSettings], CheckpointStore]


class Stores:
    """The stores that one process has opened, by the name that specs and checkpoints give them; any thread.

    Args:
        local: directory of the store ``local`` on this node, or what stands for it.
        settings: what this node says of stores beyond their URLs.
    """

    def __init__(
        self, local: str | Path | CheckpointStore, settings: StoreSettings | None = None
    ) -> None:
        self._local = FileStore(local) if isinstance(local, str | Path) else local
        self._settings = settings or StoreSettings()
        self._lock = threading.Lock()
        self._opened: dict[str, CheckpointStore] = {}

    def of(self, name: str) -> CheckpointStore:
        """The store called ``name``: ``local`` or a URL. Nothing is asked of it yet.

        Raises:
            StoreError: there is no such kind of store.
        """
        if name == LOCAL:
            return self._local
        with self._lock:
            if (store := self._opened.get(name)) is None:
                while len(self._opened) >= MAX_OPENED:
                    del self._opened[next(iter(self._opened))]
                store = self._opened[name] = _open(name, self._settings)
            return store


def preload(name: str) -> None:
    """Have what a store needs in this process before others are forked from it.

    A worker that loads it for its first checkpoint does so in a thread of low priority, which may take many seconds.
    Never raises: where it cannot be loaded, the worker says so.
    """
    with contextlib.suppress(Exception):
        if name != LOCAL and parse_store(name, "the store").scheme == "s3":
            from distroml.runtime.checkpoint.stores import s3_client

            s3_client.library()


def _open(name: str, settings: StoreSettings) -> CheckpointStore:
    try:
        url = parse_store(name, "the store")
    except InvalidSpec as error:
        raise StoreError(error.detail) from None
    return _KINDS[url.scheme](url, settings)


def _file(url: StoreUrl, settings: StoreSettings) -> CheckpointStore:
    return FileStore(url.place, must_exist=True)


def _s3(url: StoreUrl, settings: StoreSettings) -> CheckpointStore:
    from distroml.runtime.checkpoint.stores.s3 import S3Store

    return S3Store(url, settings)


def _fsspec(url: StoreUrl, settings: StoreSettings) -> CheckpointStore:
    from distroml.runtime.checkpoint.stores.fsspec_store import FsspecStore

    return FsspecStore(url)


_KINDS: dict[str, _Open] = {"file": _file, "s3": _s3, "gs": _fsspec, "az": _fsspec}
