"""The benchmarks of consensus: their arithmetic, what they refuse, and one short run of each for real."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import consensus, elections, etcd, failover
from bench.http_load import Load, closed_loop, complete, post
from bench.parts import Bench, run_parts
from bench.processes import Broken
from bench.raft_trio import RaftTrio
from bench.table import Row, percentile

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
SHORT_S = 0.2


def without_etcd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd, "installed", lambda: False)


# --- arithmetic


def test_a_percentile_is_the_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([7.0], 0.5) == 7.0
    for values, share in (([], 0.5), ([1.0], 0.0), ([1.0], 1.1)):
        with pytest.raises(ValueError, match="no percentile"):
            percentile(values, share)


def test_a_load_is_a_rate_and_latencies_in_milliseconds() -> None:
    load = Load([0.001, 0.002, 0.009, 0.003], wall_s=0.5)
    assert load.rate == 8.0
    assert (load.ms(0.5), load.ms(1.0)) == (2.0, 9.0)


def loads(rate: float, latency_s: float) -> consensus.Loads:
    return {n: Load([latency_s] * 10, wall_s=10 / rate) for n in consensus.CLIENTS}


def test_rows_compare_with_etcd_and_aim_at_rate_and_latency() -> None:
    rows = consensus.rows("writes", [loads(20, 0.002)], [loads(10, 0.004)], [[0.001]])
    assert [row.ratio for row in rows] == [2.0] * 9
    aimed = {row.quantity: row.aim_met for row in rows if row.aim}
    assert aimed == {"writes, 256 clients": True, "writes, 1 client: p50": True}


def test_without_etcd_one_client_is_held_against_the_disk_and_the_table_says_how_to_get_it() -> (
    None
):
    rows = consensus.rows("writes", [loads(20, 0.002)], [], [[0.001], [0.001]])
    beside = {row.quantity: row.ratio for row in rows if row.peer is not None}
    assert beside == {"writes, 1 client: p50": 0.5}
    assert "apt-get install etcd-server" in rows[0].note
    assert not any(row.aim for row in rows), "there is nothing to judge by"


def test_times_of_failover_are_judged_by_median_and_tail() -> None:
    rows = failover.rows([0.2] * 98 + [0.9, 3.0], [1.5, 2.0], "note")
    assert [row.ours for row in rows] == [0.2, 0.9, 3.0]
    assert [row.peer for row in rows] == [1.5, 2.0, 2.0]
    assert [row.aim_met for row in rows] == [True, True, None]
    assert {row.runs for row in rows} == {100}
    assert len(rows[0].values.ours) == 100


@pytest.mark.parametrize(
    ("leaders", "changes"),
    [([], 0), (["a"], 0), (["a", None, "a"], 0), (["a", None, "b", "b", "a"], 2)],
)
def test_leader_changes_are_counted_between_known_leaders(
    leaders: list[str | None], changes: int
) -> None:
    assert elections.leader_changes(leaders) == changes


def test_an_election_that_nobody_needed_misses_the_aim() -> None:
    calm = elections._Sample("a", 3, 0, 100)
    rows = elections.rows([calm, elections._Sample("b", 4, 0, 900)], 2, "note")
    assert {row.quantity: (row.ours, row.aim_met) for row in rows} == {
        "spurious leader changes": (1.0, False),
        "spurious elections (terms)": (1.0, False),
        "restarts of the job": (0.0, True),
        "rounds of pre-votes": (2.0, None),
        "steps trained meanwhile": (800.0, None),
    }


def test_a_counter_is_read_or_missed() -> None:
    text = "# TYPE x counter\nx 3.0\nxy 4\n"
    assert elections.counter(text, "x") == 3
    with pytest.raises(Broken, match="has no z"):
        elections.counter(text, "z")


# --- the driver


@pytest.mark.parametrize("cut", [0, 10, len(ANSWER) - 1])
def test_an_answer_is_complete_with_its_last_byte(cut: int) -> None:
    assert not complete(ANSWER[:cut])
    assert complete(ANSWER)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}", "refused.*503"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "no usable length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "no usable length"),
        (b"x" * (2 << 20), "no end"),
    ],
)
def test_answers_that_cannot_count_are_refused(answer: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        complete(answer)


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[str, int]]:
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        host, port = listening.sockets[0].getsockname()[:2]
        yield host, port


async def test_a_closed_loop_has_one_request_per_client_under_way() -> None:
    inside, most, seen = 0, 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal inside, most, seen
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n{}"):
                inside, seen = inside + 1, seen + 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1
                writer.write(ANSWER)
        writer.close()

    async with server(serve) as at:
        load = await closed_loop([at], lambda: post("/x", b"{}"), 4, SHORT_S)
    assert len(load.latencies_s) == seen
    assert 1 <= most <= 4
    assert load.wall_s >= SHORT_S


async def test_a_connection_that_ends_fails_the_load() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with server(serve) as at:
        with pytest.raises(Broken, match="a connection ended"):
            await closed_loop([at], lambda: post("/x", b"{}"), 2, SHORT_S)


# --- usage


def test_rows_are_kept_where_nothing_else_is_said() -> None:
    assert program.result_file("spine", quick=False) == Path("bench-results/spine.json")
    assert program.result_file("spine", quick=True) == Path("bench-results/spine-quick.json")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["consensus", "--load"], "no option --load"),
        (["failover", "--minutes", "1"], "no option --minutes"),
        (["consensus", "--only", "grpc"], "not grpc"),
    ],
)
def test_an_option_that_a_benchmark_does_not_take_is_an_error(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "x", "nan", "100000"])
def test_minutes_that_make_no_sense_are_refused(
    minutes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["elections", "--minutes", minutes])
    assert "--minutes" in capsys.readouterr().err


async def test_a_part_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    async def bad(bench: Bench[int]) -> list[Row]:
        raise Broken("why it failed\nand more")

    async def good(bench: Bench[int]) -> list[Row]:
        return [failover._missing(failover.Writes())]

    rows, failures = await run_parts({"bad": bad, "good": good}, (), 1, tmp_path, lambda _: None)
    assert failures == ["bad: Broken: why it failed"]
    assert len(rows) == 1


# --- for real


async def test_three_members_commit_and_end_with_their_cluster(tmp_path: Path) -> None:
    async with RaftTrio(tmp_path) as trio:
        load = await trio.load(4, SHORT_S)
        processes = list(trio.processes.values())
    assert load.latencies_s
    assert all(process.returncode is not None for process in processes)


async def test_a_member_that_dies_is_named_with_what_it_wrote(tmp_path: Path) -> None:
    async with RaftTrio(tmp_path) as trio:
        name = await trio.leader()
        trio.processes[name].kill()
        await trio.processes[name].wait()
        (tmp_path / f"{name}.log").write_text("why it died")
        with pytest.raises(Broken, match=f"member {name} ended: why it died"):
            await trio.load(1, SHORT_S)


def test_consensus_in_process_is_measured_for_real_without_etcd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_etcd(monkeypatch)
    file = tmp_path / "consensus.json"
    assert program.main(["consensus", "--quick", "--only", "raft", "--json", str(file)]) == 0
    written = json.loads(file.read_bytes())
    assert len(written["rows"]) == 9
    assert all(row["ours"] > 0 for row in written["rows"])
    assert "etcd is not installed" in capsys.readouterr().out


def test_failover_is_measured_for_real_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_etcd(monkeypatch)
    monkeypatch.setattr(failover, "QUICK", failover.Scale(kills=1, etcd_kills=0, load=False))
    file = tmp_path / "failover.json"
    assert program.main(["failover", "--quick", "--json", str(file)]) == 0
    *times, missing = json.loads(file.read_bytes())["rows"]
    assert all(0 < row["ours"] < failover.NEXT_WRITE_TIMEOUT_S for row in times)
    assert missing["ours"] == 0


@pytest.mark.skipif(not etcd.installed(), reason="needs etcd (apt-get install etcd-server)")
async def test_etcd_is_driven_over_its_gateway_and_ends_with_its_cluster(tmp_path: Path) -> None:
    async with etcd.EtcdCluster(tmp_path) as cluster:
        leader = await cluster.leader()
        load = await closed_loop(cluster.endpoints(), etcd.puts(), 3, SHORT_S)
        processes = list(cluster._processes.values())
        cluster.kill(leader)
        cluster.reap(leader)
        cluster.start(leader)
        assert await cluster.leader() in etcd.MEMBERS
    assert load.latencies_s
    assert all(process.poll() is not None for process in processes)
