"""Streams: order, resume at any node, ends, slow readers, shutdown; WebSocket and SSE alike."""

from __future__ import annotations

import asyncio
import socket as sockets
from typing import Any

import aiohttp
import msgspec
import pytest

from distroml.commands import RemoveJob, StopJob
from distroml.http import messages
from distroml.http.cursor import MAX_CURSOR_CHARACTERS
from distroml.http.limits import HttpSettings
from tests.http.node import WAIT_S, Api, MemoryNode, log_line, metric, served, until
from tests.http.test_jobs import finish


@pytest.fixture(autouse=True)
def quick_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "END_SETTLE_S", 0.05)
    monkeypatch.setattr(messages, "CATCH_UP_S", 0.05)


async def read(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[dict[str, Any]]:
    """The next ``count`` messages, resources left out."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(WAIT_S):
        while len(found) < count:
            message = await socket.receive()
            assert message.type is aiohttp.WSMsgType.TEXT, f"{message} after {found}"
            decoded = msgspec.json.decode(message.data)
            if decoded["type"] != "resource":
                found.append(decoded)
    return found


async def read_all(socket: aiohttp.ClientWebSocketResponse) -> list[dict[str, Any]]:
    found = []
    async with asyncio.timeout(WAIT_S):
        async for message in socket:
            decoded = msgspec.json.decode(message.data)
            if decoded["type"] != "resource":
                found.append(decoded)
    return found


def running(node: MemoryNode) -> str:
    job_id = node.submit()
    node.run(job_id)
    return job_id


async def test_stream_tells_state_metrics_logs_and_ends(api: Api) -> None:
    node = api.node
    job_id = running(node)
    node.history.add(job_id, metric(1, loss=2.0))
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        first, old = await read(socket, 2)
        assert (first["type"], first["status"], first["generation"]) == ("state", "RUNNING", 1)
        assert (old["type"], old["step"], old["loss"]) == ("metric", 1, 2.0)
        node.history.add(job_id, metric(2, loss=1.5, throughput=540.0), log_line("hello"))
        live, line = await read(socket, 2)
        assert (live["step"], live["loss"], live["throughput"]) == (2, 1.5, 540.0)
        assert (line["type"], line["rank"], line["line"]) == ("log", 0, "hello")
        finish(node, job_id)
        node.history.add(job_id, metric(3, loss=1.0))  # the last batch arrives after the end
        rest = await read_all(socket)
        assert [m["type"] for m in rest] == ["state", "metric", "end"]
        assert rest[0]["status"] == rest[-1]["status"] == "COMPLETED"
        assert rest[-1]["reason"] == "all steps done"
        assert socket.close_code == 1000


async def test_a_reader_from_now_is_told_where_now_is(api: Api) -> None:
    """Whatever it wants to read: without a cursor it could not go on at another node."""
    node = api.node
    job_id = running(node)
    node.history.add(job_id, log_line("old"))
    url = f"{api.base}/api/jobs/{job_id}/stream?types=log&cursor="
    async with api.http.ws_connect(f"{url}now") as socket:
        (first,) = await read(socket, 1)
        assert (first["type"], first["status"]) == ("state", "RUNNING")
    node.history.add(job_id, log_line("between"))
    async with api.http.ws_connect(url + first["cursor"]) as socket:
        assert [one["line"] for one in await read(socket, 1)] == ["between"]


async def test_resources_are_told_when_they_change(api: Api) -> None:
    job_id = running(api.node)
    async with (
        api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream?types=resource") as socket,
        asyncio.timeout(WAIT_S),
    ):
        first = msgspec.json.decode((await socket.receive()).data)
        assert first["type"] == "resource"
        assert (first["slots_total"], first["slots_free"]) == (4, 2)
        assert [worker["rank"] for worker in first["workers"]] == [0, 1]
        api.node.report(job_id, step=50)
        second = msgspec.json.decode((await socket.receive()).data)
        assert second["step"] == 50


async def test_every_event_is_told_once_and_in_order(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        await read(socket, 1)
        node.run(job_id)
        node.apply(StopJob(job_id=job_id, reason="stop"))
        finish(node, job_id)
        told = await read_all(socket)
    assert [m["status"] for m in told] == [
        "STARTING",
        "RUNNING",
        "STOPPING",
        "COMPLETED",
        "COMPLETED",
    ]


async def test_resume_at_another_node_without_loss_or_repetition(api: Api) -> None:
    """Two nodes apply the same log and hold the same history."""
    node = api.node
    other = MemoryNode(name="b", history=node.history)
    node.replica.listen(
        lambda entry, outcome, events: None if entry is None else mirror(other, entry)
    )
    other.replica.state = node.state()
    job_id = running(node)
    node.history.add(job_id, *(metric(step) for step in range(1, 11)))
    async with served(other) as elsewhere:
        seen: list[dict[str, Any]] = []
        async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
            seen += await read(socket, 6)  # cut off in the middle
        cursor = seen[-1]["cursor"]
        node.history.add(job_id, *(metric(step) for step in range(11, 16)))
        node.apply(StopJob(job_id=job_id, reason="enough"))
        finish(node, job_id)
        url = f"{elsewhere.base}/api/jobs/{job_id}/stream"
        async with elsewhere.http.ws_connect(url, params={"cursor": cursor}) as socket:
            seen += await read_all(socket)
    assert [m["step"] for m in seen if m["type"] == "metric"] == list(range(1, 16))
    assert [m["status"] for m in seen if m["type"] == "state"] == [
        "RUNNING",
        "STOPPING",
        "COMPLETED",
    ]
    assert seen[-1]["type"] == "end"


def mirror(other: MemoryNode, entry: Any) -> None:
    from distroml.commands import encode_entry

    other.replica.apply(other.state().index + 1, encode_entry(entry))


async def test_cursor_ahead_of_the_node_is_503(api: Api) -> None:
    job_id = running(api.node)
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        (first,) = await read(socket, 1)
    behind = MemoryNode(name="b", history=api.node.history)
    behind.register("a")
    behind.submit(job_id)
    async with served(behind) as elsewhere:
        reply = await elsewhere.get(
            f"/api/jobs/{job_id}/stream", params={"cursor": first["cursor"]}
        )
    assert (reply.status, reply.json["type"]) == (503, "/problems/unavailable")


async def test_cursor_of_another_job_is_400(api: Api) -> None:
    one, two = running(api.node), api.node.submit("job-2")
    async with api.http.ws_connect(f"{api.base}/api/jobs/{one}/stream") as socket:
        (first,) = await read(socket, 1)
    reply = await api.get(f"/api/jobs/{two}/stream", params={"cursor": first["cursor"]})
    assert (reply.status, reply.json["field"]) == (400, "cursor")


async def test_events_that_are_gone_are_replaced_by_the_present_state(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        (first,) = await read(socket, 1)
    node.run(job_id)
    node.replica._events.clear()  # as after a restart from a snapshot
    url = f"{api.base}/api/jobs/{job_id}/stream"
    async with api.http.ws_connect(url, params={"cursor": first["cursor"]}) as socket:
        (told,) = await read(socket, 1)
    assert (told["type"], told["status"]) == ("state", "RUNNING")


async def test_events_that_a_snapshot_skipped_are_replaced_by_the_present_state(api: Api) -> None:
    ahead, behind = api.node, MemoryNode(name="b")
    ahead.replica.listen(lambda entry, outcome, events: mirror(behind, entry))
    behind.register("a")  # as ``api.node`` was
    job_id = running(ahead)
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        (first,) = await read(socket, 1)
    ahead.replica._listeners.pop()
    ahead.apply(StopJob(job_id=job_id, reason="enough"))
    behind.replica.restore(ahead.state().index, ahead.replica.snapshot())
    async with served(behind) as elsewhere:
        url = f"{elsewhere.base}/api/jobs/{job_id}/stream"
        async with elsewhere.http.ws_connect(url, params={"cursor": first["cursor"]}) as socket:
            (told,) = await read(socket, 1)
    assert (told["type"], told["status"]) == ("state", "STOPPING")


async def test_cursor_now_skips_the_past(api: Api) -> None:
    node = api.node
    job_id = running(node)
    node.history.add(job_id, metric(1), metric(2))
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream?cursor=now") as socket:
        (first,) = await read(socket, 1)
        assert first["type"] == "state"
        node.history.add(job_id, metric(3))
        (live,) = await read(socket, 1)
        assert live["step"] == 3


async def test_types_filter(api: Api) -> None:
    node = api.node
    job_id = running(node)
    node.history.add(job_id, metric(1), log_line("not wanted"), metric(2))
    finish(node, job_id)
    url = f"{api.base}/api/jobs/{job_id}/stream?types=metric"
    async with api.http.ws_connect(url) as socket:
        told = await read_all(socket)
    assert [m["type"] for m in told] == ["metric", "metric", "end"]


async def test_metric_named_like_a_member_does_not_break_the_message(api: Api) -> None:
    job_id = running(api.node)
    api.node.history.add(job_id, metric(7, type=1.0, step=99.0, loss=0.5))
    url = f"{api.base}/api/jobs/{job_id}/stream?types=metric"
    async with api.http.ws_connect(url) as socket:
        (told,) = await read(socket, 1)
    assert (told["type"], told["step"], told["loss"]) == ("metric", 7, 0.5)


async def test_removed_job_ends_its_streams(api: Api) -> None:
    node = api.node
    job_id = running(node)
    finish(node, job_id)
    messages.END_SETTLE_S = 10.0
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        await read(socket, 1)
        node.apply(RemoveJob(job_id=job_id))
        messages.END_SETTLE_S = 0.01
        told = await read_all(socket)
    assert (told[-1]["type"], told[-1]["reason"]) == ("end", "the job was removed")


async def test_unknown_job_is_404_before_the_upgrade(api: Api) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await api.http.ws_connect(f"{api.base}/api/jobs/job-none/stream")
    assert refused.value.status == 404


async def test_foreign_origin_is_403_before_the_upgrade(api: Api) -> None:
    job_id = running(api.node)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await api.http.ws_connect(
            f"{api.base}/api/jobs/{job_id}/stream", origin="http://evil.example"
        )
    assert refused.value.status == 403


async def test_slow_reader_is_dropped_and_nobody_waits_for_it() -> None:
    node = MemoryNode(HttpSettings(stream_send_timeout_s=0.3))
    node.register("a")
    async with served(node) as api:
        job_id = running(node)
        slow = await handshake(api, job_id)
        async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
            lines = 40
            for _ in range(lines):
                node.history.add(job_id, log_line("x" * 200_000))
            fast = await read(socket, lines + 1)
            assert len(fast) == lines + 1
            await until(lambda: api.server._streams.inside == 1, "the slow reader is dropped")
            reply = await api.get(f"/api/jobs/{job_id}")
            assert reply.status == 200
            node.history.add(job_id, log_line("still live"))
            (last,) = await read(socket, 1)
            assert last["line"] == "still live"
        text = await drain(slow)
        # what it had received is whole, and ends with the close frame or a reset
        assert text.count(b'"type":"log"') < lines


async def handshake(api: Api, job_id: str) -> sockets.socket:
    """A WebSocket whose client never reads, with a small receive buffer."""
    host, port = api.base.removeprefix("http://").split(":")
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, (host, int(port)))
    request = (
        f"GET /api/jobs/{job_id}/stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await loop.sock_sendall(raw, request.encode())
    await until(lambda: api.server._streams.inside, "the stream is open")
    return raw


async def drain(raw: sockets.socket) -> bytes:
    loop = asyncio.get_running_loop()
    found = bytearray()
    try:
        async with asyncio.timeout(WAIT_S):
            while part := await loop.sock_recv(raw, 65536):
                found += part
    except ConnectionError:
        pass
    finally:
        raw.close()
    return bytes(found)


async def test_dropped_reader_that_wakes_up_in_time_is_told_why() -> None:
    node = MemoryNode(HttpSettings(stream_send_timeout_s=0.05))
    node.register("a")
    async with served(node) as api:
        job_id = running(node)
        raw = await handshake(api, job_id)
        for _ in range(40):
            node.history.add(job_id, log_line("x" * 200_000))
        await until(lambda: not api.server._streams.inside, "the stream's place is free")
        text = await drain(raw)
    assert b"slow reader" in text


async def test_streams_are_limited() -> None:
    node = MemoryNode(HttpSettings(streams_max=1))
    node.register("a")
    async with served(node) as api:
        job_id = running(node)
        url = f"{api.base}/api/jobs/{job_id}/stream"
        async with api.http.ws_connect(url) as socket:
            await read(socket, 1)
            refused = await api.get(f"/api/jobs/{job_id}/events")
            assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        await until(lambda: not api.server._streams.inside, "the stream's place is free")
        async with api.http.ws_connect(url) as socket:
            await read(socket, 1)


async def test_shutdown_closes_streams_with_1001() -> None:
    node = MemoryNode()
    node.register("a")
    async with served(node) as api:
        job_id = running(node)
        async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
            await read(socket, 1)
            stopping = asyncio.create_task(api.server.stop())
            async with asyncio.timeout(WAIT_S):
                while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                    pass
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert message.data == 1001
            assert "shutting down" in message.extra
            async with asyncio.timeout(WAIT_S):
                await stopping


async def test_chatty_client_does_no_harm(api: Api) -> None:
    job_id = running(api.node)
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        await read(socket, 1)
        for _ in range(10):
            await socket.send_str("hello?")
        api.node.history.add(job_id, metric(1))
        (told,) = await read(socket, 1)
        assert told["step"] == 1
        await socket.send_str("x" * 10_000)
        async with asyncio.timeout(WAIT_S):
            while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
        assert socket.close_code == 1009, message


async def test_client_that_leaves_frees_its_place(api: Api) -> None:
    job_id = running(api.node)
    async with api.http.ws_connect(f"{api.base}/api/jobs/{job_id}/stream") as socket:
        await read(socket, 1)
        assert api.server._streams.inside == 1
    await until(lambda: not api.server._streams.inside, "the stream's place is free")
    assert not api.node.events._wakes.jobs


# --- Server-Sent Events ------------------------------------------------------------------------------------------


def parse(text: bytes) -> list[dict[str, str]]:
    return [
        dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        for block in text.decode().split("\n\n")
        if "data: " in block
    ]


@pytest.mark.parametrize("path", ["events", "stream"])
async def test_server_sent_events(api: Api, path: str) -> None:
    node = api.node
    job_id = running(node)
    node.history.add(job_id, metric(1), metric(2))
    finish(node, job_id)
    reply = await api.get(f"/api/jobs/{job_id}/{path}?types=metric,state")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/event-stream")
    events = parse(reply.body)
    assert [event["event"] for event in events] == ["state", "metric", "metric", "end"]
    assert msgspec.json.decode(events[-1]["data"])["status"] == "COMPLETED"
    again = await api.get(
        f"/api/jobs/{job_id}/events?types=metric,state", headers={"Last-Event-ID": events[1]["id"]}
    )
    rest = [msgspec.json.decode(event["data"]) for event in parse(again.body)]
    assert [(m["type"], m.get("step")) for m in rest] == [("metric", 2), ("end", None)]


async def test_shutdown_ends_server_sent_events() -> None:
    node = MemoryNode()
    node.register("a")
    async with served(node) as api:
        job_id = running(node)
        reading = asyncio.create_task(api.get(f"/api/jobs/{job_id}/events"))
        await until(lambda: api.server._streams.inside, "the stream is open")
        async with asyncio.timeout(WAIT_S):
            await api.server.stop()
            reply = await reading
    assert b"event: state" in reply.body
    assert b"shutting down" in reply.body


async def test_an_event_source_may_send_the_longest_cursor_there_is(api: Api) -> None:
    """It can say only in a header where it was, and takes an answer of 400 for the end."""
    job_id = running(api.node)
    longest = {"Last-Event-ID": "A" * MAX_CURSOR_CHARACTERS}
    reply = await api.get(f"/api/jobs/{job_id}/events", headers=longest)
    assert (reply.status, reply.json["field"]) == (400, "cursor")  # it was read, and is none
