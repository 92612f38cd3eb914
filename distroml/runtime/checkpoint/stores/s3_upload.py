"""A file on its way to S3, piece by piece in any order.

A part is sent as soon as it is complete; ``LoopThread.upload_slots`` says how many may be held, so ``write`` waits where the
network is slower than the writer. What has a size of one part or less becomes one request at ``publish``. Nothing is visible
before ``publish``; what was sent is aborted if that is never reached, and by ``remove_orphans`` if this process dies.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.interface import Buffer
from distroml.runtime.checkpoint.stores.loop_thread import loop_thread
from distroml.runtime.checkpoint.stores.parts import PART_BYTES, Parts
from distroml.runtime.checkpoint.stores.s3_client import Refused, Requests
from distroml.runtime.checkpoint.stores.s3_errors import Kind

_T = TypeVar("_T")


class Upload:
    """One file; ``close`` must be called.

    Args:
        key: of the object.
        path: the same, for errors.
        create: makes the object of a small file's bytes; False where there is one.
        metadata: of the object of a large one.
    """

    def __init__(
        self,
        requests: Requests,
        *,
        bucket: str,
        key: str,
        path: str,
        size_bytes: int,
        create: Callable[[bytes], Coroutine[Any, Any, bool]],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self._requests, self._path, self._create = requests, path, create
        self._object = {"Bucket": bucket, "Key": key}
        self._metadata = metadata or {}
        self._thread = loop_thread()
        self._parts = Parts(size_bytes)
        self._whole: bytes | None = None
        """All of a small file, once it is complete."""
        self._lock = threading.Lock()
        self._upload_id = ""
        self._sending: list[Future[dict[str, Any]]] = []
        self._failed: Future[dict[str, Any]] | None = None

    def write(self, offset: int, data: Buffer) -> None:
        """Take ``data``, and send each part that it completes; waits for a slot."""
        try:
            complete = self._parts.add(offset, data)
        except ValueError as error:
            raise StoreError(f"{self._path!r} cannot be written: {error}.") from None
        for number, pieces in complete:
            if self._parts.size_bytes <= PART_BYTES:
                self._whole = b"".join(pieces)
            else:
                self._begin()
                self._send(number, pieces)

    def sync(self) -> None:
        """Return when all parts are at the server."""
        if self._parts.size_bytes == 0:
            self._whole = b""
        if self._parts.missing_bytes:
            raise StoreError(
                f"{self._path!r} cannot be written: {self._parts.missing_bytes} bytes of it never came."
            )
        for future in self._sending:
            self._result(future)

    def publish(self) -> bool:
        """Make the object of its parts; False where there is one by that name."""
        if self._whole is not None:
            return self._result(self._thread.submit(self._create(self._whole)))
        parts = [self._result(future) for future in self._sending]
        created = self._result(self._thread.submit(self._complete(parts)))
        if created:
            self._upload_id = ""
        return created

    def close(self) -> None:
        """Abort what was not published, as well as that can be done now."""
        for future in self._sending:
            future.cancel()
        wait(self._sending)
        if self._upload_id:
            request = self._do("abort_multipart_upload", UploadId=self._upload_id)
            with contextlib.suppress(Refused, StoreError):
                self._thread.run(request)

    # --- parts -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Have an upload, before the first part is sent."""
        with self._lock:
            if not self._upload_id:
                request = self._do(
                    "create_multipart_upload", ChecksumAlgorithm="SHA256", Metadata=self._metadata
                )
                self._upload_id = self._result(self._thread.submit(request))["UploadId"]

    def _send(self, number: int, pieces: list[memoryview]) -> None:
        slots = self._thread.upload_slots
        slots.acquire()
        try:
            if self._failed is not None:
                self._result(self._failed)
            data = b"".join(pieces)
            future = self._thread.submit(self._send_part(number, data, _sha256(data)))
        except BaseException:
            slots.release()
            raise
        future.add_done_callback(self._sent)
        with self._lock:
            self._sending.append(future)

    def _sent(self, future: Future[dict[str, Any]]) -> None:
        self._thread.upload_slots.release()
        if not future.cancelled() and future.exception() is not None:
            self._failed = future

    async def _send_part(self, number: int, data: bytes, sha256: str) -> dict[str, Any]:
        answer = await self._do(
            "upload_part",
            UploadId=self._upload_id,
            PartNumber=number,
            Body=data,
            ChecksumSHA256=sha256,
            size_bytes=len(data),
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": sha256}

    # --- the end -----------------------------------------------------------------------------------------------

    async def _complete(self, parts: list[dict[str, Any]]) -> bool:
        ordered = sorted(parts, key=lambda part: int(part["PartNumber"]))
        try:
            await self._do(
                "complete_multipart_upload",
                UploadId=self._upload_id,
                MultipartUpload={"Parts": ordered},
                IfNoneMatch="*",
            )
        except Refused as refused:
            if refused.failure.kind is Kind.TAKEN:
                return False
            # Where the answer to an earlier attempt was lost the object is there, and the caller looks at it.
            if refused.failure.kind is Kind.NO_UPLOAD and await self._exists():
                return False
            raise
        return True

    async def _exists(self) -> bool:
        try:
            await self._do("head_object")
        except Refused as refused:
            if refused.failure.kind is Kind.MISSING:
                return False
            raise
        return True

    async def _do(self, operation: str, *, size_bytes: int = 0, **request: Any) -> dict[str, Any]:
        request |= self._object
        return await self._requests.do(operation, size_bytes=size_bytes, **request)

    def _result(self, future: Future[_T]) -> _T:
        try:
            return future.result()
        except Refused as refused:
            raise self._requests.error("write", self._path, refused) from None
        except BaseException:
            future.cancel()
            raise


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
