"""Rows, medians and JSON of a benchmark, the command line, and the cheapest real measurement."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench import __main__ as program
from bench import starts
from bench.processes import Broken, kill_tree, run_to_end, start_cost
from bench.table import Aim, Report, compare, environment, figure, median, show, write_json
from bench.workloads import steps_per_s
from distroml.local_cluster import free_ports

ROW_KEYS = {"quantity", "unit", "ours", "peer_name", "peer", "ratio", "aim", "aim_met", "runs"}


def test_median_is_the_middle_or_the_mean_of_two() -> None:
    assert median([9.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 9.0]) == 3.0
    with pytest.raises(ValueError, match="no median"):
        median([])


@pytest.mark.parametrize(("better", "ratio"), [("lower", 4.0), ("higher", 0.25)])
def test_a_ratio_above_one_means_that_ours_is_better(better: str, ratio: float) -> None:
    row = compare("q", "s", better, ours=[1.0], peer_name="p", peer=[4.0])  # type: ignore[arg-type]
    assert row.ratio == ratio


@pytest.mark.parametrize(
    ("aim", "met"),
    [
        (Aim("ratio", ">=", 2.0), True),
        (Aim("ratio", ">", 2.0), False),
        (Aim("ours", "<", 3.0), False),
        (Aim("ours", "<=", 3.0), True),
    ],
)
def test_aims_judge_medians(aim: Aim, met: bool) -> None:
    row = compare("q", "s", "lower", ours=[3.0, 1.0, 7.0], peer_name="p", peer=[6.0], aim=aim)
    assert row.aim_met is met
    assert row.aim == str(aim)
    assert row.runs == 1, "the side that ran less often counts"


def test_a_row_without_a_peer_has_no_ratio_and_no_verdict_on_it() -> None:
    row = compare("q", "s", "lower", ours=[1.0], peer_name="", peer=[], aim=Aim("ratio", ">=", 1.0))
    assert (row.peer, row.ratio, row.aim_met) == (None, None, None)


def test_json_has_the_agreed_keys_and_facts_of_the_environment(tmp_path: Path) -> None:
    row = compare("q", "s", "lower", ours=[1.0, 3.0], peer_name="p", peer=[4.0, 4.0])
    report = Report(
        bench="spine",
        quick=True,
        started_at="2026-01-01T00:00:00+00:00",
        wall_s=1.0,
        environment=environment(tmp_path),
        rows=[row],
        failures=["part: why"],
    )
    file = tmp_path / "new" / "report.json"
    write_json(report, file)
    written = json.loads(file.read_bytes())
    assert set(written["rows"][0]) >= ROW_KEYS
    assert written["rows"][0]["ours"] == 2.0
    assert written["rows"][0]["values"] == {"ours": [1.0, 3.0], "peer": [4.0, 4.0]}
    assert {"python", "torch", "cores", "filesystem"} <= set(written["environment"])
    assert str(tmp_path) not in file.read_text(), "no path of the machine"


def test_the_table_shows_rows_notes_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    row = compare(
        "speed", "1/s", "higher", ours=[1.0], peer_name="peer", peer=[4.0], note="a [note]",
        aim=Aim("ratio", ">=", 0.95),
    )  # fmt: skip
    report = Report(
        bench="spine", quick=False, started_at="", wall_s=1.0, environment={}, rows=[row], failures=["x: y"],
    )  # fmt: skip
    show(report, Console(file=sys.stdout, width=120))
    shown = capsys.readouterr().out
    for text in ("speed [1]", "[1] a [note]", "0.250", "NO", "FAILED: x: y"):
        assert text in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.04219, "0.0422"),
        (1.0, "1.00"),
        (123.4, "123"),
        (5000.0, "5,000"),
    ],
)
def test_figures_have_three_digits(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_steady_rate_leaves_out_the_first_epoch_and_the_gaps_between_epochs() -> None:
    slow = [0.0, 9.0, 18.0, 27.0]
    quick = [100.0, 100.5, 101.0, 101.5, 200.0, 200.5, 201.0, 201.5]
    assert steps_per_s([*slow, *quick], epoch_steps=4) == 2.0
    assert steps_per_s([*slow, *quick, 999.0], epoch_steps=4) == 2.0, "half an epoch is left out"
    with pytest.raises(ValueError, match="no steady epoch"):
        steps_per_s(slow, epoch_steps=4)


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    shown = capsys.readouterr().out
    for name, line in program.BENCHMARKS.items():
        assert f"{name} " in shown
        assert line in shown


@pytest.mark.parametrize("argv", [["nothing"], ["spine", "--only", "nothing"]])
def test_an_unknown_name_is_a_usage_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(argv) == 2
    shown = capsys.readouterr().err
    assert "nothing" in shown
    assert "spine" in shown


def test_failed_commands_are_named_with_their_output(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="ended with 3: why it failed"):
        run_to_end(["-c", "print('why it failed'); raise SystemExit(3)"])
    (port,) = free_ports(1)
    with pytest.raises(Broken, match="did not answer /ready: no such thing"):
        start_cost(["-c", "print('no such thing')"], port, "/ready", tmp_path / "log")


def test_a_killed_tree_leaves_no_process_behind() -> None:
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        watched = os.pidfd_open(int(parent.stdout.readline()))
        try:
            kill_tree(parent.pid)
            ended, _, _ = select.select([watched], [], [], 10.0)
        finally:
            os.close(watched)
    assert ended, "the child of a killed process to end"
    assert parent.returncode == -signal.SIGKILL


def test_importing_and_asking_for_the_version_are_measured_for_real() -> None:
    rows = starts.commands(runs=1)
    assert [row.quantity.partition(":")[0] for row in rows[::2]] == [
        "import distroml",
        "distroml --version",
    ]
    assert all(row.ours > 0 and row.peer and row.ratio for row in rows)


def test_a_node_start_is_measured_for_real(tmp_path: Path) -> None:
    rows = starts.node(runs=1, directory=tmp_path)
    assert [row.unit for row in rows] == ["s", "s"]
    assert all(row.ours > 0 and row.peer for row in rows)
