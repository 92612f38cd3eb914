"""Processes that play a part in a measurement and take orders: JSON lines in, one JSON line out for each.

A part is ``python -m bench.NAME ARGUMENTS``: ``Player`` starts and asks it, ``take_orders`` is its own main loop. It
ends with its standard input, so that none outlives the benchmark.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.processes import Broken, die_with_parent, tail, within

LINE_BYTES = 64 * 1024 * 1024
"""One answer may hold every single measured time."""
STOP_TIMEOUT_S = 10.0

Order = Callable[..., Awaitable[Any]]


class Player:
    """A started part."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self._name, self._process, self._log_path = name, process, log_path

    async def ask(self, order: str, timeout_s: float = 30.0, **arguments: Any) -> Any:
        """Give an order and return what came of it.

        Raises:
            Broken: it failed, ended or took too long; with the end of the part's log.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        async with within(timeout_s, f"{self._name}: {order}"):
            stdin.write(msgspec.json.encode([order, arguments]) + b"\n")
            answer = await stdout.readline()
        if not answer:
            said = tail(self._log_path.read_text(errors="replace"))
            raise Broken(f"{self._name} ended instead of answering '{order}': {said}")
        error, result = msgspec.json.decode(answer)
        if error:
            raise Broken(f"{self._name}: {order}: {error}")
        return result


@asynccontextmanager
async def playing(module: str, arguments: Sequence[str], log_path: Path) -> AsyncIterator[Player]:
    """The part ``bench.MODULE`` while the context lasts; asked to end, then killed."""
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"bench.{module}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=LINE_BYTES,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        yield Player(module, process, log_path)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def take_orders(orders: Mapping[str, Order]) -> None:
    """Obey until standard input ends; a failed order is answered with its error."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        order, arguments = msgspec.json.decode(line)
        error, result = "", None
        try:
            result = await orders[order](**arguments)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        sys.stdout.buffer.write(msgspec.json.encode([error, result]) + b"\n")
        sys.stdout.buffer.flush()
