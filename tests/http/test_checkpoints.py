"""Checkpoints over HTTP: shapes, refusals, and answers that take long."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from msgspec.structs import replace

from distroml import commands as c
from distroml.checkpoint_files import CheckpointFiles
from distroml.client import AsyncClient
from distroml.errors import Conflict, CorruptCheckpoint, NotFound, StoreError
from distroml.http import patience
from distroml.http.checkpoint_views import CheckpointDetail
from distroml.http.routes import checkpoints as routes
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.opening import Stores
from distroml.spec import JobSpec
from tests.http.node import WAIT_S, Api, MemoryNode, served, until
from tests.runtime.checkpoint.shards import JOB, RUN, committed

PATH = f"/api/jobs/{JOB}/checkpoints"


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.fixture
def node(store: FileStore, tmp_path: Path) -> MemoryNode:
    node = MemoryNode()
    node.files = CheckpointFiles(Stores(store.root), tmp_path / "exports")
    node.register("a")
    return node


@pytest.fixture
def saved(node: MemoryNode, store: FileStore) -> list[Checkpoint]:
    """A running job with two committed checkpoints."""
    node.apply(c.SubmitJob(job_id=JOB, run_id=RUN, spec=JobSpec()))
    node.run(JOB)
    made = [replace(committed(store, step), metric=0.5) for step in (100, 200)]
    for one in made:
        outcome = node.apply(c.CommitCheckpoint(job_id=JOB, generation=1, checkpoint=one))
        assert not outcome.error, outcome
    return made


async def test_the_list_and_one_in_full(api: Api, saved: list[Checkpoint]) -> None:
    page = (await api.get(PATH)).json
    assert [row["step"] for row in page["checkpoints"]] == [100, 200]
    assert page["checkpoints"][0]["metric"] == 0.5
    reply = await api.get(f"{PATH}/100")
    assert reply.status == 200, reply.body
    msgspec.json.decode(reply.body, type=CheckpointDetail)
    detail = reply.json
    assert detail["manifest_sha256"] == saved[0].manifest_sha256
    assert (detail["world_size"], detail["cursor"]) == (2, {"epoch": 2, "batch": 5})
    assert [row["file"] for row in detail["files"]] == [
        "worker_0.safetensors",
        "worker_1.safetensors",
    ]
    assert {row["name"] for row in detail["tensors"]} >= {"model.weight", "model.bias"}
    for path in (f"{PATH}/100", f"{PATH}/100/export"):
        assert (await api.get(f"{path}?consistency=linearizable")).status == 200
    assert api.node.barriers == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"{PATH}/1", 404),
        ("GET", f"{PATH}/x", 400),
        ("GET", f"{PATH}/-1", 400),
        ("GET", f"{PATH}/99999999999999999999", 400),
        ("GET", f"{PATH}/100/export?format=pickle", 400),
        ("GET", f"{PATH}/100/export?all=perhaps", 400),
        ("GET", f"{PATH}/1/export", 404),
        ("POST", f"{PATH}/1/verify", 404),
        ("DELETE", f"{PATH}/1", 404),
        ("DELETE", f"{PATH}/200", 409),
        ("POST", "/api/jobs/none/checkpoint", 404),
        ("GET", "/api/jobs/none/checkpoints/1", 404),
    ],
)
async def test_bad_requests_name_what_is_wrong(
    api: Api, saved: list[Checkpoint], method: str, path: str, status: int
) -> None:
    reply = await api.call(method, path)
    assert reply.status == status, reply.body
    assert reply.json["detail"]


async def test_a_request_to_save_is_counted_once_per_key(
    api: Api, node: MemoryNode, saved: list[Checkpoint]
) -> None:
    headers = {"Idempotency-Key": "k"}
    for again in (False, True):
        reply = await api.call("POST", f"/api/jobs/{JOB}/checkpoint", headers=headers)
        assert (reply.status, reply.json["save_request"]) == (202, 1)
        assert ("Idempotent-Replayed" in reply.headers) is again
    assert (await api.get(PATH)).json["saved_request"] == 0
    late = replace(saved[1], step=300, directory="x", save_request=1)
    node.apply(c.CommitCheckpoint(job_id=JOB, generation=1, checkpoint=late))
    assert (await api.get(PATH)).json["saved_request"] == 1
    assert (await api.call("POST", f"/api/jobs/{JOB}/checkpoint", json={"step": 3})).status == 422


async def test_a_job_that_does_not_run_or_never_saves_refuses(api: Api, node: MemoryNode) -> None:
    node.submit("queued")
    node.submit("off", checkpointing={"enabled": False})
    for job_id, said in (("queued", "QUEUED"), ("off", "enabled")):
        reply = await api.call("POST", f"/api/jobs/{job_id}/checkpoint")
        assert (reply.status, reply.json["type"]) == (409, "/problems/conflict")
        assert said in reply.json["detail"]


async def test_removal(api: Api, saved: list[Checkpoint]) -> None:
    headers = {"Idempotency-Key": "r"}
    for _ in range(2):
        reply = await api.call("DELETE", f"{PATH}/100", headers=headers)
        assert (reply.status, reply.body) == (204, b"")
    assert [row["step"] for row in (await api.get(PATH)).json["checkpoints"]] == [200]


async def test_verify_and_export(
    api: Api, store: FileStore, saved: list[Checkpoint], tmp_path: Path
) -> None:
    async with AsyncClient(api.base) as client:
        assert (await client.verify_checkpoint(JOB, 100))["ok"]
        target = tmp_path / "model.safetensors"
        assert await client.export_checkpoint(JOB, 100, target) == target.stat().st_size
        broken = store.root / saved[0].directory / "worker_0.safetensors"
        broken.write_bytes(broken.read_bytes()[:-1])
        answer = await client.verify_checkpoint(JOB, 100)
        assert (answer["ok"], len(answer["files"])) == (False, 3)
        with pytest.raises(CorruptCheckpoint):
            await client.export_checkpoint(JOB, 100, tmp_path / "broken.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["exports", "model.safetensors", "store"], "litter"


class FailingFile(io.BytesIO):
    """A file on a disk that fails at the third read."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads == 3:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


async def test_a_file_that_cannot_be_read_on_breaks_off(
    api: Api,
    node: MemoryNode,
    saved: list[Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What follows the bytes that were sent must not pass for more of them."""
    content = bytes(10 * 1024)

    class FailingPath(type(tmp_path)):  # type: ignore[misc]
        def open(self, *_: object, **__: object) -> FailingFile:
            return FailingFile(content)

    @asynccontextmanager
    async def export(one: Checkpoint, *, everything: bool) -> AsyncIterator[Path]:
        (tmp_path / "export").write_bytes(content)
        yield FailingPath(tmp_path / "export")

    monkeypatch.setattr(node.files, "export", export)
    monkeypatch.setattr(routes, "EXPORT_CHUNK_BYTES", 1024)
    got = bytearray()

    async def receive(reply: aiohttp.ClientResponse) -> None:
        async for chunk in reply.content.iter_any():
            got.extend(chunk)

    async with asyncio.timeout(WAIT_S), api.http.get(f"{api.base}{PATH}/100/export") as reply:
        with pytest.raises(aiohttp.ClientPayloadError):
            await receive(reply)
    assert content.startswith(got)
    assert reply.headers["X-Request-Id"] in caplog.text
    assert "Input/output error" in caplog.text


@pytest.mark.parametrize("call", ["describe", "verify", "export"])
async def test_what_is_retired_while_it_is_read_is_not_called_broken(
    api: Api,
    node: MemoryNode,
    store: FileStore,
    saved: list[Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    for path in (store.root / saved[0].directory).iterdir():
        path.unlink()

    async def hears_of_it(timeout_s: float) -> None:
        node.apply(c.RetireCheckpoints(job_id=JOB, steps=(100,), reason="not kept"))

    monkeypatch.setattr(node, "read_barrier", hears_of_it)
    async with AsyncClient(api.base) as client:
        calls = {
            "describe": client.checkpoint(JOB, 100),
            "verify": client.verify_checkpoint(JOB, 100),
            "export": client.export_checkpoint(JOB, 100, tmp_path / "model.safetensors"),
        }
        read = calls.pop(call)
        for other in calls.values():
            other.close()
        with pytest.raises(NotFound, match="may have been retired"):
            await read


async def test_verifying_what_is_retired_meanwhile_is_no_failure_of_the_store(
    api: Api, node: MemoryNode, saved: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may go between two looks at them, also while a broken one is being replaced."""

    async def hears_of_it(timeout_s: float) -> None:
        node.apply(c.RetireCheckpoints(job_id=JOB, steps=(100,), reason="not kept"))

    async def finds_it_gone(*_: object) -> None:
        raise StoreError("The checkpoint store has no file 'manifest.json'.")

    monkeypatch.setattr(node, "read_barrier", hears_of_it)
    monkeypatch.setattr(node.files, "verify", finds_it_gone)
    async with AsyncClient(api.base) as client:
        with pytest.raises(NotFound, match="may have been retired"):
            await client.verify_checkpoint(JOB, 100)


class TestPatience:
    @pytest.fixture(autouse=True)
    def _fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "FIRST_WORD_S", 0.01)
        monkeypatch.setattr(patience, "BEAT_S", 0.01)

    async def test_what_takes_long_shows_that_the_node_lives(
        self, api: Api, node: MemoryNode, saved: list[Checkpoint]
    ) -> None:
        verify = node.files.verify

        async def slow(*arguments):  # type: ignore[no-untyped-def]
            await asyncio.sleep(0.1)
            return await verify(*arguments)

        node.files.verify = slow  # type: ignore[method-assign]
        reply = await api.call("POST", f"{PATH}/100/verify")
        assert reply.body.startswith(b"  ")
        assert reply.json["ok"]

    async def test_an_error_that_comes_late_is_one(
        self, api: Api, node: MemoryNode, saved: list[Checkpoint]
    ) -> None:
        async def fails(*_: object) -> None:
            await asyncio.sleep(0.1)
            raise Conflict("not now")

        node.files.verify = fails  # type: ignore[method-assign,assignment]
        async with AsyncClient(api.base) as client:
            with pytest.raises(Conflict, match="not now"):
                await client.verify_checkpoint(JOB, 100)


class TestImport:
    async def test_a_new_cluster_learns_what_a_lost_one_had(
        self, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(routes, "IMPORT_BATCH_BYTES", 500)
        for step in (100, 200, 300):
            committed(store, step)
        node = MemoryNode()
        node.files = CheckpointFiles(Stores(store.root), tmp_path / "exports")
        async with served(node) as api, AsyncClient(api.base) as client:
            for _ in range(2):
                answer = await client.import_checkpoints("local", verify=True)
                assert answer["jobs"] == [
                    {"job_id": JOB, "run_id": RUN, "steps": [100, 200, 300], "problem": ""}
                ]
            assert len(node.proposed) > 2, "in batches"
            job = await client.job(JOB)
            assert (job["status"], job["checkpoints"]["newest_step"]) == ("COMPLETED", 300)
            begun = await client.submit({"init_from": {"job": JOB, "step": 200}})
            assert node.job(begun["job_id"]).initial is not None
            assert (await client.import_checkpoints("local", job="other"))["jobs"] == []

    async def test_a_job_that_is_known_is_left_as_it_is(
        self, api: Api, saved: list[Checkpoint]
    ) -> None:
        async with AsyncClient(api.base) as client:
            (one,) = (await client.import_checkpoints("local"))["jobs"]
            assert "known to this cluster" in one["problem"]

    @pytest.mark.parametrize(
        ("body", "status", "field"),
        [
            ("{", 400, None),
            ("[]", 400, None),
            ("{}", 400, None),
            ('{"store": ""}', 400, "store"),
            ('{"store": "local", "what": 1}', 400, None),
            ('{"store": "ftp://x"}', 422, "store"),
            ('{"store": "nowhere"}', 422, "store"),
        ],
    )
    async def test_bad_input(self, api: Api, body: str, status: int, field: str | None) -> None:
        headers = {"Content-Type": "application/json"}
        reply = await api.call("POST", "/api/checkpoints/import", data=body, headers=headers)
        assert reply.status == status, reply.body
        assert reply.json.get("field") == field


async def test_waiting_for_a_checkpoint_ends_with_its_commit(
    api: Api, node: MemoryNode, saved: list[Checkpoint]
) -> None:
    async with AsyncClient(api.base) as client:
        waiting = asyncio.create_task(client.checkpoint_now(JOB, 20.0))
        await until(lambda: node.job(JOB).is_to_save, "it was asked for")
        late = replace(saved[1], step=300, directory="x", save_request=1)
        node.apply(c.CommitCheckpoint(job_id=JOB, generation=1, checkpoint=late))
        assert (await waiting)["step"] == 300
        with pytest.raises(NotFound):
            await client.checkpoint_now("job-none")
