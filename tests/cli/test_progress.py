"""What a watched job looks like after each kind of event."""

from __future__ import annotations

from distroml.cli.progress import JobProgress, clock, render
from tests.cli.api import job


def progress() -> JobProgress:
    return JobProgress(job("job-1"))


def state(status: str, reason: str = "r", generation: int = 2) -> dict[str, object]:
    return {"type": "state", "status": status, "reason": reason, "generation": generation}


def test_metrics_move_the_job_on() -> None:
    one = progress()
    one.apply({"type": "metric", "step": 8, "epoch": 1, "rank": 0, "at": "t", "loss": 0.125})
    facts = one.facts()
    assert (facts["step"], facts["loss"], facts["epoch"]) == ("8/10", "0.1250", "1")


def test_resources_tell_workers_and_time_left() -> None:
    one = progress()
    workers = [{"rank": 1, "node": "b", "pid": 1, "phase": "RESTORING", "step": 5}]
    one.apply(
        {"type": "resource", "workers": workers, "total_steps": 20, "eta_s": 61.0, "epoch": 0}
    )
    assert one.workers() == ["1 on b (RESTORING)"]
    assert one.facts()["eta"] == "1:01"
    assert "1 RESTORING" in one.line()


def test_recoveries_are_news_and_checkpoints_are_not() -> None:
    one = progress()
    for status in ("CHECKPOINTING", "RUNNING", "RECOVERING", "STARTING", "RUNNING"):
        one.apply(state(status))
    told = [status for status, _ in one.changes]
    assert told == ["RUNNING", "RECOVERING", "STARTING", "RUNNING"]
    one.apply(state("CHECKPOINTING"))
    assert one.status == "CHECKPOINTING"
    one.apply({"type": "checkpoint", "event": "committed", "step": 50})
    assert one.facts()["checkpoint"] == "step 50"
    one.apply({"type": "checkpoint", "event": "abandoned", "step": 60})
    assert one.facts()["checkpoint"] == "step 50"


def test_the_picture_has_all_parts_and_nothing_that_steers_the_terminal() -> None:
    from rich.console import Console

    one = progress()
    one.apply(state("RECOVERING", "worker 2 said \x1b[2J"))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(one))
    text = console.export_text()
    for part in ("job-1", "step 5/10", "0 on a (TRAINING)", "RECOVERING", "worker 2 said"):
        assert part in text
    assert "\x1b" not in text


def test_durations() -> None:
    assert [clock(s) for s in (0.4, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]
