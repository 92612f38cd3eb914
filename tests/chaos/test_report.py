"""The report: its tally, and a page that holds all that it shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chaos.checkers import judge
from chaos.records import EventSeen, FaultBegan, JobEnded, Operation, Outcome, Violation
from chaos.report import summary, write_report
from chaos.tally import quantile
from chaos.timeline import timeline
from tests.chaos import histories as h


def test_the_tally_counts_what_happened() -> None:
    history = [
        *h.good(),
        h.submit("k2", 2.0, 2.5, outcome=Outcome.UNKNOWN),
        h.submit("k3", 2.0, 2.5, outcome=Outcome.FAILED),
    ]
    told = summary(history, [])
    assert told["held"]
    assert told["complete"]
    assert told["faults"] == {
        "total": 1,
        "by_family": {"process": 1},
        "by_kind": {"worker-kill": 1},
    }
    submits = told["operations"]["submit"]
    assert (submits["ok"], submits["failed"], submits["unknown"]) == (2, 1, 1)
    assert submits["p99_ms"] == pytest.approx(100.0), "only those that ended well are timed"
    assert told["operations"]["read_job, linearizable"]["ok"] == 1
    assert told["recoveries"]["phases"]["decide"]["p50_ms"] == 4.0
    assert told["recoveries"]["steps_lost"] == {"total": 1, "most": 1, "none": 0}
    assert told["goodput"]["useful_steps"] == h.STEPS, "the undisturbed job is not counted"
    assert told["goodput"]["repeated_steps"] == 1
    assert [(job["job_id"], job["undisturbed"]) for job in told["jobs"]] == [
        (h.REFERENCE, True),
        (h.JOB, False),
    ]
    assert told["streams"]["followed"] == 3


def test_the_files_say_the_same_and_need_nothing_else(tmp_path: Path) -> None:
    broken = h.changed(h.good(), JobEnded, lambda one: replace(one, model_sha256="n"), 1)
    hostile = "</script><script>alert(1)</script> & <b>"
    broken = h.changed(broken, FaultBegan, lambda one: replace(one, detail={"file": hostile}))
    violations = judge(broken)
    report = write_report(tmp_path, broken, violations)
    assert not report["held"]
    report = msgspec.json.decode(msgspec.json.encode(report))
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes()) == report
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<script>") == page.count("</script>") == 1, "data cannot end the script"
    assert not re.search(r"(src|href)\s*=|@import|url\((?!#)", page), "nothing from elsewhere"
    data = re.search(r"^const DATA = (.*);$", page, re.MULTILINE)
    assert data is not None
    shown = msgspec.json.decode(data.group(1))
    assert shown["report"] == report
    assert shown["timeline"]["faults"][0]["detail"]["file"] == hostile
    assert shown["timeline"]["violations"][0]["checker"] == "same_result"


def test_a_history_that_was_cut_off_at_any_place_has_a_report(tmp_path: Path) -> None:
    history = h.good()
    for count in range(len(history)):
        part = history[:count]
        write_report(tmp_path, part, judge(part))


def test_the_timeline_shows_a_jobs_life() -> None:
    (job,) = timeline(h.good(), [])["jobs"]
    assert (job["name"], job["state"], job["total"]) == ("digits", "COMPLETED", h.STEPS)
    assert [bar["state"] for bar in job["states"]] == ["RUNNING", "RECOVERING", "STARTING"]
    assert [number for _, number in job["generations"]] == [1, 2]
    assert [step for _, step in job["commits"]] == [2, 4]
    assert job["incidents"][0]["steps_lost"] == 1


def test_a_node_that_lags_does_not_turn_a_job_back() -> None:
    late = replace(h.seen(3.4, index=12, state="RUNNING", generation=1), node="b")
    (job,) = timeline([*h.good(), late], [])["jobs"]
    assert [bar["state"] for bar in job["states"]] == ["RUNNING", "RECOVERING", "STARTING"]


def test_a_fault_that_was_not_taken_back_lasts_to_the_end() -> None:
    open_ = FaultBegan(
        at_s=3.0, fault=9, kind="link-cut", family="network", nodes=("a",), detail={}
    )
    shown = timeline([*h.good(), open_], [Violation(checker="x", what="y", at_s=2.0)])
    assert shown["faults"][-1]["end_s"] == shown["end_s"] == 7.0
    assert "not taken back" in shown["faults"][-1]["note"]


def test_jobs_that_overlap_have_rows_of_their_own() -> None:
    other = [
        replace(one, job_id="job-2")
        for one in h.good()
        if isinstance(one, EventSeen) or type(one).__name__ == "JobSeen"
    ]
    jobs = timeline([*h.good(), *other], [])["jobs"]
    assert {job["row"] for job in jobs} == {0, 1}


def test_operations_are_counted_in_bins_that_bound_the_picture() -> None:
    many = [
        Operation(
            invoked_s=float(at),
            at_s=float(at),
            client="c",
            node="a",
            kind="read_jobs",
            outcome=Outcome.OK,
        )
        for at in range(7200)
    ]
    shown = timeline(many, [])["operations"]
    assert sum(shown["ok"]) == 7200
    assert len(shown["ok"]) <= 601


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_reached_by_the_share_that_it_names(
    values: list[float], share: float
) -> None:
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert sum(one <= found for one in ordered) >= share * len(ordered) - 1e-9
    assert sum(one < found for one in ordered) < share * len(ordered)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to draw the page")
def test_a_browser_draws_the_page_without_complaint(tmp_path: Path) -> None:
    history = h.changed(h.good(), JobEnded, lambda one: replace(one, model_sha256="n"), 1)
    write_report(tmp_path, history, judge(history))
    assert BROWSER is not None
    drawn = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in drawn.stderr, "the script had something to say"
    assert drawn.stdout.count("<table") == 7
    for shown in ("1 violation", "same_result", "worker-kill", "g2", "checkpoint 4 committed"):
        assert shown in drawn.stdout, shown
