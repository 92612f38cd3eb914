"""Three members of etcd on loopback: the peer of everything that is about consensus.

Driven over the HTTP/JSON gateway of their client ports (``/v3/kv/put``), which etcd serves by itself.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.http_load import Endpoint, post
from bench.processes import Broken, die_with_parent, end, tail
from distroml.local_cluster import free_ports

PROGRAM = "etcd"
HOW_TO_GET = (
    "etcd is not installed, so there is no peer but the disk; "
    "install Debian's package (apt-get install etcd-server) or put an etcd of your own on PATH"
)
PUT = "/v3/kv/put"
MEMBERS = ("m0", "m1", "m2")
VALUE_BYTES = 256
KEYS = 1000
"""Distinct keys that are written in turn; etcd keeps the revisions."""
START_TIMEOUT_S = 20.0
POLL_S = 0.02
CALL_TIMEOUT_S = 2.0


def installed() -> bool:
    """Whether there is an etcd to compare with."""
    return shutil.which(PROGRAM) is not None


def version() -> str:
    """Such as ``etcd 3.4.23``."""
    told = subprocess.run(
        [PROGRAM, "--version"], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=True
    ).stdout
    return f"etcd {told.partition('etcd Version:')[2].split()[0]}"


def puts() -> Callable[[], bytes]:
    """Makes the requests of a load: ``VALUE_BYTES`` random bytes under one key after another."""
    numbers = itertools.count()

    def request() -> bytes:
        return put_request(f"key-{next(numbers) % KEYS}", os.urandom(VALUE_BYTES))

    return request


def put_request(key: str, value: bytes) -> bytes:
    """One write over the gateway."""
    return post(PUT, _json(_pair(key, value)))


class EtcdCluster:
    """``async with EtcdCluster(directory) as etcd: ...``; leaving ends all members, whatever happened.

    All settings are etcd's own defaults but for addresses and directories: fsync is on, heartbeats come each 100 ms,
    and elections begin after 1000 ms.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        ports = free_ports(2 * len(MEMBERS))
        self.ports = dict(zip(MEMBERS, ports, strict=False))
        """Where clients reach each member."""
        self._peer_ports = dict(zip(MEMBERS, ports[len(MEMBERS) :], strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    async def __aenter__(self) -> EtcdCluster:
        try:
            for name in MEMBERS:
                self.start(name)
            await self.leader()
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes.values():
            end(process)

    def endpoints(self) -> list[Endpoint]:
        return [("127.0.0.1", port) for port in self.ports.values()]

    def start(self, name: str) -> None:
        """Start a member, for the first time or again."""
        client = f"http://127.0.0.1:{self.ports[name]}"
        peer = f"http://127.0.0.1:{self._peer_ports[name]}"
        everyone = ",".join(f"{one}=http://127.0.0.1:{at}" for one, at in self._peer_ports.items())
        arguments = [PROGRAM, "--name", name, "--data-dir", str(self._directory / name)]
        arguments += ["--listen-client-urls", client, "--advertise-client-urls", client]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", everyone]
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def kill(self, name: str) -> None:
        """SIGKILL; ``reap`` before it is started again."""
        self._processes[name].send_signal(signal.SIGKILL)

    def reap(self, name: str) -> None:
        self._processes[name].wait()

    async def leader(self) -> str:
        """The member that all members say leads.

        Raises:
            Broken: they do not agree within ``START_TIMEOUT_S``, or one has ended.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    output = self._log(name).read_text(errors="replace")
                    raise Broken(f"etcd {name} ended with {process.returncode}: {tail(output)}")
            answers = [await asyncio.to_thread(self._status, name) for name in MEMBERS]
            ids = {answer["header"]["member_id"]: n for n, answer in zip(MEMBERS, answers, strict=True) if answer}  # fmt: skip
            leaders = {answer.get("leader") for answer in answers if answer}
            if len(ids) == len(MEMBERS) and len(leaders) == 1 and (only := leaders.pop()) in ids:
                return ids[only]
            await asyncio.sleep(POLL_S)
        raise Broken(f"the members of etcd did not agree on a leader in {START_TIMEOUT_S:g} s")

    def _status(self, name: str) -> dict[str, Any] | None:
        return self.call(name, "/v3/maintenance/status", {})

    def call(self, name: str, path: str, document: Mapping[str, Any]) -> dict[str, Any] | None:
        """One blocking request to one member; None where it does not answer with success."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[name]}{path}", data=_json(document)
        )
        try:
            with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
                return dict(json.load(answer))
        except (OSError, ValueError):
            return None

    def put(self, name: str, key: str, value: bytes) -> bool:
        """One blocking write at one member: whether it was acknowledged."""
        return self.call(name, PUT, _pair(key, value)) is not None

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _pair(key: str, value: bytes) -> dict[str, str]:
    return {"key": _base64(key.encode()), "value": _base64(value)}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
