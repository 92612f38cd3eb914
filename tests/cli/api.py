"""A small imitation of the API for the command line's tests."""

from __future__ import annotations

import struct
from typing import Any

from aiohttp import web


def job(job_id: str, name: str = "n", status: str = "RUNNING", **more: Any) -> dict[str, Any]:
    """A job's document with every member that is relied upon."""
    return {
        "job_id": job_id, "run_id": "run-1", "name": name, "status": status, "reason": "because",
        "generation": 1, "restarts": 0, "step": 5, "total_steps": 10, "epoch": 0, "eta_s": 2.0,
        "created_at": "2026-01-31T12:00:00.250Z", "metrics": {"loss": 0.5},
        "workers": [{"rank": 0, "node": "a", "pid": 7, "phase": "TRAINING", "step": 5}],
        "checkpoints": {"count": 1, "newest_step": 5}, "result": None, **more,
    }  # fmt: skip


METRIC = {
    "type": "metric", "step": 6, "epoch": 0, "generation": 1, "rank": 0, "loss": 0.25, "cursor": "1",
}  # fmt: skip
STATE = {
    "type": "state", "status": "RUNNING", "reason": "all train", "generation": 1, "cursor": "0",
}  # fmt: skip
_HEADER = b'{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
PLAIN_FILE = struct.pack("<Q", len(_HEADER)) + _HEADER + struct.pack("<ff", 1.0, 2.0)
LINES = [
    {"generation": 1, "rank": 0, "at": "2026-01-31T12:00:01.000Z", "line": "first"},
    {"generation": 1, "rank": 1, "at": "2026-01-31T12:00:02.000Z", "line": "second"},
]


class Api:
    """Answers for ``jobs``; a stream plays ``events`` and ends in each job's ``final`` status."""

    def __init__(self, *jobs: dict[str, Any], final: str = "COMPLETED") -> None:
        self.jobs = {one["job_id"]: one for one in jobs}
        self.final = final
        self.events: list[dict[str, Any]] = [STATE, METRIC]
        self.end = True
        self.saved_request = 1
        self.problem = ""

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        _, _, noun, *rest = [*request.path.split("/"), "", ""]
        match noun, [part for part in rest if part]:
            case "jobs", []:
                if request.method == "POST":
                    made = job("job-new", (await request.json()).get("name", "job"), "QUEUED")
                    self.jobs[made["job_id"]] = made
                    return web.json_response(made, status=201)
                return web.json_response({"jobs": list(self.jobs.values()), "next_cursor": None})
            case "jobs", [job_id, *more]:
                if job_id not in self.jobs:
                    return _missing(job_id)
                return await self._job(request, self.jobs[job_id], more)
            case "checkpoints", ["import"]:
                return web.json_response({"store": "local", "jobs": [_IMPORTED], "unusable": []})
            case "cluster", ["nodes", name, "drain"]:
                drains = (await request.json())["drain"]
                status = "DRAINING" if drains else "ALIVE"
                return web.json_response({"nodes": [{**_NODE, "name": name, "status": status}]})
            case "cluster", [part]:
                if request.method == "POST":
                    wanted = (await request.json())["node"]
                    return web.json_response({"leader": wanted, "term": 5, "url": None})
                return web.json_response(_CLUSTER[part])
        return _missing(request.path)

    async def _job(
        self, request: web.Request, one: dict[str, Any], more: list[str]
    ) -> web.StreamResponse:
        match request.method, more:
            case "GET", []:
                return web.json_response(one)
            case "DELETE", []:
                return _ended(request.query["only"], one)
            case "POST", ["stop"]:
                return web.json_response({**one, "status": "STOPPING"}, status=202)
            case "GET", ["logs"]:
                wanted = request.query.get("rank")
                lines = [line for line in LINES if wanted in (None, str(line["rank"]))]
                return web.json_response({"job_id": one["job_id"], "lines": lines})
            case "GET", ["checkpoints"]:
                page = {"job_id": one["job_id"], "checkpoints": [_CHECKPOINT]}
                return web.json_response({**page, "saved_request": self.saved_request})
            case "POST", ["checkpoint"]:
                asked = {"job_id": one["job_id"], "save_request": 1, "saved_request": 0}
                return web.json_response({**asked, "step": 5, "status": "RUNNING"}, status=202)
            case method, ["checkpoints", "5", *verb]:
                return self._checkpoint(method, verb, one["job_id"])
            case _, ["checkpoints", step, *_]:
                return _missing(f"checkpoint of step {step}: no checkpoint")
            case "GET", ["incidents"]:
                return web.json_response({"job_id": one["job_id"], "incidents": [_INCIDENT]})
            case "GET", ["stream"]:
                return await self._stream(request, one)
        return _missing(request.path)

    def _checkpoint(self, method: str, verb: list[str], job_id: str) -> web.Response:
        match method, verb:
            case "GET", []:
                return web.json_response({**_CHECKPOINT, **_DETAIL, "job_id": job_id})
            case "DELETE", []:
                return web.Response(status=204)
            case "GET", ["export"]:
                return web.Response(body=PLAIN_FILE)
            case _:
                row = {"path": "x/worker_0.safetensors", "size_bytes": 9, "problem": self.problem}
                answer = {"job_id": job_id, "step": 5, "ok": not self.problem, "files": [row]}
                return web.json_response(answer)

    async def _stream(self, request: web.Request, one: dict[str, Any]) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for event in self.events:
            await socket.send_json(event)
        if self.end:
            self.jobs[one["job_id"]] = {**one, "status": self.final}
            await socket.send_json(
                {"type": "end", "status": self.final, "reason": "", "cursor": "9"}
            )
        else:
            await socket.receive()
        await socket.close()
        return socket


def _ended(only: str, one: dict[str, Any]) -> web.Response:
    if (one["status"] in ("COMPLETED", "FAILED")) is (only == "cancel"):
        detail = f"Job '{one['job_id']}' is {one['status']}."
        problem = {"type": "/problems/conflict", "status": 409, "detail": detail}
        return web.json_response(problem, status=409)
    if only == "remove":
        return web.Response(status=204)
    return web.json_response({**one, "status": "CANCELLED"}, status=202)


def _missing(what: str) -> web.Response:
    problem = {"type": "/problems/not-found", "status": 404, "detail": f"There is no {what}."}
    return web.json_response(problem, status=404)


_CHECKPOINT = {
    "step": 5, "epoch": 0, "generation": 1, "status": "COMMITTED", "reason": "", "shards": 4,
    "committed_at": "2026-01-31T12:00:00.250Z", "directory": "job-1/run-1/x", "size_bytes": 2048,
    "manifest": "manifest.json", "manifest_sha256": "0", "store": "local", "metric": 0.125, "refers_to": [],
    "save_request": 1,
}  # fmt: skip
_DETAIL = {
    "run_id": "run-1", "world_size": 4, "strategy": "data_parallel", "backend": "gloo", "has_optimizer": True,
    "cursor": {"epoch": 0, "batch": 5},
    "files": [{"rank": 0, "file": "worker_0.safetensors", "size_bytes": 9, "header_sha256": "ab"}],
    "tensors": [{"name": "model.weight", "dtype": "F32", "shape": [2, 2], "file": "worker_0.safetensors",
                 "offset": 8, "length": 16, "codec": "none", "blake3": ["cd"]}],
}  # fmt: skip
_IMPORTED = {"job_id": "job-7", "run_id": "run-7", "steps": [10, 20], "problem": ""}
_INCIDENT = {
    "number": 1, "generation": 1, "next_generation": 2, "reason": "worker 2 exited by SIGKILL",
    "steps_lost": 3, "phases_ms": {"detect": 1.5, "rendezvous": 31.5, "total": 200.25},
    "source": "rank 3",
}  # fmt: skip
_NODE = {
    "name": "a", "status": "ALIVE", "role": "voter", "leader": True, "slots": 2, "slots_used": 1, "incarnation": 3,
    "cpu_percent": 12.0, "memory_bytes": 1048576, "http": "http://a:1", "reason": "",
}  # fmt: skip
_CLUSTER: dict[str, dict[str, Any]] = {
    "nodes": {"nodes": [_NODE]},
    "leader": {"leader": "a", "term": 4, "url": "http://a:1"},
    "resources": {"slots": {"total": 2, "used": 1, "free": 1}, "jobs": {"RUNNING": 1}, "nodes": []},
}
