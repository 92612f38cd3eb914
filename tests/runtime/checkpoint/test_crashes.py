"""Processes that die while they save: what was committed is whole, and nothing else looks as if it were."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from distroml.model import Checkpoint
from distroml.runtime.checkpoint.commit import read_header, write_manifest
from distroml.runtime.checkpoint.manifest import decode_manifest
from distroml.runtime.checkpoint.shard_check import damage
from distroml.runtime.checkpoint.stores.file import TEMPORARY_PREFIX, FileStore
from distroml.runtime.checkpoint.stores.interface import CheckpointStore, MissingFile
from distroml.runtime.checkpoint.stores.loop_thread import loop_thread
from distroml.runtime.checkpoint.stores.s3 import S3Store
from tests.runtime.checkpoint.crash_victim import (
    FILE_POINTS,
    RANKS,
    S3_POINTS,
    opened,
    state_of,
)
from tests.runtime.checkpoint.object_server import BUCKET
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, tensor, verify, write_shards, writer

ROOT = Path(__file__).resolve().parents[3]
MOST_OCCURRENCES = 40


def victim(where: str, point: str, moment: str, number: int) -> tuple[bool, list[Checkpoint]]:
    """Whether it survived, and what it committed."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.runtime.checkpoint.crash_victim",
            where,
            point,
            moment,
            str(number),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    survived = lines[-1:] == ["survived"]
    assert done.returncode == (0 if survived else -signal.SIGKILL), done.stderr
    return survived, [msgspec.json.decode(line, type=Checkpoint) for line in lines if "{" in line]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("point", ["snapshot", *FILE_POINTS, "report"])
def test_wherever_it_dies_what_was_committed_is_whole(
    tmp_path: Path, point: str, moment: str
) -> None:
    for number in range(1, MOST_OCCURRENCES):
        store = FileStore(tmp_path / str(number))
        survived, committed = victim(str(store.root), point, moment, number)
        check(store, committed)
        assert not [f for f in store.root.rglob("*") if f.name.startswith(TEMPORARY_PREFIX)]
        if survived:
            assert number > 1, f"it never came to '{point}'"
            return
    raise AssertionError(f"more than {MOST_OCCURRENCES} times at '{point}'")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("point", S3_POINTS)
def test_wherever_it_dies_what_is_in_a_bucket_is_whole(
    s3_server: str, aws: None, point: str, moment: str
) -> None:
    for number in range(1, MOST_OCCURRENCES):
        where = f"s3://{BUCKET}/{secrets.token_hex(8)}?endpoint={s3_server}"
        store = opened(where)
        survived, committed = victim(where, point, moment, number)
        check(store, committed)
        assert isinstance(store, S3Store)
        uploads = loop_thread().run(store._do("list_multipart_uploads"))
        assert uploads.get("Uploads", []) == []
        if survived:
            assert number > 1, f"it never came to '{point}'"
            return
    raise AssertionError(f"more than {MOST_OCCURRENCES} times at '{point}'")


def check(store: CheckpointStore, committed: list[Checkpoint]) -> None:
    assert [c.step for c in committed] in ([100], [100, 200])
    for checkpoint in committed:
        verify(store, checkpoint)
    with contextlib.suppress(MissingFile):
        latest = json.loads(store.read(f"{JOB}/{RUN}/checkpoints/LATEST"))
        assert latest["step"] in [c.step for c in committed]
    for path in store.list(JOB):  # whatever has a name is whole
        if path.endswith(".safetensors"):
            assert damage(store, path, read_header(store, path).sha256) == ""
        elif "manifest" in path:
            decode_manifest(store.read(path))
    store.remove_orphans(JOB, now=time.time() + 7200)
    # whoever comes next commits the same step, beside whatever was left of it
    again = write_manifest(
        store,
        job_id=JOB,
        run_id=RUN,
        generation=2,
        shards=write_shards(store, 200, RANKS, generation=2, state=state_of(200)),
        committed_at=0.0,
    )
    verify(store, again)
    for checkpoint in committed:
        verify(store, checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_costs_that_checkpoint_and_leaves_no_litter(small_disk: Path) -> None:
    store = FileStore(small_disk)
    made, durable, abandoned = writer(store)
    made.write(100, CURSOR, [tensor("model.large", [1.0] * 1_000_000)], {})
    made.wait()
    assert not durable
    ((step, reason),) = abandoned
    assert step == 100
    assert "No space left on device" in reason
    assert [f for f in small_disk.rglob("*") if f.is_file()] == []
    made.write(200, CURSOR, [tensor("model.small", [1.0] * 1_000)], {})
    made.wait()
    assert [fact.step for fact in durable] == [200]
