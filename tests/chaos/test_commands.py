"""The command line: what it refuses, what it lists, and a short real run with a replay and a second judgement."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from chaos import leftovers, run
from chaos.__main__ import BROKEN, HELD, NOTHING, main
from chaos.cluster import Cluster
from chaos.kinds import KINDS
from chaos.mutants import MUTANTS
from chaos.network import marks_of_namespaces
from chaos.processes import marked, own_mark, start_time
from chaos.records import Ended, FaultBegan, FaultEnded, read_history
from chaos.schedule import Planned, Schedule
from chaos.storage import marks_of_mounts

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
POLL_S = 0.1


def test_all_faults_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-faults"]) == HELD

    listed = capsys.readouterr().out
    for kind in KINDS:
        assert f"{kind.name} " in listed
        assert kind.does in listed


def test_all_mutants_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "--list"]) == HELD

    listed = capsys.readouterr().out
    assert len(MUTANTS) >= 6
    assert all(mutant.name in listed for mutant in MUTANTS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--faults", "earthquake"], "earthquake: neither a family"),
        (["run", "--faults", "partition", "--no-namespaces"], "partition cannot be inflicted here"),
        (["replay", "/nowhere"], "No such file"),
        (["judge", "/nowhere"], "No such file"),
        (["mutants", "teenage"], "there is no mutant teenage"),
    ],
)
def test_what_cannot_be_run_is_told(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == NOTHING

    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["run", "--duration", "1"], ["run", "--nodes", "4"], ["soak", "--hours", "nan"], []],
)
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == NOTHING


SHORT = run.Plan(
    schedule=Schedule(
        seed=7,
        duration_s=9.0,
        nodes=3,
        planned=(
            Planned(at_s=1.5, kind="worker-kill", lasts_s=0.0, choices={"count": 1}, pick=0.3),
            Planned(
                at_s=3.0, kind="leader-kill", lasts_s=0.5, choices={"node": "leader"}, pick=0.1
            ),
            Planned(
                at_s=4.0,
                kind="sync-slow",
                lasts_s=1.0,
                choices={"node": "any", "pause_s": 0.02},
                pick=0.9,
            ),
            Planned(at_s=6.0, kind="all-off", lasts_s=0.3, pick=0.5),
        ),
    ),
    kinds=("worker-kill", "leader-kill", "sync-slow", "all-off"),
    jobs=1,
    specs=("points-lone",),
)


@pytest.mark.timeout(180)
async def test_a_short_run_holds_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    result = await run.run(SHORT, folder)

    assert result.violations == ()
    assert result.missed == ()
    assert result.inflicted == ("worker-kill", "leader-kill", "sync-slow", "all-off")
    history = read_history(folder)
    began = {record.fault for record in history if isinstance(record, FaultBegan)}
    assert began == {record.fault for record in history if isinstance(record, FaultEnded)}
    assert isinstance(history[-1], Ended)
    assert (folder / "report.html").exists()
    assert (folder / "report.json").exists()
    assert not (folder / "disks").exists()
    assert list(marked(own_mark())) == []
    assert own_mark() not in marks_of_namespaces() | marks_of_mounts()
    assert run.read_plan(folder) == SHORT
    assert run.judge_again(folder) == ()
    with pytest.raises(FileExistsError):
        await run.run(SHORT, folder)


def test_a_broken_promise_is_told_of_a_history_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leader = '{"type":"leader","at_s":%s,"node":"%s","term":3}\n'
    began = '{"type":"began","at_s":0,"seed":1,"duration_s":5,"nodes":3,"faults":[]}\n'
    (tmp_path / "history.jsonl").write_text(began + leader % (1, "a") + leader % (2, "b"))

    assert main(["judge", str(tmp_path)]) == BROKEN

    assert "VIOLATION leaders" in capsys.readouterr().out


@pytest.mark.timeout(180)
async def test_what_a_killed_harness_left_goes_with_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = msgspec.json.encode(SHORT).decode()
    code = (
        "import asyncio, sys, msgspec; from pathlib import Path; from chaos import run\n"
        "asyncio.run(run.run(msgspec.json.decode(sys.argv[1], type=run.Plan), Path(sys.argv[2])))"
    )
    harness = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, plan, str(folder)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    mark = f"{harness.pid}-{start_time(harness.pid)}"
    async with asyncio.timeout(START_TIMEOUT_S):
        while len(list(marked(mark))) < SHORT.schedule.nodes:  # noqa: ASYNC110 - processes tell nobody
            await asyncio.sleep(POLL_S)
    harness.send_signal(signal.SIGKILL)
    await harness.wait()
    assert list(marked(mark))

    await leftovers.remove_of_dead_harnesses()

    assert list(marked(mark)) == []
    assert mark not in marks_of_namespaces() | marks_of_mounts()


def test_nodes_find_a_run_whose_folder_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(Path("runs/one"), namespaces=False)
    assert cluster.folder == tmp_path / "runs/one"
    assert cluster.store_dir.is_absolute()
