"""What is known of a job while it is watched: its document and the events of its stream, folded together.

``JobProgress`` is the state (no I/O), ``render`` its rich face, ``line`` its plain one. ``watch`` and the demo
feed and show it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from distroml.cli.context import printable
from distroml.client import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_CHANGES = 8
"""State changes that are shown."""
_SAVING = "CHECKPOINTING"
_RESOURCES = ("workers", "total_steps", "eta_s", "epoch")
_COLOURS = {
    "RUNNING": "green",
    "CHECKPOINTING": "green",
    "COMPLETED": "bold green",
    "RECOVERING": "yellow",
    "STOPPING": "yellow",
    "FAILED": "bold red",
    "CANCELLED": "red",
}


class JobProgress:
    """A job as it was last heard of.

    Args:
        job: its document, as ``GET /api/jobs/{id}`` answers.
    """

    def __init__(self, job: Json) -> None:
        self.job = job
        self.metrics: dict[str, float] = {}
        self.status = ""
        self.changes: deque[tuple[str, str]] = deque(maxlen=MAX_CHANGES)
        self.refresh(job)

    def refresh(self, job: Json) -> None:
        """Take a newer document of the job."""
        self.job = job
        self.metrics.update(job.get("metrics") or {})
        self._change(job["status"], job.get("reason", ""))

    def apply(self, event: Json) -> None:
        """Take an event of the stream."""
        match event["type"]:
            case "state":
                self.job["generation"] = event["generation"]
                self._change(event["status"], event["reason"])
            case "metric":
                self.job["step"], self.job["epoch"] = event["step"], event["epoch"]
                numbers = {name: value for name, value in event.items() if type(value) is float}
                self.metrics.update(numbers)
            case "checkpoint" if event["event"] == "committed":
                self.job["checkpoints"] = {"newest_step": event["step"]}
            case "resource":
                self.job.update((name, event[name]) for name in _RESOURCES)

    def facts(self) -> dict[str, str]:
        """What stands beside the progress bar, in its order."""
        job, metrics = self.job, self.metrics
        facts = {"step": f"{job['step']}/{job.get('total_steps') or '?'}"}
        if "loss" in metrics:
            facts["loss"] = f"{metrics['loss']:.4f}"
        if "throughput" in metrics:
            facts["throughput"] = f"{metrics['throughput']:.0f}/s"
        if job.get("eta_s") is not None:
            facts["eta"] = clock(job["eta_s"])
        facts["epoch"] = str(job.get("epoch", 0))
        facts["generation"] = str(job.get("generation", 0))
        newest = (job.get("checkpoints") or {}).get("newest_step")
        facts["checkpoint"] = "none" if newest is None else f"step {newest}"
        return facts

    def workers(self) -> list[str]:
        """Each rank, such as ``0 on a (TRAINING)``."""
        return [
            printable(f"{worker['rank']} on {worker['node']} ({worker['phase']})")
            for worker in self.job.get("workers") or ()
        ]

    def line(self) -> str:
        """Everything that changes, on one line."""
        shown = " ".join(f"{name} {value}" for name, value in self.facts().items())
        phases = Counter(worker["phase"] for worker in self.job.get("workers") or ())
        workers = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
        return f"{self.status} {shown}" + (f" workers {workers}" if workers else "")

    def _change(self, status: str, reason: str) -> None:
        # saving checkpoints is the ordinary course of a job: shown as its status, not told as news
        ordinary = status == _SAVING or (self.status, status) == (_SAVING, "RUNNING")
        self.status = status
        if not ordinary and (status, reason) not in list(self.changes)[-1:]:
            self.changes.append((status, reason))


def render(progress: JobProgress) -> RenderableType:
    """The live picture of a job."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    job = progress.job
    title = Table.grid(padding=(0, 2))
    title.add_row(
        Text(printable(job["name"]), "bold"),
        Text(job["job_id"], "dim"),
        Text(progress.status, _COLOURS.get(progress.status, "cyan")),
    )
    bar = Table.grid(expand=True)  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=job.get("total_steps") or 1, completed=job["step"]))
    facts = Text("   ").join(
        Text.assemble((f"{name} ", "dim"), value) for name, value in progress.facts().items()
    )
    parts: list[Any] = [title, bar, facts]
    if workers := progress.workers():
        parts.append(Text.assemble(("workers ", "dim"), ", ".join(workers)))
    for status, reason in progress.changes:
        parts.append(
            Text.assemble((f"{status:<13} ", _COLOURS.get(status, "cyan")), printable(reason))
        )
    return Group(*parts)


def clock(duration_s: float) -> str:
    """A duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
