"""A history as a good run leaves it behind, small enough to be read, for tests that break one thing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from chaos.records import (
    Began,
    Ended,
    EventSeen,
    FaultBegan,
    FaultEnded,
    Incident,
    JobEnded,
    JobSeen,
    LeaderSeen,
    MemorySeen,
    NodeSeen,
    Operation,
    Outcome,
    Record,
    Settled,
    StateDigest,
    Streamed,
)

STEPS = 6
JOB, REFERENCE = "job-1", "job-0"
LOSSES = {step: float(step).hex() for step in range(1, STEPS + 1)}
SAMPLES = {2: "s2", 4: "s4", STEPS: "s6"}
METRICS = tuple(
    f"{generation}.0.{step}={LOSSES[step]}"
    for generation, steps in ((1, range(1, 4)), (2, range(3, STEPS + 1)))
    for step in steps
)
"""Generation 2 did step 3 again."""
LOGS = ("1.0:t1 aa", "1.0:t2 bb", "2.0:t3 cc")
EVENTS = ("10:state QUEUED", "12:state RUNNING", "14:checkpoint committed 2", "20:state COMPLETED")

R = TypeVar("R", bound=Struct)


def good() -> list[Record]:
    """One job, struck once; clients that read it; all nodes agree."""
    return [
        submit("k0", 0.1, 0.2, index=5, job_id=REFERENCE),
        ended(REFERENCE, undisturbed=True, checkpoint_generations={2: 1, 4: 1}),
        Began(at_s=1.0, seed=1, duration_s=5.0, nodes=2, faults=("worker-kill",)),
        NodeSeen(at_s=1.0, node="a", answers=True, role="leader", term=3),
        NodeSeen(at_s=1.0, node="b", answers=True, role="follower", term=3),
        LeaderSeen(at_s=1.0, node="a", term=3),
        submit("k1", 2.0, 2.1, index=10),
        read(2.2, 2.3, index=11, state="STARTING", generation=1),
        seen(2.5, index=12, state="RUNNING", generation=1),
        event(2.5, 12, "state", status="RUNNING", generation=1),
        event(2.7, 14, "checkpoint_committed", step=2),
        ask("s1", 2.8, 2.9, index=15, number=1),
        FaultBegan(
            at_s=3.0, fault=0, kind="worker-kill", family="process", nodes=("b",), detail={}
        ),
        FaultEnded(at_s=3.0, fault=0),
        seen(3.1, index=16, state="RECOVERING", generation=1, restarts=1),
        seen(3.3, index=17, state="STARTING", generation=2, restarts=1),
        event(3.3, 17, "state", status="STARTING", generation=2),
        read(3.4, 3.5, index=18, state="RUNNING", generation=2, restarts=1, linearizable=True),
        event(3.8, 19, "checkpoint_committed", step=4),
        read(4.0, 4.1, index=20, state="COMPLETED", generation=2, restarts=1),
        Settled(at_s=5.0, leader_s=0.2, progress_s={JOB: 0.5}),
        stream("metrics", METRICS, "follower"),
        stream("logs", LOGS, "follower"),
        stream("events", EVENTS, "follower"),
        Incident(
            at_s=3.0,
            job_id=JOB,
            generation=1,
            reason="worker 0 killed by SIGKILL",
            phases_ms={"detect": 2.0, "decide": 4.0},
            total_ms=40.0,
            steps_lost=1,
            next_generation=2,
            resume_step=2,
            highest_step=3,
        ),
        ended(JOB),
        ended(REFERENCE, checkpoint_generations={2: 1, 4: 1}),
        stream("metrics", METRICS, "aftermath", reference=True),
        stream("logs", LOGS, "aftermath", reference=True),
        StateDigest(at_s=6.0, node="a", log_index=21, sha256="x"),
        StateDigest(at_s=6.0, node="b", log_index=21, sha256="x"),
        MemorySeen(at_s=2.0, node="a", pid=1, rss_bytes=50 * 2**20, files=30, threads=4),
        Ended(at_s=7.0),
    ]


def ended(job_id: str, *, undisturbed: bool = False, **changes: object) -> JobEnded:
    whole = JobEnded(
        at_s=5.5,
        job_id=job_id,
        spec_name="digits",
        undisturbed=undisturbed,
        state="COMPLETED",
        losses=LOSSES,
        samples=SAMPLES,
        model_sha256="m",
        checkpoints={2: "", 4: ""},
        total_steps=STEPS,
        checkpoint_generations={2: 1, 4: 2},
        save_request=0 if job_id == REFERENCE else 1,
        log_index=21,
    )
    return replace(whole, **changes)


def submit(
    key: str,
    invoked_s: float,
    at_s: float,
    *,
    index: int | None = None,
    job_id: str | None = JOB,
    outcome: Outcome = Outcome.OK,
) -> Operation:
    ok = outcome is Outcome.OK
    view = {"state": "QUEUED", "generation": 0, "restarts": 0} if ok else {}
    return Operation(
        invoked_s=invoked_s,
        at_s=at_s,
        client="keeper",
        node="a",
        kind="submit",
        outcome=outcome,
        job_id=job_id if ok else None,
        key=key,
        log_index=index,
        result={"name": "digits", **view},
    )


def read(
    invoked_s: float,
    at_s: float,
    *,
    index: int,
    state: str = "RUNNING",
    generation: int = 1,
    restarts: int = 0,
    node: str = "b",
    linearizable: bool = False,
) -> Operation:
    return Operation(
        invoked_s=invoked_s,
        at_s=at_s,
        client="reader",
        node=node,
        kind="read_job",
        linearizable=linearizable,
        outcome=Outcome.OK,
        job_id=JOB,
        log_index=index,
        status=200,
        result={"state": state, "generation": generation, "restarts": restarts},
    )


def ask(key: str, invoked_s: float, at_s: float, *, index: int, number: int) -> Operation:
    return Operation(
        invoked_s=invoked_s,
        at_s=at_s,
        client="saver",
        node="a",
        kind="checkpoint_now",
        outcome=Outcome.OK,
        job_id=JOB,
        key=key,
        log_index=index,
        result={"save_request": number, "saved_request": 0},
    )


def seen(at_s: float, *, index: int, state: str, generation: int, restarts: int = 0) -> JobSeen:
    return JobSeen(
        at_s=at_s,
        node="a",
        job_id=JOB,
        name="digits",
        state=state,
        generation=generation,
        step=1,
        restarts=restarts,
        log_index=index,
    )


def event(at_s: float, index: int, name: str, **data: object) -> EventSeen:
    return EventSeen(at_s=at_s, node="a", log_index=index, job_id=JOB, name=name, data=data)


def stream(name: str, items: tuple[str, ...], client: str, *, reference: bool = False) -> Streamed:
    return Streamed(
        at_s=5.2,
        client=client,
        job_id=JOB,
        stream=name,
        items=items,
        connections=3,
        ended=True,
        reference=reference,
    )


def changed(
    history: list[Record], kind: type[R], change: Callable[[R], R | None], number: int = 0
) -> list[Record]:
    """The history with the ``number``-th record of a kind changed, or left out where ``change`` says None."""
    found: list[Record] = []
    for record in history:
        if isinstance(record, kind):
            number -= 1
            if number == -1:
                made = change(record)
                if made is not None:
                    found.append(made)  # type: ignore[arg-type]
                continue
        found.append(record)
    assert number < 0, f"there is no such {kind.__name__}"
    return found
