"""A checkpoint's way to S3 beside a bare aiobotocore multipart upload of as many bytes to the same server.

The server is moto, in a process of its own: it is written in Python and slow, and both players wait for it.
So this shows that the store adds nothing of weight to the upload; it does not show what it reaches on a fast network. Both have
the same priority here; in a worker ours has a lower one than training, on purpose, and is slower where cores are short.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.processes import Broken
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint import priority
from distroml.runtime.checkpoint.shard_file import TensorBytes
from distroml.runtime.checkpoint.stores.s3 import S3Store
from distroml.runtime.checkpoint.writer import ShardIdentity, ShardWriter
from distroml.store_urls import StoreSettings, parse_store

BUCKET = "bench"
PART_BYTES = 16 * 1024 * 1024
IN_FLIGHT = 8
START_TIMEOUT_S = 60.0
_KEYS = ("bench", "bench-secret")


class Uploads:
    """Both players, with one state in memory.

    Args:
        place: for the file with credentials.
    """

    def __init__(self, endpoint: str, place: Path, size_bytes: int) -> None:
        self._endpoint = endpoint
        priority.NICENESS = 0
        credentials = place / "credentials"
        credentials.touch(0o600)
        credentials.write_text(
            f"[default]\naws_access_key_id = {_KEYS[0]}\naws_secret_access_key = {_KEYS[1]}\n"
        )
        url = parse_store(f"s3://{BUCKET}/ours?endpoint={endpoint}", "store")
        self.store = S3Store(url, StoreSettings(s3_credentials_file=str(credentials)))
        count = max(1, size_bytes // PART_BYTES)
        self._state = memoryview(bytearray(os.urandom(PART_BYTES) * count))
        self.size_bytes = len(self._state)
        self._facts: list[ShardFact] = []
        self._problems: list[str] = []
        self._writer = ShardWriter(
            self.store,
            lambda _, fact: self._facts.append(fact),
            lambda _, step, reason: self._problems.append(reason),
        )

    def ours(self, step: int) -> float:
        """Seconds until a shard of the state is durable, each piece hashed for the manifest as well."""
        tensors = [
            TensorBytes(
                f"model.{begin}", "F32", (PART_BYTES // 4,), self._state[begin : begin + PART_BYTES]
            )
            for begin in range(0, self.size_bytes, PART_BYTES)
        ]
        me = ShardIdentity(
            job_id="bench",
            run_id="run",
            generation=1,
            rank=0,
            world_size=1,
            strategy="data_parallel",
            backend="gloo",
        )
        began = time.perf_counter()
        self._writer.write(me, step, DataCursor(0, step), tensors, {})
        self._writer.wait()
        seconds = time.perf_counter() - began
        if self._problems:
            raise Broken(self._problems[0])
        self.store.delete("bench")
        return seconds

    async def bare(self, number: int) -> float:
        """Seconds of a multipart upload with the library's own settings."""
        async with self._client() as client:
            key = f"bare/{number}"
            free = asyncio.Semaphore(IN_FLIGHT)

            async def send(part: int) -> dict[str, Any]:
                async with free:
                    begin = (part - 1) * PART_BYTES
                    data = bytes(self._state[begin : begin + PART_BYTES])
                    told = await client.upload_part(
                        Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=part, Body=data
                    )
                    return {"PartNumber": part, "ETag": told["ETag"]}

            began = time.perf_counter()
            upload = (await client.create_multipart_upload(Bucket=BUCKET, Key=key))["UploadId"]
            numbers = range(1, self.size_bytes // PART_BYTES + 1)
            parts = await asyncio.gather(*(send(part) for part in numbers))
            await client.complete_multipart_upload(
                Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
            seconds = time.perf_counter() - began
            await client.delete_object(Bucket=BUCKET, Key=key)
            return seconds

    async def make_bucket(self) -> None:
        async with self._client() as client:
            await client.create_bucket(Bucket=BUCKET)

    def _client(self) -> Any:
        from aiobotocore.session import get_session

        return get_session().create_client(
            "s3",
            endpoint_url=self._endpoint,
            region_name="us-east-1",
            aws_access_key_id=_KEYS[0],
            aws_secret_access_key=_KEYS[1],
        )


@asynccontextmanager
async def uploads(place: Path, size_bytes: int) -> AsyncIterator[Uploads]:
    """Both players and a server of their own."""
    with _free_port() as port:
        pass
    with (place / "moto.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), stdout=log, stderr=log
        )  # fmt: skip
        try:
            await _until_it_listens(server, port)
            made = Uploads(f"http://127.0.0.1:{port}", place, size_bytes)
            await made.make_bucket()
            yield made
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()
            await server.wait()


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


async def _until_it_listens(server: asyncio.subprocess.Process, port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.returncode is not None:
            raise Broken("moto did not start; is the extra 'dev' installed?")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise Broken(f"moto did not listen within {START_TIMEOUT_S:g} s")
