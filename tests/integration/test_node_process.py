"""``distroml-node`` as a process: what it says, how it exits, what survives it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from distroml.local_cluster import LocalCluster, LocalNode, free_ports
from distroml.runtime.identity import DataDirectory
from tests.consensus.live import until
from tests.integration.conftest import StartCluster
from tests.integration.jobs import long_spec, until_status, until_step

LIMIT_S = 60.0


def run_node(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a node that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "distroml.node", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def assert_refused(ended: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 2 and one clear line; what was logged before does not count."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [one for one in ended.stderr.splitlines() if one.startswith("distroml-node: ")]
    for part in said:
        assert part in line


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[LocalNode]:
    """A one-node cluster that is set up by variables and a file, without workers; not started."""
    (port,) = free_ports(1)
    file = tmp_path / "node.toml"
    file.write_text(f'http = "127.0.0.1:{port}"\nslots = 7\nallowed_hosts = "lb.example"\n')
    node = LocalNode("alone", tmp_path, ["--slots", "0"], f"127.0.0.1:{port}", "")
    environ = {
        **os.environ,
        "DISTROML_CONFIG": str(file),
        "DISTROML_NAME": "alone",
        "DISTROML_DATA_DIR": str(node.data_dir),
        "DISTROML_STORE_DIR": str(tmp_path / "store"),
        "DISTROML_SLOT": "1",
    }
    node.start(environ)
    yield node
    node.kill()


async def is_up(node: LocalNode) -> None:
    await until(lambda: "API http" in node.log_tail() or not node.running, "its start", LIMIT_S)
    assert node.running, node.log_tail()


async def exit_code(node: LocalNode) -> int | None:
    await until(lambda: not node.running, "it to end", LIMIT_S)
    return node.exit_code


def test_help_tells_settings_defaults_and_exit_codes() -> None:
    ended = run_node("--help")
    assert ended.returncode == 0
    text = " ".join(ended.stdout.split())
    for part in ("--data-dir", "DISTROML_DATA_DIR", "(default: 3000)", "ms", "Exit codes: 0"):
        assert part in text


def test_wrong_settings_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    assert_refused(run_node(DISTROML_SLOTS="many"), "environment: slots: Expected `int`")
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "data")
    assert_refused(run_node("--data-dir", below), "data_dir", below, "Not a directory")


def test_a_store_that_is_not_mounted_is_refused(tmp_path: Path) -> None:
    data, store = tmp_path / "data", tmp_path / "store"
    directory = DataDirectory(data, name="a", cluster_id="distroml")
    directory.claim_store(store)
    directory.close()
    shutil.rmtree(store)
    ended = run_node("--name", "a", "--data-dir", str(data), "--store-dir", str(store))
    assert_refused(ended, f"store_dir {store}", "not mounted", str(data / "store-dir"))


async def test_two_processes_cannot_share_a_directory_or_an_address(
    alone: LocalNode, tmp_path: Path
) -> None:
    await is_up(alone)
    http = alone.url.removeprefix("http://")
    same = run_node("--name", "alone", "--data-dir", str(alone.data_dir))
    assert_refused(same, "data_dir", str(alone.data_dir), "in use by another distroml-node")
    other = str(tmp_path / "other")
    assert_refused(run_node("--http", http, "--data-dir", other), f"http {http}", "in use")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        peers = f"x={listen},y=127.0.0.1:1,z=127.0.0.1:2"
        third = run_node("--name", "x", "--peers", peers, "--data-dir", str(tmp_path / "x"))
        assert_refused(third, f"listen {listen}", "in use")
    assert alone.running


def _assert_not_ready(node: LocalNode, said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as unready:
        urllib.request.urlopen(f"{node.url}/ready", timeout=LIMIT_S)
    assert unready.value.code == 503
    assert said in unready.value.read().decode()


async def test_the_first_of_three_says_whom_it_waits_for(tmp_path: Path) -> None:
    port, http, *absent = free_ports(4)
    peers = ",".join(f"{n}=127.0.0.1:{p}" for n, p in zip("abc", (port, *absent), strict=True))
    flags = ["--name", "a", "--peers", peers, "--http", f"127.0.0.1:{http}", "--slots", "0"]
    flags += ["--data-dir", str(tmp_path / "a"), "--store-dir", str(tmp_path / "store")]
    node = LocalNode("a", tmp_path, flags, f"127.0.0.1:{http}", "")
    node.start()
    try:
        await is_up(node)
        said = "a new cluster is founded once by all of its voters; not heard yet: b, c"
        _assert_not_ready(node, said)
        await until(lambda: said in node.log_tail(), "the log to say so", LIMIT_S)
    finally:
        node.kill()


async def test_variables_file_and_flags_make_one_node_and_what_is_unknown_is_told(
    alone: LocalNode,
) -> None:
    await is_up(alone)
    log = alone.log_tail()
    assert "DISTROML_SLOT is not a setting" in log
    assert "DISTROML_SLOTS was meant" in log
    assert "node alone, incarnation 1" in log
    assert "0 slots" in log, "flags win over the file"
    _assert_metrics_explain_themselves(alone)
    assert _status_of(alone, "lb.example") == 200
    assert _status_of(alone, "other.example") == 421
    alone.signal(signal.SIGTERM)
    alone.signal(signal.SIGTERM)
    assert await exit_code(alone) == 0
    alone.start()
    await until(lambda: "incarnation 2" in alone.log_tail(), "its next life", LIMIT_S)
    alone.signal(signal.SIGINT)
    assert await exit_code(alone) == 0
    assert "Traceback" not in alone.log_tail(1000)


def _assert_metrics_explain_themselves(node: LocalNode) -> None:
    with urllib.request.urlopen(f"{node.url}/metrics", timeout=LIMIT_S) as answer:
        lines = answer.read().decode().splitlines()
    about = dict(line.split(" ", 3)[2:] for line in lines if line.startswith("# HELP "))
    assert {"distroml_link_events_total", "distroml_history_bytes"} <= about.keys()
    for name, text in about.items():
        assert text.endswith("."), f"{name} says only '{text}'"


def _status_of(node: LocalNode, host: str) -> int:
    asked = urllib.request.Request(f"{node.url}/health", headers={"Host": host})
    try:
        with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def test_a_node_that_is_stopped_while_it_starts_exits_cleanly(alone: LocalNode) -> None:
    await until((alone.data_dir / "lock").exists, "its first sign of life", LIMIT_S)
    alone.signal(signal.SIGTERM)
    assert await exit_code(alone) == 0
    assert "Traceback" not in alone.log_tail(1000)


async def test_a_job_goes_on_after_its_only_node_was_stopped_and_started(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=1, slots=1) as cluster, cluster.client() as client:
        node = cluster.nodes["a"]
        spec = long_spec(steps=1_000_000, workers=1, every=20)
        job_id = (await client.submit(spec))["job_id"]
        await until_step(cluster, client, job_id, 25)
        _assert_torch_stays_with_the_workers(node)
        assert await node.stop() == 0
        assert sorted(node.data_dir.glob("*.sock")) == []
        node.start()
        await until_status(cluster, client, job_id, "RUNNING", "CHECKPOINTING")
        job = await until_step(cluster, client, job_id, 40)
        assert job["generation"] >= 2
        assert job["restarts"] == 0, "a planned stop is no failure"
        (incident,) = (await client.incidents(job_id))["incidents"]
        assert incident["resume_step"] >= 20
        await client.cancel(job_id)


def _assert_torch_stays_with_the_workers(node: LocalNode) -> None:
    assert node.pid is not None
    assert "libtorch" not in Path(f"/proc/{node.pid}/maps").read_text()
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    assert any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in children)


async def test_a_node_that_lost_its_directory_comes_back_as_a_new_one(
    start_cluster: StartCluster,
) -> None:
    """Its incarnation would start from 1 again, and with it the names of its proposals."""
    async with start_cluster(nodes=3, slots=0) as cluster:
        async with cluster.client("b") as client:
            before = [(await client.submit({"name": f"before-{n}"}))["job_id"] for n in range(5)]
        node = cluster.nodes["b"]
        node.kill()
        shutil.rmtree(node.data_dir)
        node.start()
        await cluster.wait_ready("b")
        async with cluster.client("b") as client:
            after = [(await client.submit({"name": f"after-{n}"}))["job_id"] for n in range(5)]
            kept = [job["job_id"] for job in (await client.jobs(limit=100))["jobs"]]
        assert sorted(kept) == sorted(before + after)
        assert "starting anew: the cluster has seen incarnation 1" in node.log_tail(1000)
        await _reports_are_taken(cluster, "b", incarnation=2)


async def _reports_are_taken(cluster: LocalCluster, name: str, incarnation: int) -> None:
    """Every other node hears it, under its new incarnation."""
    for other in cluster.nodes.keys() - {name}:
        async with cluster.client(other) as client:
            await cluster.until(
                client.nodes,
                lambda answer: any(
                    one["name"] == name
                    and one["status"] == "ALIVE"
                    and one["incarnation"] == incarnation
                    and one["heartbeat_age_s"] is not None
                    for one in answer["nodes"]
                ),
                f"{other} to hear {name}",
            )
