"""The object store of a run: down, slow and failing as the faults want, whole again afterwards, and gone in the end."""

from __future__ import annotations

import asyncio
import http.client
import math
import os
import random
import socket
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from chaos import __main__ as commands
from chaos import objects
from chaos.__main__ import NOTHING, main
from chaos.cluster import Cluster
from chaos.faults import INFLICT
from chaos.faults import store as store_faults
from chaos.faults import strike as strikes
from chaos.faults.strike import Strike, Unfit
from chaos.kinds import KINDS, Need
from chaos.object_server import REFUSED, RESET, FailingProxy, Outage, harm_by
from chaos.objects import NoObjects, ObjectStore, missing_for_objects, with_credentials
from chaos.processes import marked, own_mark
from chaos.schedule import Planned
from chaos.specs import FILE, OBJECTS, TRAINED, kept_in, spec_of
from chaos.workload import in_turns
from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores import retrying
from distroml.runtime.checkpoint.stores.parts import PART_BYTES
from distroml.runtime.checkpoint.stores.s3 import S3Store
from distroml.spec import convert_spec
from distroml.store_urls import LOCAL, StoreSettings, parse_store

TIMEOUT_S = 20.0
NEVER_S = 1000.0
HOST = f"127.0.{os.getpid() % 250 + 1}.253"
OUTAGES = st.builds(
    Outage,
    down=st.sampled_from(("", "", REFUSED, RESET)),
    delay_s=st.sampled_from((0.0, 0.2, 5.0)),
    errors=st.sampled_from((0.0, 0.3, 1.0)),
)
CHANCES = st.floats(0, 1, exclude_max=True)
needs_objects = pytest.mark.skipif(bool(missing_for_objects()), reason=missing_for_objects())


# --- what becomes of a request --------------------------------------------------------------------------------------


@given(st.lists(OUTAGES, max_size=3), CHANCES, CHANCES)
def test_a_request_suffers_from_all_outages_together(
    outages: list[Outage], chance: float, pick: float
) -> None:
    harm = harm_by(outages, chance, pick)

    passes = math.prod(1 - one.errors for one in outages)
    delay_s = max((one.delay_s for one in outages), default=0.0)
    if any(one.down for one in outages):
        assert harm is not None
        assert harm.reset == "request"
    elif chance >= passes:
        assert harm is not None
        assert harm.answer or harm.reset or harm.cut
        assert harm.delay_s == delay_s
    elif delay_s:
        assert harm is not None
        assert (harm.answer, harm.reset, harm.cut) == (None, "", None)
        assert harm.delay_s == delay_s
    else:
        assert harm is None


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent, and counts."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_PUT(self) -> None:
        type(self).asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[FailingProxy]:
    Echo.asked = 0
    server = ThreadingHTTPServer((HOST, 0), Echo)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    made = FailingProxy("http://{}:{}".format(*server.server_address[:2]))
    yield made
    made.close()
    server.shutdown()
    server.server_close()


def connected(proxy: FailingProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=TIMEOUT_S)


def put(connection: http.client.HTTPConnection, body: bytes = b"some bytes") -> tuple[int, bytes]:
    connection.request("PUT", "/a", body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_without_outages_everything_passes(proxy: FailingProxy) -> None:
    assert put(connected(proxy)) == (200, b"some bytes")
    assert proxy.struck == 0


@pytest.mark.parametrize("how", [REFUSED, RESET])
def test_one_that_is_down_comes_back_at_the_same_address(proxy: FailingProxy, how: str) -> None:
    before = connected(proxy)
    assert put(before) == (200, b"some bytes")

    proxy.suffer([Outage(down=how)])

    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        put(before)
    with pytest.raises(ConnectionRefusedError if how == REFUSED else ConnectionResetError):
        put(connected(proxy))
    assert Echo.asked == 1
    proxy.suffer([Outage(down=how)])  # told again
    proxy.suffer([])
    assert put(connected(proxy)) == (200, b"some bytes")


def test_a_slow_one_answers_at_last(proxy: FailingProxy) -> None:
    proxy.suffer([Outage(delay_s=0.3)])
    assert put(connected(proxy)) == (200, b"some bytes")
    assert proxy.struck == 1

    proxy.suffer([Outage(delay_s=NEVER_S)])
    connection = connected(proxy)
    connection.request("PUT", "/a", b"held back")
    connection.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        connection.sock.recv(1)
    connection.sock.settimeout(TIMEOUT_S)

    proxy.suffer([])

    assert connection.getresponse().read() == b"held back"


def test_a_failing_one_fails_in_each_way(proxy: FailingProxy) -> None:
    proxy.suffer([Outage(errors=1.0)])
    seen: Counter[tuple[str, bool]] = Counter()
    while len(seen) < 5 and seen.total() < 1000:
        seen[_what_comes_of_one(proxy)] += 1
    assert seen.keys() == {
        ("503", False),
        ("500", False),
        ("reset", False),
        ("reset", True),
        ("cut short", True),
    }
    assert proxy.struck == seen.total()


def _what_comes_of_one(proxy: FailingProxy) -> tuple[str, bool]:
    """What the client sees, and whether the server did it."""
    before = Echo.asked
    try:
        told = str(put(connected(proxy), b"x" * 100)[0])
    except http.client.IncompleteRead:
        told = "cut short"
    except OSError:
        told = "reset"
    return told, Echo.asked > before


def test_half_of_a_request_has_no_effect(proxy: FailingProxy) -> None:
    address = urlsplit(proxy.url)
    with socket.create_connection((str(address.hostname), address.port or 0), TIMEOUT_S) as sender:
        sender.sendall(b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        sender.shutdown(socket.SHUT_WR)
        assert sender.recv(1) == b""
    assert Echo.asked == 0


# --- the process ----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ObjectStore]:
    made = ObjectStore(own_mark(), HOST, tmp_path / "object-server.log")
    await made.start()
    yield made
    try:
        await made.stop()
    except NoObjects:
        assert not list(marked(own_mark()))


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """The product's end, with the environment that nodes get, and with little patience."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in with_credentials({}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retrying, "MAX_PAUSE_S", 0.05)
    url = ObjectStore("", HOST, Path()).url
    return S3Store(parse_store(url, "store"), StoreSettings())


@needs_objects
async def test_a_store_loses_nothing_by_what_it_suffers(
    server: ObjectStore, product: S3Store
) -> None:
    large = random.Random(1).randbytes(PART_BYTES + 1000)
    await asyncio.to_thread(product.put_if_absent, "before", [b"kept"])

    struck = await server.fail(1, Outage(down=REFUSED))
    await server.fail(2, Outage(down=RESET))
    assert struck == 0
    with pytest.raises(StoreError, match="Tried 8 times"):
        await asyncio.to_thread(product.read, "before")
    await server.heal(1)
    with pytest.raises(StoreError, match="Tried 8 times"):
        await asyncio.to_thread(product.put_if_absent, "never", [b"x"])
    assert await server.heal(2) >= 8
    assert await server.heal(2) == 0

    await server.fail(3, Outage(errors=0.3))
    written = await asyncio.to_thread(product.put_if_absent, "large", [large])
    await server.heal(3)

    assert written.size_bytes == len(large)
    assert await asyncio.to_thread(product.read, "large") == large
    assert await asyncio.to_thread(product.read, "before") == b"kept"
    assert await asyncio.to_thread(product.list, "") == ["before", "large"]


@needs_objects
async def test_it_is_gone_when_it_was_stopped(server: ObjectStore) -> None:
    assert len(list(marked(own_mark()))) == 1

    await server.stop()

    assert list(marked(own_mark())) == []
    await server.stop()


@needs_objects
async def test_one_that_ends_by_itself_is_told(server: ObjectStore) -> None:
    (process,) = marked(own_mark())
    process.kill()

    with pytest.raises(NoObjects):
        await server.fail(1, Outage(delay_s=1.0))
    with pytest.raises(NoObjects):
        await server.stop()


@needs_objects
async def test_an_address_that_is_taken_is_told(server: ObjectStore, tmp_path: Path) -> None:
    second = ObjectStore(own_mark(), HOST, tmp_path / "second.log")

    with pytest.raises(NoObjects, match="in use"):
        await second.start()


# --- the faults -----------------------------------------------------------------------------------------------------


class StubObjects:
    """Knows what is wrong."""

    url = "s3://chaos/runs"

    def __init__(self) -> None:
        self.outages: dict[int, Outage] = {}
        self.struck = 5

    async def fail(self, fault: int, wanted: Outage) -> int:
        self.outages[fault] = wanted
        return self.struck

    async def heal(self, fault: int) -> int:
        del self.outages[fault]
        return self.struck


class StubCluster:
    without_objects = "moto is not there"

    def __init__(self, found: StubObjects | None) -> None:
        self.objects = found
        self.nodes = {"a": None, "b": None}

    def clock(self) -> float:
        return 1.0


def strike(found: StubObjects | None, kind: str, *stores: str, **choices: Any) -> Strike:
    planned = Planned(at_s=1.0, kind=kind, lasts_s=1.0, choices=choices)
    made = Strike(cast(Cluster, StubCluster(found)), planned, 7)

    async def active_jobs() -> list[dict[str, Any]]:
        return [{"spec": {"checkpointing": {"store": store}}} for store in stores]

    made.active_jobs = active_jobs  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(
    ("kind", "choices", "wanted"),
    [
        ("s3-down", {"how": "refused"}, Outage(down=REFUSED)),
        ("s3-down", {"how": "reset"}, Outage(down=RESET)),
        ("s3-slow", {"delay_s": 5.0}, Outage(delay_s=5.0)),
        ("s3-errors", {"share": 0.7}, Outage(errors=0.7)),
    ],
)
async def test_a_fault_hits_all_nodes_and_is_taken_back(
    kind: str, choices: dict[str, Any], wanted: Outage
) -> None:
    found = StubObjects()

    done = await INFLICT[kind](strike(found, kind, LOCAL, StubObjects.url, **choices))

    assert found.outages == {7: wanted}
    assert done.nodes == ("a", "b")
    found.struck += 37
    assert done.take_back is not None
    assert await done.take_back() == "37 requests were struck meanwhile"
    assert found.outages == {}


async def test_a_fault_that_would_hit_no_job_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strikes, "FIND_TIMEOUT_S", 0.05)
    found = StubObjects()

    with pytest.raises(Unfit, match="no job now whose checkpoints are in the object store"):
        await INFLICT["s3-down"](strike(found, "s3-down", LOCAL, how="reset"))
    with pytest.raises(Unfit, match="moto is not there"):
        await INFLICT["s3-down"](strike(None, "s3-down", how="reset"))

    assert found.outages == {}


def test_every_choice_of_every_kind_is_an_outage() -> None:
    kinds = [kind for kind in KINDS if Need.OBJECTS in kind.needs]
    assert {kind.name for kind in kinds} == {"s3-down", "s3-slow", "s3-errors"}
    for kind in kinds:
        ((name, options),) = kind.choices.items()
        for option in options:
            made = store_faults._OUTAGES[kind.name](strike(None, kind.name, **{name: option}))
            assert harm_by([made], 0.99, 0.5) is not None


# --- without it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_moto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "find_spec", lambda name: None if name == "moto" else find_spec(name))  # fmt: skip


def _asked(*words: str) -> Namespace:
    return commands._parser().parse_args(["run", "--no-namespaces", *words])


@pytest.mark.usefixtures("without_moto")
def test_without_moto_the_faults_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--no-namespaces", "--faults", "s3-down,worker-kill"]) == NOTHING
    assert "s3-down cannot be inflicted here: an object store needs moto" in capsys.readouterr().err


@pytest.mark.usefixtures("without_moto")
async def test_without_moto_the_others_are_played_and_it_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usable = await commands._usable(_asked("--faults", "store,worker-kill"))

    assert {"store-down", "worker-kill"} <= {kind.name for kind in usable}
    assert not any(kind.name.startswith("s3-") for kind in usable)
    told = capsys.readouterr().err
    assert "left out: s3-down: an object store needs moto" in told
    assert "no job keeps its checkpoints in s3://: an object store needs moto" in told
    assert set(Cluster(tmp_path, namespaces=False).stores) == {FILE}


def test_jobs_are_spread_over_the_stores_that_there_are() -> None:
    stores = {FILE: "file:///somewhere", OBJECTS: "s3://chaos/runs?endpoint=http://127.0.0.1:1"}
    for among in ({}, {FILE: stores[FILE]}, stores):
        specs = {name: convert_spec(spec_of(name, among)) for name in TRAINED}
        used = Counter(spec.checkpointing.store for spec in specs.values())
        assert used.keys() == {LOCAL, *among.values()}
        assert all(count >= 1 for count in used.values())
        if OBJECTS in among:
            on_objects = [s for s in specs.values() if s.checkpointing.store == stores[OBJECTS]]
            assert {spec.resources.workers for spec in on_objects} == {1, 2}


@given(st.integers(0, 1000), st.sampled_from(((), kept_in(OBJECTS), ("elsewhere",))))
def test_jobs_take_turns(seed: int, first: tuple[str, ...]) -> None:
    names = tuple(TRAINED)
    drawn = list(islice(in_turns(names, random.Random(seed), first), 4 * len(names)))
    rounds = [drawn[at : at + len(names)] for at in range(0, len(drawn), len(names))]
    assert all(set(one) == set(names) for one in rounds)
    assert drawn[0] in first or not set(first) & set(names)


def test_nodes_are_not_led_to_another_store() -> None:
    environ = {"AWS_PROFILE": "own", "AWS_ENDPOINT_URL": "x", "https_proxy": "x", "HOME": "/root"}
    made = with_credentials(environ)
    assert made.keys() == {*with_credentials({}), "HOME"}
