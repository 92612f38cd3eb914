"""The harness's end of the object store: starts ``chaos.object_server``, and tells it what the faults want of it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import msgspec

from chaos.object_server import BUCKET, Outage
from chaos.processes import environ_of

PORT = 9101
START_TIMEOUT_S = 60.0
TIMEOUT_S = 10.0
_PACKAGES = {"moto": "moto", "flask": "flask", "flask_cors": "flask-cors", "aiobotocore": "aiobotocore"}  # fmt: skip
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIACHAOS",
    "AWS_SECRET_ACCESS_KEY": "chaos",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_MISLEADING = ("aws_", "http_proxy", "https_proxy", "all_proxy")
"""Beginnings of variables that would lead a node to another server or account."""


class NoObjects(Exception):
    """The object store did not come up, or ended by itself."""


def missing_for_objects() -> str:
    """Why there can be no object store, with what helps; empty where there can."""
    missing = [pack for module, pack in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        return f"an object store needs {', '.join(missing)} (pip install 'distroml[dev]')"
    return ""


def with_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for nodes that are to use this object store, and no other."""
    kept = {k: v for k, v in environ.items() if not k.lower().startswith(_MISLEADING)}
    return kept | _CREDENTIALS


class ObjectStore:
    """One server, for one run.

    Args:
        mark: of the harness.
        host: address that all nodes reach.
        log_path: gets what it has to say.
    """

    def __init__(self, mark: str, host: str, log_path: Path) -> None:
        self.address = f"{host}:{PORT}"
        self._mark, self._host, self._log_path = mark, host, log_path
        self._process: asyncio.subprocess.Process | None = None
        self._outages: dict[int, Outage] = {}
        self._telling = asyncio.Lock()

    @property
    def url(self) -> str:
        """For the specification of a job."""
        return f"s3://{BUCKET}/runs?endpoint=http://{self.address}"

    async def start(self) -> None:
        """Until it serves.

        Raises:
            NoObjects: it does not.
        """
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chaos.object_server", self._host, str(PORT)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=environ_of(self._mark),
            )
        await self._answer(START_TIMEOUT_S)

    async def fail(self, fault: int, wanted: Outage) -> int:
        """Have it fail in this way, besides what other faults want; the number of requests that were struck before.

        Raises:
            NoObjects: it has ended.
        """
        self._outages[fault] = wanted
        return await self._tell()

    async def heal(self, fault: int) -> int:
        """This fault wants nothing any longer; the number of requests that were struck so far.

        Raises:
            NoObjects: it has ended.
        """
        return await self._tell() if self._outages.pop(fault, None) is not None else 0

    async def stop(self) -> None:
        """End it; nothing to do where that was done.

        Raises:
            NoObjects: it had ended by itself: what jobs met with then was no fault of the schedule.
        """
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            return
        if status:
            raise self._ended()

    async def _tell(self) -> int:
        """Shielded: a question without its answer would put all later ones out of step."""
        return await asyncio.shield(self._exchange())

    async def _exchange(self) -> int:
        async with self._telling:
            if self._process is None or self._process.stdin is None:
                raise self._ended()
            line = msgspec.json.encode(tuple(self._outages.values())) + b"\n"
            try:
                self._process.stdin.write(line)
                await self._process.stdin.drain()
            except ConnectionError:
                raise self._ended() from None
            return int(await self._answer(TIMEOUT_S))

    async def _answer(self, timeout_s: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise NoObjects(f"the object store did not answer within {timeout_s:g} s") from None
        if not line:
            raise self._ended()
        return line

    def _ended(self) -> NoObjects:
        with contextlib.suppress(OSError):
            if told := self._log_path.read_text(errors="replace").splitlines():
                return NoObjects(f"the object store has ended: {told[-1]}")
        return NoObjects("the object store has ended")
