"""The client against small servers: failover, exactly-once writes, errors, streams."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from aiohttp import web

from distroml import errors
from distroml.client import AsyncClient, Client
from distroml.client_transport import error_from_problem
from distroml.errors import DistroMLError, all_kinds
from distroml.failover import DEFAULT_URL
from distroml.spec import JobSpec
from tests.fake_nodes import Answer, FakeNode, dies, dying_node, fake_nodes, problem, says

REFUSED = "http://127.0.0.1:1"
"""Port 1: nothing listens there."""
JOB = {"job_id": "job-1", "name": "n", "status": "RUNNING"}


def client_of(*nodes: FakeNode | str, timeout_s: float = 10.0) -> AsyncClient:
    return AsyncClient([n if isinstance(n, str) else n.url for n in nodes], timeout_s=timeout_s)


async def test_moves_on_from_a_node_that_is_gone_and_stays_with_the_one_that_answers() -> None:
    async with fake_nodes(says({"jobs": []})) as (b,), client_of(REFUSED, b) as client:
        assert await client.jobs() == {"jobs": []}
        assert await client.jobs(status="RUNNING", limit=5) == {"jobs": []}
        assert [asked[2] for asked in b.asked] == [{}, {"status": "RUNNING", "limit": "5"}]


async def test_a_write_keeps_its_key_when_a_node_dies_in_the_middle() -> None:
    async with fake_nodes(dies, says(JOB, 201)) as (a, b), client_of(a, b) as client:
        assert await client.submit(JobSpec(name="n")) == JOB
        assert len(a.keys) == len(b.keys) == 1
        assert a.keys == b.keys
        assert a.keys[0]
        await client.submit({"name": "n"})
        assert b.keys[1] != b.keys[0]
        assert b.asked[1][4] == b'{"name":"n"}'


async def test_a_write_that_was_sent_before_the_node_died_may_have_happened() -> None:
    """The library sends it anew by itself, and is refused then."""
    async with dying_node() as url, client_of(url, timeout_s=1.0) as client:
        await client.jobs()
        with pytest.raises(errors.OutcomeUnknown):
            await client.remove_checkpoint("job-1", 10)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_moves_on_from_a_node_that_cannot_serve_now(status: int) -> None:
    busy = problem("unavailable", status, "no leader")
    async with fake_nodes(busy, says(JOB)) as (a, b), client_of(a, b) as client:
        assert await client.job("job-1") == JOB
        assert len(a.asked) == 1


async def test_no_leader_for_a_while_is_sat_out() -> None:
    turns = iter([503, 503, 503, 200])

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(JOB, status=next(turns))

    async with fake_nodes(answer) as (a,), client_of(a) as client:
        assert await client.stop("job-1") == JOB
        assert len(set(a.keys)) == 1
        assert len(a.keys) == 4


async def test_a_silent_node_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distroml.client_transport.IDLE_TIMEOUT_S", 0.05)
    release = asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.Response()

    async with fake_nodes(silent, says(JOB)) as (a, b), client_of(a, b) as client:
        assert await client.job("job-1") == JOB
        release.set()


async def test_unavailable_names_all_urls() -> None:
    other = "http://127.0.0.1:2"
    async with client_of(REFUSED, other) as client:
        with pytest.raises(errors.Unavailable) as caught:
            await client.nodes()
    assert REFUSED in caught.value.detail
    assert other in caught.value.detail
    assert not isinstance(caught.value, errors.OutcomeUnknown)


async def test_a_write_that_may_have_happened_says_so_with_its_key() -> None:
    async with fake_nodes(dies) as (a,), client_of(a, timeout_s=0.3) as client:
        with pytest.raises(errors.OutcomeUnknown) as caught:
            await client.submit({}, key="mine")
    assert set(a.keys) == {"mine"}
    assert "mine" in caught.value.detail


async def test_a_write_that_no_node_took_is_plainly_unavailable() -> None:
    busy = problem("unavailable", 503, "no leader")
    async with fake_nodes(busy) as (a,), client_of(a, timeout_s=0.3) as client:
        with pytest.raises(errors.Unavailable) as caught:
            await client.submit({})
    assert type(caught.value) is errors.Unavailable
    assert "no leader" in caught.value.detail


@pytest.mark.parametrize("kind", list(all_kinds()), ids=lambda kind: kind.slug)
def test_every_problem_type_becomes_its_exception(kind: type[DistroMLError]) -> None:
    document = {
        "type": f"/problems/{kind.slug}", "title": kind.title, "status": kind.status,
        "detail": "what and where", "field": "resources.workers", "limit": 7, "self": 1,
    }  # fmt: skip
    error = error_from_problem(kind.status, document)
    assert type(error) is kind
    assert (error.detail, error.field) == ("what and where", "resources.workers")
    assert error.extra == {"limit": 7}


@pytest.mark.parametrize(
    ("status", "kind"), [(404, errors.NotFound), (409, errors.Conflict), (418, DistroMLError)]
)
def test_an_unknown_problem_type_goes_by_its_status(status: int, kind: type[DistroMLError]) -> None:
    assert type(error_from_problem(status, {"type": "about:blank"})) is kind


async def test_a_refusal_is_raised_and_not_retried() -> None:
    refuse = problem("not-built", 422, "compression.enabled must be false", field="compression")
    async with fake_nodes(refuse, says(JOB)) as (a, b), client_of(a, b) as client:
        with pytest.raises(errors.NotBuilt, match="must be false"):
            await client.submit({})
        assert (len(a.asked), len(b.asked)) == (1, 0)


async def test_something_that_is_no_node_is_named() -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>", content_type="text/html")

    async with fake_nodes(page) as (a,), client_of(a) as client:
        with pytest.raises(DistroMLError, match="is this the address of a DistroML node"):
            await client.jobs()


async def test_an_answer_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distroml.client_transport.MAX_RESPONSE_BYTES", 1000)
    async with fake_nodes(says({"x": "y" * 2000})) as (a,), client_of(a) as client:
        with pytest.raises(DistroMLError, match="more than 1000 bytes"):
            await client.logs("job-1")


@pytest.mark.parametrize("method", ["cancel", "remove"])
async def test_delete_only_means_what_was_asked(method: str) -> None:
    """The log judges, not what some node said of the job before."""
    refusing = problem("conflict", 409, "job-1 is not in a state for it")
    async with fake_nodes(refusing) as (a,), client_of(a) as client:
        with pytest.raises(errors.Conflict, match="not in a state"):
            await getattr(client, method)("job-1")
        assert [asked[:3] for asked in a.asked] == [("DELETE", "/api/jobs/job-1", {"only": method})]


async def test_wait_sits_out_an_outage_and_returns_the_finished_job() -> None:
    turns = iter([JOB, None, {**JOB, "status": "FAILED"}])

    async def answer(_: web.Request) -> web.StreamResponse:
        document = next(turns)
        return web.json_response(document or {}, status=200 if document else 503)

    async with fake_nodes(answer) as (a,), client_of(a) as client:
        assert (await client.wait("job-1", timeout_s=10))["status"] == "FAILED"


async def test_wait_is_bounded_and_says_what_it_saw() -> None:
    async with fake_nodes(says(JOB)) as (a,), client_of(a) as client:
        with pytest.raises(TimeoutError, match=r"job-1 .* RUNNING"):
            await client.wait("job-1", timeout_s=0.05)


# -- streams


def events(*documents: dict[str, Any], then_dies: bool = False) -> Answer:
    """Streams these events, then closes or breaks off."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if not request.path.endswith("/stream"):
            return web.json_response(JOB)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for document in documents:
            await socket.send_json(document)
        if then_dies:
            assert request.transport is not None
            request.transport.abort()
        await socket.close()
        return socket

    return answer


def metric(step: int) -> dict[str, Any]:
    return {"type": "metric", "step": step, "cursor": f"c{step}"}


END = {"type": "end", "status": "COMPLETED", "reason": "", "cursor": "c9"}


async def test_a_stream_goes_on_at_another_node_after_the_last_event() -> None:
    first, second = events(metric(1), metric(2), then_dies=True), events(metric(3), END)
    async with fake_nodes(first, second) as (a, b), client_of(a, b) as client:
        seen = [event async for event in client.stream("job-1", types=("metric",))]
    assert seen == [metric(1), metric(2), metric(3), END]
    assert a.asked[0][2] == {"types": "metric"}
    assert b.asked[0][2] == {"types": "metric", "cursor": "c2"}


async def test_a_stream_that_closes_without_its_end_is_resumed_at_the_only_node() -> None:
    answers = iter([events(metric(1)), events(metric(2)), events(END)])

    async def answer(request: web.Request) -> web.StreamResponse:
        return await next(answers)(request)

    async with fake_nodes(answer) as (a,), client_of(a) as client:
        seen = [event async for event in client.stream("job-1", "now")]
    assert seen == [metric(1), metric(2), END]
    assert [asked[2] for asked in a.asked] == [{"cursor": c} for c in ("now", "c1", "c2")]


async def test_a_stream_passes_over_nodes_that_cannot_serve() -> None:
    busy = problem("unavailable", 503, "behind")
    async with fake_nodes(busy, events(END)) as (a, b), client_of(REFUSED, a, b) as client:
        assert [event async for event in client.stream("job-1")] == [END]


async def test_a_refused_stream_says_why() -> None:
    missing = problem("not-found", 404, "There is no job 'job-1'.")
    async with fake_nodes(missing) as (a,), client_of(a) as client:
        with pytest.raises(errors.NotFound, match="no job"):
            await anext(client.stream("job-1"))


async def test_a_stream_without_any_node_is_bounded() -> None:
    async with client_of(REFUSED, timeout_s=0.3) as client:
        with pytest.raises(errors.Unavailable, match=REFUSED):
            await anext(client.stream("job-1"))


# -- where the nodes are, and the synchronous face


def test_urls_come_from_the_argument_then_the_variable_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DISTROML_URL", raising=False)
    assert AsyncClient().urls == (DEFAULT_URL,)
    monkeypatch.setenv("DISTROML_URL", "http://a:1,b:2")
    assert AsyncClient().urls == ("http://a:1", "http://b:2")
    assert AsyncClient("c:3").urls == ("http://c:3",)
    assert AsyncClient(["d:4", "e:5"]).urls == ("http://d:4", "http://e:5")


async def test_the_synchronous_client_works_beside_a_running_loop() -> None:
    async with fake_nodes(events(metric(1), END)) as (a,):
        url = a.url

        def use() -> tuple[Any, list[Any]]:
            with Client(url) as client:
                return client.job("job-1"), list(client.stream("job-1"))

        job, seen = await asyncio.to_thread(use)
    assert job == JOB
    assert seen == [metric(1), END]


def test_the_synchronous_client_leaves_no_thread_and_closes_twice() -> None:
    client = Client(REFUSED, timeout_s=5)
    with pytest.raises(errors.Unavailable):
        client.health()
    client.close()
    client.close()
    assert "distroml-client" not in {thread.name for thread in threading.enumerate()}
