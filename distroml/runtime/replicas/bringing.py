"""Gathers the files of a committed checkpoint on this node: for its workers before a restore, for the API after damage.

The manifest comes first, by the hash in the log; all else by the hashes in the manifest. A copy here that is found to be
broken is replaced by another node's. Only where every node that may have a good one was asked and has none is the
checkpoint corrupt, since that is for good; else it is said to be away, and asked for again by whoever needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial

from distroml.errors import CheckpointAway, CorruptCheckpoint, StoreError
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.manifest import Manifest, path_of
from distroml.runtime.checkpoint.reader import decode_committed
from distroml.runtime.checkpoint.stores.interface import exists
from distroml.runtime.replicas.fetching import Fetcher, NoGoodCopy
from distroml.runtime.replicas.keeping import Neighbours
from distroml.runtime.replicas.own_copies import OwnCopies
from distroml.runtime.replicas.wire import ABSENT, File

PATIENCE_S = 10.0
"""How long nodes that are away are waited for in one go: they may just be starting again."""
COMPLETE_PATIENCE_S = 5.0
"""The same where all nodes say that they have nothing: copies are replaced, too."""
RETRY_S = 0.5
MAX_NAMED = 8
"""Nodes that an error names."""

_log = logging.getLogger(__name__)


def manifest_file(checkpoint: Checkpoint) -> File:
    """The manifest of a committed checkpoint."""
    return File(f"{checkpoint.directory}/{checkpoint.manifest}", checkpoint.manifest_sha256)


def shard_files(checkpoint: Checkpoint, manifest: Manifest) -> list[File]:
    """All other files that it needs, those of earlier checkpoints included."""
    return [
        File(path_of(checkpoint.directory, one.file), one.header_sha256, one.size_bytes)
        for one in manifest.files
    ]


class Bringer:
    """Has the files of checkpoints here."""

    def __init__(
        self, node: str, own: OwnCopies, fetcher: Fetcher, neighbours: Callable[[], Neighbours]
    ) -> None:
        self._node, self._own, self._fetcher = node, own, fetcher
        self._neighbours = neighbours
        self.counts = {"mended": 0}
        """Broken copies here that were replaced."""

    async def manifest(self, checkpoint: Checkpoint, *, patience_s: float = PATIENCE_S) -> Manifest:
        """The manifest, which is on this node afterwards.

        Raises:
            CorruptCheckpoint: nobody has it whole.
            CheckpointAway: nobody that answers has it whole.
            StoreError: the disk failed, or another version wrote it.
        """
        file = manifest_file(checkpoint)
        await self._have(checkpoint, file, mend=True, patience_s=patience_s)
        data = await self._own.run(partial(self._own.store.read, file.path))
        return decode_committed(checkpoint, file.path, data)

    async def bring(self, checkpoint: Checkpoint, *, mend: bool) -> None:
        """All files of a checkpoint.

        Args:
            mend: what is here already is read and compared, and replaced if it is broken.

        Raises:
            CorruptCheckpoint: nobody has one of them whole; names it.
            CheckpointAway: nobody that answers has one of them whole; names it, and who may have it.
            StoreError: the disk failed.
        """
        manifest = await self.manifest(checkpoint)
        await self._have_all(checkpoint, shard_files(checkpoint, manifest), mend)

    async def mend(self, checkpoint: Checkpoint, paths: Iterable[str]) -> bool:
        """Have good copies here of those of ``paths`` that are files of the checkpoint; whether there are of all.

        Raises:
            StoreError: the disk failed.
        """
        try:
            manifest = await self.manifest(checkpoint, patience_s=0.0)
            wanted = [one for one in shard_files(checkpoint, manifest) if one.path in set(paths)]
            for file in wanted:
                await self._have(checkpoint, file, mend=True, patience_s=0.0)
        except (CorruptCheckpoint, CheckpointAway) as error:
            _log.error("%s", error)
            return False
        return True

    async def _have_all(self, checkpoint: Checkpoint, files: list[File], mend: bool) -> None:
        having = [
            asyncio.ensure_future(self._have(checkpoint, one, mend=mend, patience_s=PATIENCE_S))
            for one in files
        ]
        try:
            await asyncio.gather(*having)
        finally:
            for one in having:
                one.cancel()
            await asyncio.gather(*having, return_exceptions=True)

    async def _have(
        self, checkpoint: Checkpoint, file: File, *, mend: bool, patience_s: float
    ) -> None:
        """Have one file here."""
        here, broken = await self._own.run(partial(self._look, file, thoroughly=mend))
        if here:
            return
        if broken:
            _log.error("copies: this node (%s) has a broken %s: %s", self._node, file.path, broken)
        await self._fetch(checkpoint, file, broken, patience_s)
        if broken:
            self.counts["mended"] += 1
            _log.warning("copies: %s is replaced by another node's", file.path)

    def _look(self, file: File, *, thoroughly: bool) -> tuple[bool, str]:
        """Whether a good copy is here, and what is wrong with one that is not."""
        try:
            if not exists(self._own.store, file.path):
                return False, ""
            if not thoroughly and self._own.size(file) != ABSENT:
                return True, ""
            problem = self._own.damage(file)
        except StoreError as error:  # a disk that cannot be read has no good copy
            problem = error.detail
        return not problem, problem

    async def _fetch(
        self, checkpoint: Checkpoint, file: File, broken: str, patience_s: float
    ) -> None:
        now_s = asyncio.get_running_loop().time
        begun_s = all_said_s = now_s()
        while True:
            try:
                await self._fetcher.fetch(file, replace=bool(broken))
                return
            except NoGoodCopy as error:
                near = self._neighbours()  # of now: who came meanwhile was not asked
                silent = near.may_have - error.without
                may_come = bool(silent) or not near.complete
                if may_come:
                    all_said_s = now_s()
                waited_s = now_s() - (begun_s if may_come else all_said_s)
                worth_s = PATIENCE_S if may_come else COMPLETE_PATIENCE_S
                alone = near.complete and not near.may_have
                if alone or waited_s >= min(patience_s, worth_s):
                    raise self._given_up(checkpoint, file, error, broken, near) from None
            await asyncio.sleep(RETRY_S)

    def _given_up(
        self,
        checkpoint: Checkpoint,
        file: File,
        error: NoGoodCopy,
        broken: str,
        near: Neighbours,
    ) -> StoreError:
        told = f"Checkpoint of step {checkpoint.step}: {error.detail}"
        if broken:
            told += f" The copy of node '{self._node}' is broken: {broken}."
        kind: type[StoreError] = CorruptCheckpoint
        silent = near.may_have - error.without
        if not near.complete:
            kind = CheckpointAway
            told += " This node does not know all others yet."
        elif silent:
            kind = CheckpointAway
            told += f" Away or silent, and may have it: {', '.join(sorted(silent)[:MAX_NAMED])}."
        return kind(told, path=file.path, checkpoint_step=checkpoint.step)
