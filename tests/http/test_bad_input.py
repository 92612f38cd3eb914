"""Bad input: each a clear 4xx with the name of the place, and nothing happened."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import pytest

from distroml.http.limits import HttpSettings
from tests.http.node import WAIT_S, Api, MemoryNode, served
from tests.http.test_jobs import SPEC

JSON = {"Content-Type": "application/json"}
DEEP = b"[" * 100_000


def spec(**changes: Any) -> bytes:
    return msgspec.json.encode(SPEC | changes)


# method, path, body, headers, expected status, expected problem, expected field
CASES: list[tuple[str, str, bytes | None, dict[str, str], int, str, str | None]] = [
    # bodies
    ("POST", "/api/jobs", b"", JSON, 400, "invalid-request", None),
    ("POST", "/api/jobs", None, {}, 400, "invalid-request", None),
    ("POST", "/api/jobs", b"  \n", JSON, 400, "invalid-request", None),
    ("POST", "/api/jobs", b"{", JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b"nonsense", JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b"\xff\xfe", JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b'{"name":"\xff"}', JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b"[]", JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b"null", JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b'"x"', JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", DEEP, JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b'{"x":' + DEEP, JSON, 422, "invalid-spec", "x"),
    ("POST", "/api/jobs", spec(surprise=1), JSON, 422, "invalid-spec", "surprise"),
    ("POST", "/api/jobs", spec(resources={"worker": 4}), JSON, 422, "invalid-spec", "resources.worker"),
    ("POST", "/api/jobs", spec(resources={"workers": "4"}), JSON, 422, "invalid-spec", "resources.workers"),
    ("POST", "/api/jobs", spec(resources={"workers": 0}), JSON, 422, "invalid-spec", "resources.workers"),
    ("POST", "/api/jobs", spec(resources={"workers": -1}), JSON, 422, "invalid-spec", "resources.workers"),
    ("POST", "/api/jobs", spec(resources={"workers": 1.5}), JSON, 422, "invalid-spec", "resources.workers"),
    ("POST", "/api/jobs", spec(resources=None), JSON, 422, "invalid-spec", "resources"),
    ("POST", "/api/jobs", spec(resources={"workers": 10**30}), JSON, 422, "invalid-spec", "resources.workers"),
    ("POST", "/api/jobs", spec(resources={"gpus_per_worker": 1}), JSON, 422, "not-built", "resources.gpus_per_worker"),
    ("POST", "/api/jobs", spec(name=""), JSON, 422, "invalid-spec", "name"),
    ("POST", "/api/jobs", spec(name="a" * 64), JSON, 422, "invalid-spec", "name"),
    ("POST", "/api/jobs", spec(name="../etc"), JSON, 422, "invalid-spec", "name"),
    ("POST", "/api/jobs", spec(name="a\n"), JSON, 422, "invalid-spec", "name"),
    ("POST", "/api/jobs", spec(seed=-1), JSON, 422, "invalid-spec", "seed"),
    ("POST", "/api/jobs", spec(seed=2**63), JSON, 422, "invalid-spec", "seed"),
    ("POST", "/api/jobs", spec(model="vit"), JSON, 422, "invalid-spec", "model"),
    ("POST", "/api/jobs", spec(dataset="text"), JSON, 422, "invalid-spec", "dataset"),
    ("POST", "/api/jobs", spec(distributed={"strategy": "fsdp"}), JSON, 422, "not-built", "distributed.strategy"),
    ("POST", "/api/jobs", spec(checkpointing={"store": "s3"}), JSON, 422, "invalid-spec", "checkpointing.store"),
    ("POST", "/api/jobs", spec(checkpointing={"store": "s3://key:secret@bucket"}), JSON, 422, "invalid-spec", "checkpointing.store"),
    ("POST", "/api/checkpoints/import", b'{"store": "s3://bucket?token=x"}', JSON, 422, "invalid-spec", "store"),
    ("POST", "/api/jobs", spec(compression={"enabled": True}), JSON, 422, "not-built", "compression.enabled"),
    ("POST", "/api/jobs", spec(compression={"enabled": "yes"}), JSON, 422, "invalid-spec", "compression.enabled"),
    ("POST", "/api/jobs", spec(hyperparameters={"lr": 0}), JSON, 422, "invalid-spec", "hyperparameters.lr"),
    ("POST", "/api/jobs", b'{"hyperparameters":{"lr":NaN}}', JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs", b'{"hyperparameters":{"lr":1e999}}', JSON, 422, "invalid-spec", "hyperparameters.lr"),
    ("POST", "/api/jobs", spec(hyperparameters={"batch_size": 2}), JSON, 422, "invalid-spec", "hyperparameters.batch_size"),
    ("POST", "/api/jobs", spec(entrypoint="os; rm -rf"), JSON, 422, "invalid-spec", "entrypoint"),
    ("POST", "/api/jobs", spec(model_options={"hidden": 0}), JSON, 422, "invalid-spec", "model_options.hidden"),
    ("POST", "/api/jobs", spec(model_options={"colour": 1}), JSON, 422, "invalid-spec", "model_options.colour"),
    ("POST", "/api/jobs", spec(model_options={"hidden": [1]}), JSON, 422, "invalid-spec", "model_options[...]"),
    ("POST", "/api/jobs", b"x" * (1024 * 1024 + 1), JSON, 413, "body-too-large", None),
    # media
    ("POST", "/api/jobs", spec(), {"Content-Type": "text/plain"}, 415, "unsupported-media-type", "Content-Type"),
    ("POST", "/api/jobs", spec(), {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported-media-type", "Content-Type"),
    ("POST", "/api/jobs", spec(), {"Content-Type": "application/json; charset=utf-16"}, 415, "unsupported-media-type", "Content-Type"),
    ("POST", "/api/jobs", spec(), {"Content-Type": ";;;"}, 415, "unsupported-media-type", "Content-Type"),
    ("POST", "/api/jobs", spec(), JSON | {"Content-Encoding": "gzip"}, 415, "unsupported-media-type", "Content-Encoding"),
    # headers
    ("POST", "/api/jobs", spec(), JSON | {"Idempotency-Key": "k" * 256}, 400, "invalid-request", "Idempotency-Key"),
    ("POST", "/api/jobs", spec(), JSON | {"Idempotency-Key": ""}, 400, "invalid-request", "Idempotency-Key"),
    ("POST", "/api/jobs", spec(), JSON | {"Idempotency-Key": "two words"}, 400, "invalid-request", "Idempotency-Key"),
    ("POST", "/api/jobs", spec(), JSON | {"Idempotency-Key": "schlüssel"}, 400, "invalid-request", "Idempotency-Key"),
    ("DELETE", "/api/jobs/job-1", None, {"Idempotency-Key": "a b"}, 400, "invalid-request", "Idempotency-Key"),
    ("POST", "/api/jobs", spec(), JSON | {"Host": "evil.example"}, 421, "misdirected", None),
    ("GET", "/api/jobs", None, {"Host": "evil.example:8101"}, 421, "misdirected", None),
    ("GET", "/api/jobs", None, {"Host": "[::1"}, 400, "invalid-request", "Host"),
    ("POST", "/api/jobs", spec(), JSON | {"Origin": "http://evil.example"}, 403, "forbidden", None),
    ("POST", "/api/jobs", spec(), JSON | {"Origin": "null"}, 403, "forbidden", None),
    ("POST", "/api/jobs", spec(), JSON | {"Sec-Fetch-Site": "cross-site"}, 403, "forbidden", None),
    ("DELETE", "/api/jobs/job-1", None, {"Origin": "http://127.0.0.1:1"}, 403, "forbidden", None),
    # queries
    ("POST", "/api/jobs?dry=1", spec(), JSON, 400, "invalid-request", "dry"),
    ("GET", "/api/jobs?limit=0", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=10001", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=-5", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=ten", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=1.5", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=1&limit=2", None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?limit=" + "9" * 400, None, {}, 400, "invalid-request", "limit"),
    ("GET", "/api/jobs?status=running", None, {}, 400, "invalid-request", "status"),
    ("GET", "/api/jobs?status=RUNNING,", None, {}, 400, "invalid-request", "status"),
    ("GET", "/api/jobs?status=", None, {}, 400, "invalid-request", "status"),
    ("GET", "/api/jobs?cursor=%21%21", None, {}, 400, "invalid-request", "cursor"),
    ("GET", "/api/jobs?cursor=", None, {}, 400, "invalid-request", "cursor"),
    ("GET", "/api/jobs?cursor=ajE", None, {}, 200, "", None),
    ("GET", "/api/jobs?name=", None, {}, 400, "invalid-request", "name"),
    ("GET", "/api/jobs?name=%ff%fe%00", None, {}, 200, "", None),
    ("GET", "/api/jobs?colour=red", None, {}, 400, "invalid-request", "colour"),
    ("GET", "/api/jobs?" + "&".join(f"status=FAILED&x{n}=1" for n in range(40)), None, {}, 400, "invalid-request", None),
    ("GET", "/api/jobs/job-1?verbose=1", None, {}, 400, "invalid-request", "verbose"),
    ("GET", "/api/jobs/job-1/metrics?max_points=0", None, {}, 400, "invalid-request", "max_points"),
    ("GET", "/api/jobs/job-1/metrics?max_points=10001", None, {}, 400, "invalid-request", "max_points"),
    ("GET", "/api/jobs/job-1/metrics?from_step=-1", None, {}, 400, "invalid-request", "from_step"),
    ("GET", "/api/jobs/job-1/metrics?from_step=9&to_step=3", None, {}, 400, "invalid-request", "to_step"),
    ("GET", "/api/jobs/job-1/metrics?name=", None, {}, 400, "invalid-request", "name"),
    ("GET", "/api/jobs/job-1/logs?rank=-1", None, {}, 400, "invalid-request", "rank"),
    ("GET", "/api/jobs/job-1/logs?rank=zero", None, {}, 400, "invalid-request", "rank"),
    ("GET", "/api/jobs/job-1/logs?tail=10001", None, {}, 400, "invalid-request", "tail"),
    ("GET", "/api/jobs/job-1/stream?cursor=abc", None, {}, 400, "invalid-request", "cursor"),
    ("GET", "/api/jobs/job-1/stream?cursor=" + "A" * 25_000, None, {}, 400, "invalid-request", "cursor"),
    ("GET", "/api/jobs/job-1/events?types=metrics", None, {}, 400, "invalid-request", "types"),
    ("GET", "/api/jobs/job-1/events?types=metric,,log", None, {}, 400, "invalid-request", "types"),
    ("GET", "/api/cluster/nodes?x=1", None, {}, 400, "invalid-request", "x"),
    ("GET", "/health?x=1", None, {}, 400, "invalid-request", "x"),
    ("GET", "/api/jobs/job-1/stream?cursor=k6VqLTEAAA.zzz", None, {}, 400, "invalid-request", "cursor"),
    ("GET", "/api/jobs/job-1/stream?cursor=.", None, {}, 400, "invalid-request", "cursor"),
    # ids and paths
    ("GET", "/api/jobs/job-none", None, {}, 404, "not-found", "job_id"),
    ("GET", "/api/jobs/job-none/metrics", None, {}, 404, "not-found", "job_id"),
    ("GET", "/api/jobs/job-none/logs", None, {}, 404, "not-found", "job_id"),
    ("GET", "/api/jobs/job-none/checkpoints", None, {}, 404, "not-found", "job_id"),
    ("GET", "/api/jobs/job-none/incidents", None, {}, 404, "not-found", "job_id"),
    ("GET", "/api/jobs/job-none/stream", None, {}, 404, "not-found", "job_id"),
    ("DELETE", "/api/jobs/job-none", None, {}, 404, "not-found", None),
    ("POST", "/api/jobs/job-none/stop", None, {}, 404, "not-found", None),
    ("GET", "/api/jobs/" + "a" * 64, None, {}, 400, "invalid-request", "job_id"),
    ("GET", "/api/jobs/a%20b", None, {}, 400, "invalid-request", "job_id"),
    ("GET", "/api/jobs/a%0Ab", None, {}, 400, "invalid-request", "job_id"),
    ("GET", "/api/jobs/..%2F..%2Fetc", None, {}, 400, "invalid-request", "job_id"),
    ("DELETE", "/api/jobs/%00", None, {}, 400, "invalid-request", "job_id"),
    ("POST", "/api/jobs/job-1/stop", b'{"now":true}', JSON, 422, "invalid-spec", "now"),
    ("POST", "/api/jobs/job-1/stop", b"{", JSON, 400, "invalid-request", None),
    ("POST", "/api/jobs/job-1/stop", b'{"\xff":1}', JSON, 400, "invalid-request", None),
    ("POST", "/api/jobs/job-1/stop", DEEP, JSON, 422, "invalid-spec", None),
    ("POST", "/api/jobs/job-1/stop", b"[]", JSON, 422, "invalid-spec", None),
    ("GET", "/api", None, {}, 404, "not-found", None),
    ("GET", "/api/jobs/", None, {}, 404, "not-found", None),
    ("GET", "/favicon.png", None, {}, 404, "not-found", None),
    ("GET", "/problems/none", None, {}, 404, "not-found", None),
    # methods
    ("PUT", "/api/jobs", spec(), JSON, 405, "method-not-allowed", None),
    ("PATCH", "/api/jobs/job-1", b"{}", JSON, 405, "method-not-allowed", None),
    ("DELETE", "/api/jobs", None, {}, 405, "method-not-allowed", None),
    ("POST", "/health", None, {}, 405, "method-not-allowed", None),
    ("TRACE", "/api/jobs", None, {}, 405, "method-not-allowed", None),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{n}-{case[0]}-{case[1][:40]}" for n, case in enumerate(CASES)]
)
async def test_bad_input(api: Api, case: tuple[Any, ...]) -> None:
    method, path, body, headers, status, slug, field = case
    api.node.submit("job-1")
    before = api.node.state().jobs
    from yarl import URL

    async with asyncio.timeout(WAIT_S):
        reply = await api.http.request(
            method,
            URL(api.base + path, encoded=True),
            data=body,
            headers=headers,
            skip_auto_headers=("Content-Type",),
        )
        text = await reply.read()
    assert reply.status == status, text[:500]
    assert api.node.state().jobs == before, "something happened"
    if status == 200:
        return
    problem = msgspec.json.decode(text)
    assert reply.content_type == "application/problem+json"
    assert problem["type"] == f"/problems/{slug}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == path.partition("?")[0][:1024]
    assert problem["request_id"] == reply.headers["X-Request-Id"]
    assert problem.get("field") == field
    if status == 405:
        assert "OPTIONS" in reply.headers["Allow"]


RAW = [
    b"nonsense\r\n\r\n",
    b"GET /\r\n\r\n",
    b"FROB / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nExpect: miracles\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: minus\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("data", RAW, ids=[str(data[:40]) for data in RAW])
async def test_what_is_not_http_gets_a_problem_too(api: Api, data: bytes) -> None:
    host, port = api.base.removeprefix("http://").split(":")
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
    if not answer:
        return  # closed without a word is fine for what is not even a request line
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:300]
    assert b"application/problem+json" in head
    assert b"X-DistroML-Node: a" in head
    assert msgspec.json.decode(body)["detail"]


async def test_body_that_never_comes_is_408() -> None:
    node = MemoryNode(HttpSettings(body_timeout_s=0.05))
    async with served(node) as api:
        host, port = api.base.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            b"Connection: close\r\n\r\n{"
        )
        async with asyncio.timeout(WAIT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"}")
        writer.close()
    assert b" 408 " in head
    assert msgspec.json.decode(body)["type"] == "/problems/request-timeout"


async def test_chunked_body_over_the_limit_is_413(api: Api) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100_000

    try:
        reply = await api.call("POST", "/api/jobs", data=chunks(), headers=JSON)
    except aiohttp.ClientConnectionError:
        return  # the server may hang up before all of it is sent
    assert (reply.status, reply.json["limit_bytes"]) == (413, 1024 * 1024)


async def test_spec_over_the_log_limit_is_refused(api: Api) -> None:
    options = {f"o{n}": "v" * 4096 for n in range(32)}
    reply = await api.call(
        "POST", "/api/jobs", json={"entrypoint": "mine:Adapter", "model_options": options}
    )
    assert reply.status == 422, reply.body
    assert api.node.state().jobs == {}


async def test_content_type_may_be_missing(api: Api) -> None:
    reply = await api.call("POST", "/api/jobs", data=spec(), skip_auto_headers=("Content-Type",))
    assert reply.status == 201


async def test_own_origin_is_welcome(api: Api) -> None:
    reply = await api.call("POST", "/api/jobs", json=SPEC, headers={"Origin": api.base})
    assert reply.status == 201


async def test_allowed_host_names() -> None:
    node = MemoryNode(HttpSettings(allowed_hosts=("node-a.lan",)))
    node.register("c")  # its URL is http://c:1
    async with served(node) as api:
        assert (await api.get("/health", headers={"Host": "c:1"})).status == 200
        fine = await api.get("/health", headers={"Host": "NODE-A.lan:8101"})
        other = await api.get("/health", headers={"Host": "node-b.lan"})
        local = await api.get("/health", headers={"Host": "localhost:1"})
    assert (fine.status, other.status, local.status) == (200, 421, 200)
    assert "--allowed-hosts" in other.json["detail"]


async def test_expect_100_continue(api: Api) -> None:
    reply = await api.call("POST", "/api/jobs", json=SPEC, expect100=True)
    assert reply.status == 201


async def test_head_and_options(api: Api) -> None:
    job_id = api.node.submit()
    head = await api.call("HEAD", f"/api/jobs/{job_id}")
    assert (head.status, head.body) == (200, b"")
    options = await api.call("OPTIONS", f"/api/jobs/{job_id}")
    assert (options.status, options.headers["Allow"]) == (204, "DELETE, GET, HEAD, OPTIONS")
    assert (await api.call("HEAD", f"/api/jobs/{job_id}/stream")).status == 405
