"""``distroml checkpoint``: list, show, verify, ask for, export, import and remove checkpoints."""

from __future__ import annotations

import importlib
import secrets
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from distroml.cli.context import (
    Ctx,
    JobReference,
    console,
    local_time,
    print_json,
    print_table,
    size,
)
from distroml.cli.lookup import find_job
from distroml.client import SAVE_TIMEOUT_S, AsyncClient, Json
from distroml.errors import InvalidRequest, NotFound, StoreError, Unavailable

SAFETENSORS, TORCH = ".safetensors", ".pt"
MAX_SHOWN_TENSORS = 200

checkpoint = App(
    name="checkpoint",
    help="List, show, verify, save, export, import and remove checkpoints.",
    default_parameter=Parameter(negative=()),
    help_epilogue="",
)

Step = Annotated[int | None, Parameter(name="--step")]


@checkpoint.command(name="list", sort_key=0)
def list_(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """List a job's committed checkpoints that are kept."""

    async def work(client: AsyncClient) -> Json:
        return await client.checkpoints((await find_job(client, job_id))["job_id"])

    page = ctx.run(work)
    if ctx.json:
        print_json(page)
        return 0
    print_table(
        (
            "STEP",
            "EPOCH",
            "GENERATION",
            "SHARDS",
            "SIZE",
            "STATUS",
            "METRIC",
            "COMMITTED",
            "DIRECTORY",
        ),
        (
            (
                *(row.get(name) for name in ("step", "epoch", "generation", "shards")),
                size(row.get("size_bytes")),
                row.get("status"),
                _number(row.get("metric")),
                local_time(row.get("committed_at")),
                row.get("directory"),
            )
            for row in page["checkpoints"]
        ),
        empty="No checkpoint is committed yet.",
        right=("STEP", "EPOCH", "GENERATION", "SHARDS", "SIZE", "METRIC"),
    )
    return 0


@checkpoint.command(sort_key=1)
def show(job_id: JobReference, /, *, step: Step = None, ctx: Ctx) -> int:
    """Show a checkpoint's files and tensors.

    Args:
        step: of the checkpoint; default: the newest committed.
    """

    found = ctx.run(_with_step(job_id, step, AsyncClient.checkpoint))
    if ctx.json:
        print_json(found)
        return 0
    out = console()
    cursor = found["cursor"]
    for name, value in (
        ("job", found["job_id"]),
        ("step", found["step"]),
        ("status", f"{found['status']} {found['reason']}".strip()),
        ("store", f"{found['store']} {found['directory']}"),
        ("manifest", f"{found['manifest']} {found['manifest_sha256']}"),
        ("size", size(found["size_bytes"])),
        ("metric", _number(found["metric"])),
        ("ranks", f"{found['world_size']} ({found['strategy']}, {found['backend']})"),
        ("data", f"epoch {cursor['epoch']}, next batch {cursor['batch']}"),
        ("refers to", ", ".join(found["refers_to"]) or "-"),
    ):
        out.print(f"{name:<12} {value}")
    out.print()
    print_table(
        ("FILE", "SIZE", "SHA-256"),
        ((row["file"], size(row["size_bytes"]), row["header_sha256"]) for row in found["files"]),
        empty="No files.",
        right=("SIZE",),
    )
    out.print()
    print_table(
        ("TENSOR", "TYPE", "SHAPE", "SIZE", "FILE"),
        (
            (row["name"], row["dtype"], str(row["shape"]), size(row["length"]), row["file"])
            for row in found["tensors"][:MAX_SHOWN_TENSORS]
        ),
        empty="No tensors.",
        right=("SIZE",),
    )
    more = len(found["tensors"]) - MAX_SHOWN_TENSORS
    if more > 0:
        sys.stderr.write(f"There are {more} more tensors; see --json.\n")
    return 0


@checkpoint.command(sort_key=2)
def verify(job_id: JobReference, /, *, step: Step = None, ctx: Ctx) -> int:
    """Have a node read every byte and compare it with what was committed; exits 74 if something differs.

    Args:
        step: of one checkpoint; default: all that are listed, but for those known to be corrupt.
    """

    async def work(client: AsyncClient) -> list[Json]:
        found = await find_job(client, job_id)
        page = await client.checkpoints(found["job_id"])
        steps = [r["step"] for r in page["checkpoints"] if r["status"] == "COMMITTED"]
        wanted = steps if step is None else [step]
        return [await client.verify_checkpoint(found["job_id"], one) for one in wanted]

    results = ctx.run(work)
    if ctx.json:
        print_json({"verified": results})
    else:
        print_table(
            ("STEP", "FILE", "SIZE", "RESULT"),
            (
                (
                    one["step"],
                    row["path"],
                    size(row["size_bytes"]),
                    row["problem"] or "as committed",
                )
                for one in results
                for row in one["files"]
            ),
            empty="No checkpoint is committed yet.",
            right=("STEP", "SIZE"),
        )
    bad = [str(one["step"]) for one in results if not one["ok"]]
    if bad:
        raise StoreError(f"Not as committed: checkpoint of step {', '.join(bad)}.")
    return 0


@checkpoint.command(sort_key=3)
def now(
    job_id: JobReference,
    /,
    *,
    wait: Annotated[bool, Parameter(negative="--no-wait", show_default=False)] = True,
    wait_s: float = SAVE_TIMEOUT_S,
    ctx: Ctx,
) -> int:
    """Have a running job save a checkpoint at its next step boundary.

    Args:
        wait: wait until it is committed (the default), or only ask for it.
        wait_s: how long to wait.
    """

    async def work(client: AsyncClient) -> Json:
        found = await find_job(client, job_id)
        if not wait:
            return await client.request_checkpoint(found["job_id"])
        return await client.checkpoint_now(found["job_id"], wait_s)

    try:
        answer = ctx.run(work)
    except TimeoutError as error:
        raise Unavailable(str(error)) from None
    if ctx.json:
        print_json(answer)
    elif wait:
        print(
            f"Step {answer['step']} is committed: {size(answer['size_bytes'])} in {answer['directory']}."
        )
    else:
        print(f"Asked for a checkpoint; the job had done {answer['step']} steps.")
    return 0


@checkpoint.command(sort_key=4)
def export(
    job_id: JobReference,
    /,
    *,
    output: Annotated[Path, Parameter(name=("-o", "--output"))],
    step: Step = None,
    all: bool = False,
    force: bool = False,
    ctx: Ctx,
) -> int:
    """Write a checkpoint's weights as one file that any tool can open.

    Args:
        output: FILE.safetensors, or FILE.pt for torch.load(FILE, weights_only=True).
        step: of the checkpoint; default: the newest committed.
        all: the optimizer's tensors too, under names that begin with 'optimizer.'.
        force: replace FILE where it exists.
    """
    if output.suffix not in (SAFETENSORS, TORCH):
        raise InvalidRequest(
            f"{output} must end in {SAFETENSORS} or {TORCH}, which says what to write.",
            field="--output",
        )
    if output.exists() and not force:
        raise InvalidRequest(f"{output} exists; replace it with --force.", field="--output")
    fetched = output
    if output.suffix == TORCH:
        fetched = output.with_name(f".{output.name}.{secrets.token_hex(4)}{SAFETENSORS}")

    async def fetch(client: AsyncClient, job: str, at: int) -> Json:
        count = await client.export_checkpoint(job, at, fetched, everything=all)
        return {"job_id": job, "step": at, "file": str(output), "size_bytes": count}

    try:
        made = ctx.run(_with_step(job_id, step, fetch))
        if fetched is not output:
            _convert(fetched, output)
            made["size_bytes"] = output.stat().st_size
    except OSError as error:
        raise StoreError(f"{output} cannot be written: {error.strerror or error}.") from None
    finally:
        if fetched is not output:
            fetched.unlink(missing_ok=True)
    if ctx.json:
        print_json(made)
    else:
        print(
            f"Wrote {output}: step {made['step']} of job {made['job_id']}, {size(made['size_bytes'])}."
        )
    return 0


def _convert(source: Path, target: Path) -> None:
    """From a safetensors file to one of ``torch.save``; the only place where the command line needs torch."""
    try:
        tensors = importlib.import_module("safetensors.torch").load_file(source)
        importlib.import_module("torch").save(tensors, target)
    except ImportError as error:
        raise InvalidRequest(
            f"Writing {TORCH} needs torch and safetensors on this machine ({error}); write {SAFETENSORS} instead.",
            field="--output",
        ) from None


@checkpoint.command(name="import", sort_key=5)
def import_(
    store: Annotated[str, Parameter(name="STORE", help="as in a spec's checkpointing.store")],
    /,
    *,
    job: str | None = None,
    verify: bool = False,
    ctx: Ctx,
) -> int:
    """Register the checkpoints that a store has, as those of jobs which have ended; for when a cluster is lost.

    Args:
        job: only those of the job with this id.
        verify: read every byte first, and leave out what does not match.
    """
    answer = ctx.run(lambda client: client.import_checkpoints(store, job=job, verify=verify))
    if ctx.json:
        print_json(answer)
        return 0
    rows = [
        (
            one["job_id"],
            one["run_id"],
            len(one["steps"]),
            max(one["steps"], default="-"),
            one["problem"],
        )
        for one in answer["jobs"]
    ]
    print_table(
        ("JOB", "RUN", "CHECKPOINTS", "NEWEST", "PROBLEM"),
        rows,
        empty=f"{store} has no checkpoints.",
        right=("CHECKPOINTS", "NEWEST"),
    )
    for one in answer["unusable"]:
        sys.stderr.write(f"left out: {one['directory']}: {one['reason']}\n")
    return 0


@checkpoint.command(sort_key=6)
def rm(
    job_id: JobReference,
    /,
    *,
    step: Annotated[int, Parameter(name="--step")],
    ctx: Ctx,
) -> int:
    """Forget a checkpoint and delete its files.

    Args:
        step: of the checkpoint. The newest of a job that goes on stays, and what others need.
    """

    async def work(client: AsyncClient) -> Json:
        found = await find_job(client, job_id)
        await client.remove_checkpoint(found["job_id"], step)
        return {"job_id": found["job_id"], "step": step}

    removed = ctx.run(work)
    if ctx.json:
        print_json(removed)
    else:
        print(
            f"The checkpoint of step {step} of job {removed['job_id']} is removed; its files go soon."
        )
    return 0


def _with_step(
    reference: str,
    step: int | None,
    action: Callable[[AsyncClient, str, int], Awaitable[Json]],
) -> Callable[[AsyncClient], Awaitable[Json]]:
    """``action`` on the checkpoint that was named, by default the newest committed one."""

    async def work(client: AsyncClient) -> Json:
        job_id = (await find_job(client, reference))["job_id"]
        if step is not None:
            return await action(client, job_id, step)
        rows = (await client.checkpoints(job_id))["checkpoints"]
        steps = [row["step"] for row in rows if row["status"] == "COMMITTED"]
        if not steps:
            raise NotFound(f"Job {job_id} has no committed checkpoint.")
        return await action(client, job_id, max(steps))

    return work


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}"
