"""An S3 bucket as a checkpoint store: AWS, MinIO, Ceph and whatever else keeps ``If-None-Match``.

What never changes is written with ``If-None-Match: *``, so of two writers one wins, and a file is there whole or not at all. Small
files are one request; large ones are uploaded in parts (``s3_upload``), several at a time, and read in ranges in the same way. Each
upload carries its SHA-256, which the server compares. Once per process an object of fixed content, ``PROBE``, shows that the server
keeps ``If-None-Match``: one that ignored it would let two writers overwrite each other, and is refused.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.interface import (
    PROBE,
    PROBE_CONTENT,
    Buffer,
    Staged,
    Stored,
    check_path,
    exists,
    read_stored,
)
from distroml.runtime.checkpoint.stores.loop_thread import loop_thread
from distroml.runtime.checkpoint.stores.parts import PART_BYTES
from distroml.runtime.checkpoint.stores.s3_client import Place, Refused, Requests, place_of
from distroml.runtime.checkpoint.stores.s3_errors import Incomplete, Kind
from distroml.runtime.checkpoint.stores.s3_upload import Upload
from distroml.store_urls import StoreSettings, StoreUrl

RANGE_BYTES = PART_BYTES
READ_CHUNK_BYTES = 256 * 1024
UPLOAD_AGE_S = 24 * 3600.0
"""A large shard on a slow line may take hours; nothing shows whether its writer lives."""
MAX_LISTED = 1_000_000
DELETED_AT_ONCE = 1000
"""S3 takes no more in a request."""
SHA256_KEY = "sha256"
"""Metadata of an object: the hash of its content."""


_T = TypeVar("_T")
Keys = list[str]


class _Range(Struct, frozen=True):
    """What arrived of a file."""

    count: int
    size_bytes: int
    """Of the file; ``count`` at least, where a range behind its end was asked for."""


class S3Store:
    """Part of a bucket; opening it asks nothing of the server."""

    def __init__(self, url: StoreUrl, settings: StoreSettings) -> None:
        self._bucket, self._prefix = url.place, f"{url.prefix}/" if url.prefix else ""
        self.place: Place = place_of(url, settings)
        self._requests = Requests(f"s3://{self._bucket}/{url.prefix}".rstrip("/"), self.place)
        self._proven = False

    # --- writing -----------------------------------------------------------------------------------------------

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> Stored:
        views = [memoryview(part).cast("B") for part in parts]
        size, digest = sum(map(len, views)), hashlib.sha256()
        for view in views:
            digest.update(view)
        sha256 = digest.hexdigest()
        if size <= PART_BYTES:
            self._prove()
            created = self._run("write", path, self._create(path, b"".join(views), sha256))
        else:
            created = self._upload(path, views, size, sha256)
        return Stored(size, sha256, created=True) if created else self._stored(path)

    @contextmanager
    def stage(self, path: str, size_bytes: int) -> Iterator[Staged]:
        upload = self._new_upload(path, size_bytes)
        try:
            yield upload
        finally:
            upload.close()

    def put_latest(self, path: str, data: bytes) -> None:
        self._run("write", path, self._put(self._key(path), data))

    def delete(self, path: str) -> None:
        self._run("delete", path, self._delete(self._key(path)))

    def health(self) -> None:
        self.put_latest(PROBE, PROBE_CONTENT)
        self._proven = False
        self._prove()

    def remove_orphans(self, directory: str, now: float, min_age_s: float = UPLOAD_AGE_S) -> int:
        prefix = self._key(directory) + "/"
        return self._run("clean", directory, self._abort_older(prefix, now - min_age_s))

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            self.size(path)
            return b""
        return self._run("read", path, self._read(self._key(path), offset, length))

    def read_into(self, path: str, target: memoryview, offset: int = 0) -> int:
        if not target:
            return 0
        return self._run("read", path, self._fill(self._key(path), target.cast("B"), offset))

    def size(self, path: str) -> int:
        head = self._run("read", path, self._head(self._key(path)))
        return int(head["ContentLength"])

    def list(self, directory: str) -> list[str]:
        prefix = f"{self._key(directory)}/" if directory else self._prefix
        keys = self._run("list", directory, self._list(prefix))
        paths = (key.removeprefix(self._prefix) for key in keys)
        return sorted(path for path in paths if path != PROBE and not path.endswith("/"))

    # --- in the loop -------------------------------------------------------------------------------------------

    async def _create(self, path: str, data: bytes, sha256: str = "") -> bool:
        """One request; False where the name is taken."""
        try:
            await self._put(self._key(path), data, sha256, IfNoneMatch="*")
        except Refused as refused:
            if refused.failure.kind is Kind.TAKEN:
                return False
            raise
        return True

    async def _put(self, key: str, data: bytes, sha256: str = "", **condition: str) -> None:
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        await self._do(
            "put_object",
            Key=key,
            Body=data,
            ChecksumSHA256=base64.b64encode(bytes.fromhex(sha256)).decode(),
            Metadata={SHA256_KEY: sha256},
            size_bytes=len(data),
            **condition,
        )

    async def _head(self, key: str) -> dict[str, Any]:
        try:
            return await self._do("head_object", Key=key)
        except Refused as refused:
            if refused.failure.kind is Kind.MISSING:
                # HEAD has no body, so it does not tell a missing object from a missing bucket.
                await self._do("list_objects_v2", Prefix=key, MaxKeys=1)
            raise

    async def _read(self, key: str, offset: int, length: int | None) -> bytes:
        first = bytearray(min(RANGE_BYTES, RANGE_BYTES if length is None else length))
        found = await self._range(key, memoryview(first), offset)
        end = found.size_bytes if length is None else min(found.size_bytes, offset + length)
        if offset + found.count >= end:
            return bytes(memoryview(first)[: found.count])
        whole = bytearray(end - offset)
        whole[: found.count] = first
        rest = memoryview(whole)[found.count :]
        count = found.count + await self._fill(key, rest, offset + found.count)
        return bytes(memoryview(whole)[:count])

    async def _fill(self, key: str, target: memoryview, offset: int) -> int:
        """Ranges side by side; how many bytes there were."""
        begins = range(0, len(target), RANGE_BYTES)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    self._range(key, target[begin : begin + RANGE_BYTES], offset + begin)
                )
                for begin in begins
            ]
        return sum(task.result().count for task in tasks)

    async def _range(self, key: str, target: memoryview, offset: int) -> _Range:
        """Fill ``target`` as far as the file goes."""
        damaged = 0

        async def get(client: Any) -> _Range:
            nonlocal damaged
            asked = f"bytes={offset}-{offset + len(target) - 1}"
            response = await client.get_object(Bucket=self._bucket, Key=key, Range=asked)
            found = await _receive(response, target, offset)
            expected = response.get("Metadata", {}).get(SHA256_KEY)
            if expected and offset == 0 and found.count == found.size_bytes and not damaged:
                actual = await asyncio.to_thread(hashlib.sha256, target[: found.count])
                if actual.hexdigest() != expected:
                    damaged = 1  # twice the same is how it is stored, and for the caller to judge
                    raise Incomplete("other bytes arrived than were stored")
            return found

        async with loop_thread().download_slots:
            try:
                return await self._requests.send(get, size_bytes=len(target))
            except Refused as refused:
                if refused.failure.kind is Kind.UNSATISFIABLE:
                    return _Range(0, 0)
                raise

    async def _pages(self, operation: str, **request: Any) -> AsyncIterator[dict[str, Any]]:
        """The answers to a listing, one page after the other."""
        marks = _MARKS[operation]
        while True:
            page = await self._do(operation, **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request |= {asked: page[told] for asked, told in marks.items() if told in page}

    async def _list(self, prefix: str) -> Keys:
        keys: Keys = []
        async for page in self._pages("list_objects_v2", Prefix=prefix):
            keys += [one["Key"] for one in page.get("Contents", ())]
            if len(keys) > MAX_LISTED:
                raise StoreError(
                    f"{self._requests.name} has more than {MAX_LISTED} files; name a part of it in the URL."
                )
        return keys

    async def _delete(self, key: str) -> None:
        keys = await self._list(f"{key}/") or [key]
        for begin in range(0, len(keys), DELETED_AT_ONCE):
            some = [{"Key": one} for one in keys[begin : begin + DELETED_AT_ONCE]]
            answer = await self._do("delete_objects", Delete={"Objects": some, "Quiet": True})
            for error in answer.get("Errors", ()):
                raise StoreError(
                    f"{self._requests.name} at {self.place.told} did not delete {error.get('Key')!r}: "
                    f"{error.get('Code')}.",
                    path=str(error.get("Key")),
                )

    async def _abort_older(self, prefix: str, before: float) -> int:
        aborted = 0
        async for page in self._pages("list_multipart_uploads", Prefix=prefix):
            for one in page.get("Uploads", ()):
                if one["Initiated"].timestamp() > before:
                    continue
                upload = {"Key": one["Key"], "UploadId": one["UploadId"]}
                try:
                    await self._do("abort_multipart_upload", **upload)
                    aborted += 1
                except Refused as refused:
                    if refused.failure.kind not in (Kind.NO_UPLOAD, Kind.MISSING):
                        raise
        return aborted

    async def _do(self, operation: str, **request: Any) -> dict[str, Any]:
        return await self._requests.do(operation, Bucket=self._bucket, **request)

    # --- between threads and the loop --------------------------------------------------------------------------

    def _upload(self, path: str, views: Sequence[memoryview], size: int, sha256: str) -> bool:
        if exists(self, path):
            return False
        upload, at = self._new_upload(path, size, {SHA256_KEY: sha256}), 0
        try:
            for view in views:
                upload.write(at, view)
                at += len(view)
            upload.sync()
            return upload.publish()
        finally:
            upload.close()

    def _new_upload(self, path: str, size: int, metadata: dict[str, str] | None = None) -> Upload:
        key = self._key(path)
        self._prove()
        return Upload(
            self._requests,
            bucket=self._bucket,
            key=key,
            path=path,
            size_bytes=size,
            create=partial(self._create, path),
            metadata=metadata,
        )

    def _stored(self, path: str) -> Stored:
        """What is there already."""
        head = self._run("read", path, self._head(self._key(path)))
        sha256 = head.get("Metadata", {}).get(SHA256_KEY)
        if sha256 is None:  # a shard that was staged, or another tool's
            return read_stored(self, path)
        return Stored(int(head["ContentLength"]), sha256, created=False)

    def _prove(self) -> None:
        """Once per process: the server keeps ``If-None-Match``."""
        if not self._proven:
            self._run("write", PROBE, self._probe())
            self._proven = True

    async def _probe(self) -> None:
        created = [await self._create(PROBE, PROBE_CONTENT) for _ in range(2)]
        if created[1]:
            raise StoreError(
                f"{self._requests.name} at {self.place.told} ignores If-None-Match, so two writers could "
                "overwrite each other's checkpoints. Use a server that keeps it (AWS, or a current MinIO, Ceph or "
                "Garage).",
                path=PROBE,
            )

    def _run(self, action: str, path: str, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return loop_thread().run(work)
        except Refused as refused:
            raise self._requests.error(action, path, refused) from None
        except BaseExceptionGroup as group:
            for error in group.exceptions:
                if isinstance(error, Refused):
                    raise self._requests.error(action, path, error) from None
            raise group.exceptions[0] from None

    def _key(self, path: str) -> str:
        return self._prefix + check_path(path)


_MARKS = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {
        "KeyMarker": "NextKeyMarker",
        "UploadIdMarker": "NextUploadIdMarker",
    },
}
"""What a listing's next page is asked with, and where the page before tells it."""


async def _receive(response: dict[str, Any], target: memoryview, offset: int) -> _Range:
    """The bytes of an answer to a range.

    Raises:
        Incomplete: fewer came than were announced.
    """
    told = str(response.get("ContentRange", ""))
    size = int(told.rpartition("/")[2]) if told else int(response["ContentLength"])
    if not told and (offset or size > len(target)):
        raise StoreError("The server of the checkpoint store does not know ranges of files.")
    expected, count = min(len(target), max(0, size - offset)), 0
    async with response["Body"] as body:
        while count < expected:
            chunk = await body.read(min(READ_CHUNK_BYTES, expected - count))
            if not chunk:
                break
            target[count : count + len(chunk)] = chunk
            count += len(chunk)
        if count == expected:
            await body.read(1)  # the end, so that the connection may be used again
    if count < expected:
        raise Incomplete(f"its answer ended after {count} of {expected} bytes")
    return _Range(count, size)
