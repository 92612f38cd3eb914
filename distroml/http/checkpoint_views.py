"""What the API shows of checkpoints: records of the log and manifests in, JSON shapes out. Pure."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, structs

from distroml.http.views import Timestamp, timestamp
from distroml.model import Checkpoint, Job, JobStatus
from distroml.reports import DataCursor
from distroml.runtime.checkpoint.manifest import Manifest


class CheckpointView(Struct, frozen=True, kw_only=True):
    """A checkpoint whose commit is in the log."""

    step: int
    epoch: int
    generation: int
    status: str
    reason: str
    committed_at: Timestamp
    directory: str
    manifest: str
    manifest_sha256: str
    size_bytes: int
    shards: int
    store: Annotated[str, Meta(description="as in the spec's checkpointing.store")] = "local"
    refers_to: Annotated[
        list[str],
        Meta(description="directories of earlier checkpoints in whose files some tensors are"),
    ] = []
    metric: Annotated[
        float | None, Meta(description="value of the spec's checkpointing.best_metric")
    ] = None
    save_request: Annotated[
        int, Meta(description="the newest request for a checkpoint that this one answers")
    ] = 0


class CheckpointList(Struct, frozen=True, kw_only=True):
    job_id: str
    checkpoints: list[CheckpointView]
    save_request: Annotated[int, Meta(description="how often a checkpoint was asked for")] = 0
    saved_request: Annotated[
        int, Meta(description="the newest of these requests that a committed checkpoint answered")
    ] = 0


class SaveRequestView(Struct, frozen=True, kw_only=True):
    """A checkpoint was asked for."""

    job_id: str
    save_request: Annotated[
        int, Meta(description="it is committed once saved_request of the list is as much")
    ]
    saved_request: int
    step: Annotated[int, Meta(description="steps completed, as this node knew")]
    status: JobStatus


class ShardView(Struct, frozen=True, kw_only=True):
    """One file of a checkpoint."""

    rank: int
    file: str
    size_bytes: int
    header_sha256: Annotated[
        str, Meta(description="of its header, which has the hashes of the rest")
    ]


class TensorView(Struct, frozen=True, kw_only=True):
    """One tensor and where its bytes are."""

    name: str
    dtype: str
    shape: list[int]
    file: Annotated[
        str, Meta(description="in the checkpoint's directory, or DIRECTORY/FILE of an earlier one")
    ]
    offset: int
    length: int
    codec: Annotated[str, Meta(description="none or zstd")]
    blake3: Annotated[list[str], Meta(description="of each piece of 16 MiB, as stored")]


class CheckpointDetail(CheckpointView, frozen=True, kw_only=True):
    """A checkpoint with what its manifest says."""

    job_id: str
    run_id: str
    world_size: Annotated[int, Meta(description="ranks that wrote it")]
    strategy: str
    backend: str
    cursor: Annotated[DataCursor, Meta(description="the next batch of the data")]
    has_optimizer: bool
    sample_digest: Annotated[
        str, Meta(description="rolling SHA-256 over the sample ids that each step so far consumed")
    ]
    files: list[ShardView]
    tensors: list[TensorView]


class FileView(Struct, frozen=True, kw_only=True):
    """What became of one file."""

    path: str
    size_bytes: int
    problem: Annotated[str, Meta(description="empty: every byte is as committed")]


class VerificationView(Struct, frozen=True, kw_only=True):
    """Every byte of a checkpoint was read and compared."""

    job_id: str
    step: int
    ok: bool
    files: list[FileView]


class ImportedJobView(Struct, frozen=True, kw_only=True):
    """What was found of one run."""

    job_id: str
    run_id: str
    steps: Annotated[list[int], Meta(description="of the checkpoints that are known now")]
    problem: Annotated[str, Meta(description="why not all are; empty: they are")]


class UnusableView(Struct, frozen=True, kw_only=True):
    """A directory that looks like a checkpoint and was left out."""

    directory: str
    reason: str


class ImportView(Struct, frozen=True, kw_only=True):
    """What a store has."""

    store: str
    jobs: list[ImportedJobView]
    unusable: list[UnusableView]


def checkpoint_view(one: Checkpoint) -> CheckpointView:
    """One committed checkpoint."""
    return CheckpointView(
        step=one.step,
        epoch=one.epoch,
        generation=one.generation,
        status=one.status.value,
        reason=one.reason,
        committed_at=timestamp(one.committed_at),
        directory=one.directory,
        manifest=one.manifest,
        manifest_sha256=one.manifest_sha256,
        size_bytes=one.size_bytes,
        shards=one.shards,
        store=one.store,
        refers_to=list(one.refers_to),
        metric=one.metric,
        save_request=one.save_request,
    )


def checkpoint_detail(job: Job, one: Checkpoint, manifest: Manifest) -> CheckpointDetail:
    """One committed checkpoint with the files and tensors of its manifest."""
    return CheckpointDetail(
        **structs.asdict(checkpoint_view(one)),
        job_id=job.job_id,
        run_id=job.run_id,
        world_size=manifest.world_size,
        strategy=manifest.strategy,
        backend=manifest.backend,
        cursor=manifest.cursor,
        has_optimizer=manifest.has_optimizer,
        sample_digest=manifest.sample_digest,
        files=[
            ShardView(
                rank=shard.rank,
                file=shard.file,
                size_bytes=shard.size_bytes,
                header_sha256=shard.header_sha256,
            )
            for shard in manifest.shards
        ],
        tensors=[
            TensorView(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=list(tensor.shape),
                file=tensor.file,
                offset=tensor.offset,
                length=tensor.length,
                codec=tensor.codec,
                blake3=list(tensor.blake3),
            )
            for tensor in manifest.tensors
        ],
    )
