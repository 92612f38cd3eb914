"""Look at checkpoints without restoring them: is every byte as committed, and what is there in a store?

Both read a lot and block; they run in a thread and ask ``stopped`` now and then whether anybody still wants to know.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from distroml.errors import UNDECODABLE, CorruptCheckpoint, StoreError
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.commit import record_of
from distroml.runtime.checkpoint.manifest import (
    LATEST_FILE,
    MAX_MANIFEST_BYTES,
    ShardRecord,
    checkpoint_directory,
    decode_manifest,
)
from distroml.runtime.checkpoint.reader import read_manifest
from distroml.runtime.checkpoint.shard_check import damage
from distroml.runtime.checkpoint.stores.interface import CheckpointStore, MissingFile

MAX_FOUND = 10_000
"""Checkpoints that one survey takes; more are an error that says so."""
DEFAULT_METRIC = "loss"
"""What a found checkpoint is measured by: the spec that chose a metric is lost."""

_PLACE = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9_-]{0,62})/([A-Za-z0-9][A-Za-z0-9_-]{0,62})/checkpoints/ckpt_step_(\d{8,12})\Z"
)
_MANIFEST = re.compile(r"manifest(?:\.g(\d{1,9}))?\.json\Z")

Stopped = Callable[[], bool]


class Stop(Exception):
    """Nobody waits for the result any more."""


class FileCheck(Struct, frozen=True, kw_only=True):
    """What became of one file."""

    path: str
    size_bytes: int
    problem: str = ""
    """Empty: every byte is as committed."""


class Found(Struct, frozen=True, kw_only=True):
    """A checkpoint that a store has, as the log of a lost cluster may have known it."""

    job_id: str
    run_id: str
    checkpoint: Checkpoint


class Unusable(Struct, frozen=True, kw_only=True):
    """A directory that looks like a checkpoint and is none."""

    directory: str
    reason: str


class Survey(Struct, frozen=True, kw_only=True):
    """What is in a store, by job, run and step."""

    found: tuple[Found, ...]
    unusable: tuple[Unusable, ...]


def verify(
    store: CheckpointStore,
    checkpoint: Checkpoint,
    others: Collection[Checkpoint],
    stopped: Stopped,
) -> list[FileCheck]:
    """Read each file of a checkpoint, those that it refers to included, and compare size and hash.

    Args:
        others: checkpoints of the same run; those in ``checkpoint.refers_to`` are needed.

    Raises:
        StoreError: the store cannot be read.
        Stop: ``stopped`` said so.
    """
    referred = [one for one in others if one.directory in checkpoint.refers_to]
    checks: list[FileCheck] = []
    for one in (checkpoint, *referred):
        path = f"{one.directory}/{one.manifest}"
        try:
            manifest = read_manifest(store, one)
        except CorruptCheckpoint as error:
            checks.append(FileCheck(path=path, size_bytes=0, problem=error.detail))
            continue
        checks.append(FileCheck(path=path, size_bytes=store.size(path)))
        for shard in manifest.shards:
            path = f"{one.directory}/{shard.file}"
            problem = _difference(store, path, shard, stopped)
            checks.append(FileCheck(path=path, size_bytes=shard.size_bytes, problem=problem))
    missing = set(checkpoint.refers_to) - {one.directory for one in referred}
    checks += [
        FileCheck(path=name, size_bytes=0, problem="it is referred to and not listed any more")
        for name in sorted(missing)
    ]
    return checks


def _difference(store: CheckpointStore, path: str, shard: ShardRecord, stopped: Stopped) -> str:
    """How a file differs from what was committed; empty: not at all."""

    def go_on() -> None:
        if stopped():
            raise Stop

    try:
        size = store.size(path)
        if size != shard.size_bytes:
            return f"has {size} bytes instead of {shard.size_bytes}"
        return damage(store, path, shard.header_sha256, go_on)
    except MissingFile:
        return "is missing"


# --- what a store has --------------------------------------------------------------------------------------------


def survey(store: CheckpointStore, name: str, *, thorough: bool, stopped: Stopped) -> Survey:
    """All checkpoints below the store's root whose manifest is usable and whose files are there.

    Of several manifests of one step the one that ``LATEST`` names counts, else that of the newest generation.

    Args:
        name: of the store, as in a spec.
        thorough: read and compare every byte as well.

    Raises:
        StoreError: the store cannot be read, or has more than ``MAX_FOUND`` checkpoints.
        Stop: ``stopped`` said so.
    """
    files: dict[str, set[str]] = defaultdict(set)
    for path in store.list(""):
        directory, _, file = path.rpartition("/")
        if _PLACE.match(directory):
            files[directory].add(file)
    if len(files) > MAX_FOUND:
        raise StoreError(
            f"The store has {len(files)} checkpoints, the limit of one import is {MAX_FOUND}; "
            "name a part of it in the URL."
        )
    latest = {parent: _latest(store, parent) for parent in {_parent(name) for name in files}}
    found: list[Found] = []
    unusable: list[Unusable] = []
    for directory in sorted(files):
        if stopped():
            raise Stop
        try:
            newest = latest[_parent(directory)]
            found.append(_look(store, name, directory, files[directory], newest))
        except ValueError as error:
            unusable.append(Unusable(directory=directory, reason=str(error)))
    return _consistent(store, found, unusable, thorough=thorough, stopped=stopped)


def _consistent(
    store: CheckpointStore,
    found: list[Found],
    unusable: list[Unusable],
    *,
    thorough: bool,
    stopped: Stopped,
) -> Survey:
    """Without those that refer to what is not there, or, if ``thorough``, to what has other bytes."""
    good = {one.checkpoint.directory: one for one in found}
    for one in found:  # by run and step: what is referred to comes first
        checkpoint = one.checkpoint
        problem = next(
            (
                f"it refers to {name}, which is not usable"
                for name in checkpoint.refers_to
                if name not in good
            ),
            "",
        )
        if thorough and not problem:
            others = [good[name].checkpoint for name in checkpoint.refers_to]
            checks = verify(store, checkpoint, others, stopped)
            problem = next((f"{c.path} {c.problem}" for c in checks if c.problem), "")
        if problem:
            del good[checkpoint.directory]
            unusable.append(Unusable(directory=checkpoint.directory, reason=problem))
    return Survey(
        found=tuple(good.values()),
        unusable=tuple(sorted(unusable, key=lambda one: one.directory)),
    )


def _look(
    store: CheckpointStore, name: str, directory: str, files: set[str], latest: tuple[str, str]
) -> Found:
    """The checkpoint in a directory. Raises ValueError, which says why there is none."""
    reasons = []
    for file in _manifests(files, latest[1] if latest[0] == directory.rpartition("/")[2] else ""):
        try:
            return _found(store, name, directory, file)
        except ValueError as error:
            reasons.append(f"{file}: {error}")
    raise ValueError("; ".join(reasons) or "it has no manifest: it was never whole")


def _manifests(files: Iterable[str], first: str) -> Iterator[str]:
    """Manifest files in the order of trust."""
    matches = {file: match for file in files if (match := _MANIFEST.match(file))}
    if first in matches:
        yield first
    for file in sorted(matches, key=lambda file: -int(matches[file][1] or 0)):
        if file != first:
            yield file


def _found(store: CheckpointStore, name: str, directory: str, file: str) -> Found:
    path = f"{directory}/{file}"
    size = store.size(path)
    if size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {size} bytes, the limit is {MAX_MANIFEST_BYTES}")
    data = store.read(path)
    manifest = decode_manifest(data)
    place = _PLACE.match(directory)
    assert place is not None  # only such directories are looked at
    if checkpoint_directory(manifest.job_id, manifest.run_id, manifest.step) != directory:
        raise ValueError(
            f"it is of job {manifest.job_id[:64]}, run {manifest.run_id[:64]}, step {manifest.step}"
        )
    for shard in manifest.shards:
        try:
            there = store.size(f"{directory}/{shard.file}")
        except MissingFile:
            raise ValueError(f"{shard.file} is missing") from None
        if there != shard.size_bytes:
            raise ValueError(f"{shard.file} has {there} bytes instead of {shard.size_bytes}")
    return Found(
        job_id=manifest.job_id,
        run_id=manifest.run_id,
        checkpoint=replace(
            record_of(manifest, directory, file, data, metric=DEFAULT_METRIC), store=name
        ),
    )


def _latest(store: CheckpointStore, parent: str) -> tuple[str, str]:
    """Directory and manifest that ``LATEST`` of a run names; empty where it does not say."""
    try:
        raw = msgspec.json.decode(store.read(f"{parent}/{LATEST_FILE}"), type=dict[str, object])
        return str(raw.get("directory", "")), str(raw.get("manifest", ""))
    except (MissingFile, *UNDECODABLE):
        return "", ""


def _parent(directory: str) -> str:
    return directory.rpartition("/")[0]
