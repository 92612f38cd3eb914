"""Three processes of ``bench.raft_member``: consensus alone, with real links, logs and fsync."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import msgspec

from bench.http_load import Load
from bench.processes import Broken, die_with_parent, tail, within
from bench.raft_member import MAX_LINE_BYTES, Answer, Ask
from distroml.local_cluster import free_ports

NAMES = ("a", "b", "c")
START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 45.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
ATTEMPTS = 3


class RaftTrio:
    """``async with RaftTrio(directory) as trio: load = await trio.load(256, 3.0)``."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        ports = free_ports(len(NAMES))
        self._peers = ",".join(f"{n}=127.0.0.1:{p}" for n, p in zip(NAMES, ports, strict=True))
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.leaders_lost = 0
        """How often a leader did not lead any more at the end of its load."""

    async def __aenter__(self) -> RaftTrio:
        try:
            for name in NAMES:
                self.processes[name] = await self._start(name)
            async with within(START_TIMEOUT_S, "three members to know each other"):
                for name in NAMES:
                    await self._ask(name, Ask())  # answered once it is registered
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _start(self, name: str) -> asyncio.subprocess.Process:
        arguments = ["-m", "bench.raft_member", name, self._peers, str(self._directory / name)]
        with self._log(name).open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=MAX_LINE_BYTES,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    async def _end(self) -> None:
        """The end of their input tells them; SIGKILL whoever does not hear."""
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
        try:
            ends = [asyncio.create_task(process.wait()) for process in self.processes.values()]
            if ends:
                await asyncio.wait(ends, timeout=STOP_TIMEOUT_S)
        finally:
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        for process in self.processes.values():
            await process.wait()

    async def leader(self) -> str:
        """The name of the member that leads, once one does."""
        while True:
            for name in NAMES:
                if (await self._ask(name, Ask())).leads:
                    return name
            await asyncio.sleep(POLL_S)

    async def load(self, clients: int, seconds: float) -> Load:
        """A closed loop of proposals in the leader's process; once more if leadership changed meanwhile.

        Raises:
            Broken: the leader changed ``ATTEMPTS`` times, or a member ended.
        """
        for _ in range(ATTEMPTS):
            name = await self.leader()
            async with within(seconds + ANSWER_TIMEOUT_S, f"the load of {clients} clients"):
                answer = await self._ask(name, Ask(clients, seconds))
            if answer.leads and answer.load is not None:
                return answer.load
            self.leaders_lost += 1
        raise Broken(f"{ATTEMPTS} leaders in turn lost leadership under {clients} clients")

    async def _ask(self, name: str, ask: Ask) -> Answer:
        process = self.processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(ask) + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise Broken(
                f"member {name} ended: {tail(self._log(name).read_text(errors='replace'))}"
            )
        return msgspec.json.decode(line, type=Answer)

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"
