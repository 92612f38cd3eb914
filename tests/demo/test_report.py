"""The demo's verdicts: each expectation fails on its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distroml.demo.report import judge, show, write_json
from distroml.demo.story import Facts

MANIFEST = b"{}"


def incident(number: int, node: str, pid: int | None) -> dict[str, Any]:
    return {
        "number": number, "generation": number, "next_generation": number + 1, "reason": "r",
        "cause": {"node": node, "pid": pid}, "recovered_at": "2026-01-31T12:00:00.000Z",
        "steps_lost": 2, "phases_ms": {"total": 100.0},
    }  # fmt: skip


CHECKPOINT = {
    "step": 50, "epoch": 1, "generation": 1, "shards": 4, "size_bytes": 1, "directory": "x",
    "manifest": "manifest.json", "manifest_sha256": hashlib.sha256(MANIFEST).hexdigest(),
}  # fmt: skip


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_bytes(MANIFEST)
    result = {"metrics": {"accuracy": 0.9}}
    return Facts(
        started_at=0.0,
        seed=0,
        steps=100,
        job={"status": "COMPLETED", "step": 100, "reason": "", "result": result},
        checkpoints=[CHECKPOINT],
        incidents=[incident(1, "c", 7), incident(2, "a", None)],
        killed_worker={"rank": 3, "node": "c", "pid": 7},
        killed_leader="a",
        new_leader="b",
        node_back=True,
    )


def copies_in(store: Path, path: str) -> list[Path]:
    return [store / path]


def broken(facts: Facts, store: Path) -> list[str]:
    return [one.expected for one in judge(facts, partial(copies_in, store)) if not one.held]


def test_everything_holds(facts: Facts, tmp_path: Path) -> None:
    assert broken(facts, tmp_path) == []


def _set(name: str, value: Any) -> Callable[[Facts, Path], None]:
    return lambda facts, _: setattr(facts, name, value)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda f, _: f.job.update(status="FAILED"), "the job is COMPLETED"),
        (lambda f, _: f.job.update(step=99), "every step was done"),
        (lambda f, _: f.job["result"]["metrics"].update(accuracy=0.85), "accuracy is above 0.85"),
        (lambda f, _: f.job.update(result=None), "accuracy is above 0.85"),
        (_set("new_leader", "a"), "a new leader was elected"),
        (_set("new_leader", None), "a new leader was elected"),
        (_set("node_back", False), "the killed node came back"),
        (lambda f, _: f.incidents.pop(0), "the worker's death was recovered from"),
        (lambda f, _: f.incidents[0].update(recovered_at=None), "the worker's death was recovered from"),
        (lambda f, _: f.incidents.pop(1), "the leader's death was recovered from"),
        (_set("checkpoints", []), "checkpoints are committed, their manifests whole on disk"),
        (lambda _, d: (d / "x/manifest.json").unlink(), "checkpoints are committed, their manifests whole on disk"),
        (lambda _, d: (d / "x/manifest.json").write_bytes(b"[]"), "checkpoints are committed, their manifests whole on disk"),
    ],
)  # fmt: skip
def test_each_expectation_fails_on_its_own(
    facts: Facts, tmp_path: Path, harm: Callable[[Facts, Path], None], expected: str
) -> None:
    harm(facts, tmp_path)
    assert broken(facts, tmp_path) == [expected]


def test_a_demo_that_never_began_fails_and_is_still_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Facts(started_at=0.0, seed=0, steps=100)
    verdicts = judge(nothing, partial(copies_in, tmp_path))
    assert not any(one.held for one in verdicts)
    show(nothing, verdicts)
    assert "never submitted" in capsys.readouterr().out


def test_the_numbers_are_written_for_programs(facts: Facts, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    write_json(file, facts, judge(facts, partial(copies_in, tmp_path)))
    document = json.loads(file.read_text())
    assert document["held"] is True
    assert document["accuracy"] == 0.9
    assert [one["steps_lost"] for one in document["incidents"]] == [2, 2]
