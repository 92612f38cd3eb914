"""What a user may ask for: ``JobSpec``, its parts, defaults, ranges and validation.

A spec enters through ``parse_spec`` (HTTP body, CLI file) and is then immutable: it is replicated
with the job and handed to each worker unchanged. Everything that this version cannot do is refused
here, at submit, with a ``NotBuilt`` error; nothing is silently ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE, InvalidSpec, NotBuilt
from distroml.misspelt import field_paths, meant, unknown_field
from distroml.store_urls import parse_store

MAX_WORKERS = 1024
MAX_OPTIONS = 32

Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=63,
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z",
        description="1 to 63 letters, digits, '.', '_' or '-'; starts and ends with a letter or digit",
    ),
]
OptionValue = bool | int | float | Annotated[str, Meta(max_length=4096)]
Options = Annotated[
    dict[Annotated[str, Meta(max_length=63)], OptionValue], Meta(max_length=MAX_OPTIONS)
]


class Resources(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What one run occupies."""

    workers: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_WORKERS,
            description="ranks, and logical shards of each batch; all start or none (gang) unless min_workers",
        ),
    ] = 1
    min_workers: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=MAX_WORKERS,
                description="fewest ranks to go on with where slots are missing; null: workers",
            ),
        ]
        | None
    ) = None
    spares: Annotated[
        int,
        Meta(
            ge=0, le=MAX_WORKERS, description="prepared processes that replace a dead rank at once"
        ),
    ] = 0
    gpus_per_worker: Annotated[
        int, Meta(ge=0, le=16, description="0; GPUs are not available in this version")
    ] = 0

    @property
    def fewest(self) -> int:
        """Ranks that the run must have at least."""
        return self.workers if self.min_workers is None else self.min_workers


class Distributed(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """How the ranks work together."""

    strategy: Annotated[str, Meta(description="data_parallel")] = "data_parallel"
    backend: Annotated[str, Meta(description="gloo, or nccl: each worker has a GPU of its own")] = (
        "gloo"
    )
    reduction: Annotated[
        str,
        Meta(
            description="deterministic (gradients summed in the order of logical shards: the same bits "
            "whatever fails and however many workers there are) or fast (each worker adds its own shards first: less to "
            "send where it has several, and other bits)"
        ),
    ] = "deterministic"


class Hyperparameters(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The knobs of the optimisation itself."""

    batch_size: Annotated[
        int, Meta(ge=1, le=1_048_576, description="global batch in samples, cut over the ranks")
    ] = 64
    lr: Annotated[float, Meta(gt=0.0, le=1000.0, description="learning rate")] = 1e-3
    epochs: Annotated[int, Meta(ge=1, le=1_000_000, description="passes over the dataset")] = 1
    optimizer: Annotated[str, Meta(description="adam, adamw or sgd")] = "adam"
    weight_decay: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0, description="sgd only")] = 0.0


class Checkpointing(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """When the state is saved and where."""

    enabled: bool = True
    every_n_steps: Annotated[
        int, Meta(ge=1, le=1_000_000_000, description="steps between checkpoints")
    ] = 200
    store: Annotated[
        str,
        Meta(
            max_length=1024,
            description="local (the nodes' own disks, --store-dir, each file on several of them), file:///directory that all "
            "nodes see, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix; options such as ?endpoint=URL, "
            "never credentials",
        ),
    ] = "local"
    replicas: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=16,
                description="nodes that have each file, as far as there are so many; store local only "
                "(null: 2)",
            ),
        ]
        | None
    ) = None
    keep_last: Annotated[
        int, Meta(ge=1, le=1000, description="newest checkpoints that are kept")
    ] = 5
    keep_every_n_steps: (
        Annotated[
            int, Meta(ge=1, le=1_000_000_000, description="those of multiples of it are kept too")
        ]
        | None
    ) = None
    keep_best: Annotated[
        int, Meta(ge=0, le=1000, description="and so many with the best value of best_metric")
    ] = 0
    best_metric: Annotated[
        str, Meta(min_length=1, max_length=63, description="metric that keep_best goes by")
    ] = "loss"
    best_is: Annotated[str, Meta(description="min or max")] = "min"
    delta: Annotated[
        bool,
        Meta(description="refer to tensors of an earlier checkpoint that did not change"),
    ] = False
    compression: Annotated[
        str, Meta(description="none, or zstd (bytes shuffled by place, then Zstandard)")
    ] = "none"


class InitFrom(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Another job's committed checkpoint that a new job begins with."""

    job: Annotated[str, Meta(min_length=1, max_length=64, description="id of that job")]
    step: Annotated[int, Meta(ge=0, description="its step; null: the newest committed")] | None = (
        None
    )
    weights_only: Annotated[
        bool, Meta(description="take the model alone and start at step 0; else go on from its step")
    ] = False


class Compression(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Gradient compression; not available in this version."""

    enabled: bool = False


class JobSpec(Struct, frozen=True, gc=False, forbid_unknown_fields=True, kw_only=True):
    """A training job as submitted. Every field has a default and a documented range."""

    name: Name = "job"
    framework: Annotated[str, Meta(description="pytorch")] = "pytorch"
    model: Annotated[str, Meta(max_length=63, description="mlp, cnn or transformer")] = "mlp"
    model_options: Options = {}
    dataset: Annotated[str, Meta(max_length=63, description="synthetic, digits or text")] = (
        "synthetic"
    )
    dataset_options: Options = {}
    resources: Resources = Resources()
    distributed: Distributed = Distributed()
    hyperparameters: Hyperparameters = Hyperparameters()
    checkpointing: Checkpointing = Checkpointing()
    init_from: InitFrom | None = None
    compression: Compression = Compression()
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="keys all randomness of the run")] = 0
    steps: (
        Annotated[int, Meta(ge=1, le=1_000_000_000, description="total steps; null: epochs decide")]
        | None
    ) = None
    max_restarts: Annotated[
        int,
        Meta(
            ge=0, le=10_000, description="failures in a row without progress before the job fails"
        ),
    ] = 3
    priority: Annotated[
        int, Meta(ge=-1000, le=1000, description="higher is scheduled first; then FIFO")
    ] = 0
    entrypoint: Annotated[
        str | None,
        Meta(
            description="package.module:AdapterClass on the node's path; replaces model and dataset"
        ),
    ] = None


_ENTRYPOINT = re.compile(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*:[A-Za-z_][\w]*\Z")

# field -> (values this version runs, values it knows but does not have yet)
_CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "framework": (("pytorch",), ("jax", "tensorflow")),
    "distributed.strategy": (
        ("data_parallel",),
        ("fsdp", "zero", "tensor_parallel", "pipeline_parallel", "hybrid", "parameter_server"),
    ),
    "distributed.backend": (("gloo", "nccl"), ("mpi",)),
    "distributed.reduction": (("deterministic", "fast"), ()),
    "hyperparameters.optimizer": (("adam", "adamw", "sgd"), ()),
    "checkpointing.best_is": (("min", "max"), ()),
    "checkpointing.compression": (("none", "zstd"), ()),
    "model": (("mlp", "cnn", "transformer"), ()),
    "dataset": (("synthetic", "digits", "text"), ()),
}
# which built-in models can read which built-in datasets
_READS: dict[str, tuple[str, ...]] = {
    "mlp": ("synthetic", "digits"),
    "cnn": ("synthetic", "digits"),
    "transformer": ("text",),
}


class Option(Struct, frozen=True, gc=False):
    """One option of a built-in model or dataset: type, default and inclusive range."""

    default: bool | int | float | str
    low: float | None = None
    high: float | None = None


MODEL_OPTIONS: dict[str, dict[str, Option]] = {
    "mlp": {"hidden": Option(128, 1, 65_536), "layers": Option(2, 1, 64)},
    "cnn": {"channels": Option(16, 1, 4096), "dropout": Option(0.0, 0.0, 0.95)},
    "transformer": {
        "layers": Option(2, 1, 96),
        "heads": Option(4, 1, 128),
        "width": Option(64, 8, 16_384),
        "context": Option(64, 2, 8192),
        "dropout": Option(0.0, 0.0, 0.95),
    },
}
DATASET_OPTIONS: dict[str, dict[str, Option]] = {
    "synthetic": {
        "samples": Option(8192, 1, 1_000_000_000),
        "features": Option(64, 1, 65_536),
        "classes": Option(10, 2, 65_536),
    },
    "digits": {"holdout": Option(0.2, 0.01, 0.9)},
    "text": {
        "path": Option(""),
        "max_bytes": Option(1_048_576, 1024, 1_073_741_824),
        "holdout": Option(0.05, 0.01, 0.9),
    },
}


def parse_spec(body: bytes) -> JobSpec:
    """Decode and validate a JSON job specification.

    Raises:
        InvalidSpec: wrong JSON type, unknown field or value out of range; names the field.
        NotBuilt: a value that is known but not available in this version.
    """
    try:
        spec = msgspec.json.decode(body, type=JobSpec)
    except msgspec.ValidationError as error:
        raise _from_validation(error) from None
    except UNDECODABLE as error:
        raise InvalidSpec(f"The job specification is not valid JSON: {error}") from None
    check(spec)
    return spec


def convert_spec(document: Any) -> JobSpec:
    """Validate a job specification already decoded from YAML or TOML; errors as ``parse_spec``."""
    try:
        spec = msgspec.convert(document, type=JobSpec)
    except msgspec.ValidationError as error:
        raise _from_validation(error) from None
    check(spec)
    return spec


def check(spec: JobSpec) -> None:
    """Check what types cannot say: choices, combinations and features that are not built."""
    for path, (available, planned) in _CHOICES.items():
        if spec.entrypoint is not None and path in ("model", "dataset"):
            continue
        _check_choice(path, _value_at(spec, path), available, planned)
    if spec.resources.gpus_per_worker:
        raise NotBuilt(
            "resources.gpus_per_worker must be 0: GPU workers are not available in this version.",
            field="resources.gpus_per_worker",
        )
    if spec.compression.enabled:
        raise NotBuilt(
            "compression.enabled must be false: gradient compression is not available in this version.",
            field="compression.enabled",
        )
    parse_store(spec.checkpointing.store, "checkpointing.store")
    saving = spec.checkpointing
    if saving.replicas is not None and saving.store != "local":
        raise InvalidSpec(
            "checkpointing.replicas is for the store 'local', whose copies the nodes keep; leave it out "
            "with a store of another kind.",
            field="checkpointing.replicas",
        )
    if spec.hyperparameters.batch_size < spec.resources.workers:
        raise InvalidSpec(
            f"hyperparameters.batch_size ({spec.hyperparameters.batch_size}) is the global batch and "
            f"must be at least resources.workers ({spec.resources.workers}), so that each rank has a sample.",
            field="hyperparameters.batch_size",
        )
    fewest = spec.resources.min_workers
    if fewest is not None and fewest > spec.resources.workers:
        raise InvalidSpec(
            f"resources.min_workers ({fewest}) must not exceed resources.workers ({spec.resources.workers}).",
            field="resources.min_workers",
        )
    if spec.entrypoint is not None:
        if not _ENTRYPOINT.match(spec.entrypoint) or len(spec.entrypoint) > 255:
            raise InvalidSpec(
                f"entrypoint must look like 'package.module:AdapterClass', not {spec.entrypoint!r}.",
                field="entrypoint",
            )
        return
    if spec.dataset not in _READS[spec.model]:
        raise InvalidSpec(
            f"model '{spec.model}' cannot read dataset '{spec.dataset}'; "
            f"it reads: {', '.join(_READS[spec.model])}.",
            field="dataset",
        )
    _check_options("model_options", spec.model, spec.model_options, MODEL_OPTIONS[spec.model])
    _check_options(
        "dataset_options", spec.dataset, spec.dataset_options, DATASET_OPTIONS[spec.dataset]
    )
    if spec.model == "transformer":
        width, heads = (option_value(spec, "model", name) for name in ("width", "heads"))
        if int(width) % int(heads):
            raise InvalidSpec(
                f"model_options.width ({width}) must be a multiple of model_options.heads ({heads}).",
                field="model_options.width",
            )


def option_value(spec: JobSpec, part: str, name: str) -> bool | int | float | str:
    """The value of a built-in option of ``part`` ('model' or 'dataset'), default filled in."""
    given, table = (
        (spec.model_options, MODEL_OPTIONS[spec.model])
        if part == "model"
        else (spec.dataset_options, DATASET_OPTIONS[spec.dataset])
    )
    return given.get(name, table[name].default)


def _value_at(spec: JobSpec, path: str) -> str:
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name)
    return str(value)


def _check_choice(
    path: str, value: str, available: tuple[str, ...], planned: tuple[str, ...]
) -> None:
    if value in available:
        return
    allowed = ", ".join(available)
    if value in planned:
        raise NotBuilt(
            f"{path} '{value}' is not available in this version; use: {allowed}.", field=path
        )
    raise InvalidSpec(f"{path} must be one of: {allowed}; not '{value}'.", field=path)


def _check_options(field: str, owner: str, given: dict[str, Any], table: dict[str, Option]) -> None:
    for name, value in given.items():
        path = f"{field}.{name}"
        option = table.get(name)
        if option is None:
            known = ", ".join(table) or "none"
            raise InvalidSpec(f"'{owner}' has no option '{name}'; it has: {known}.", field=path)
        wanted = type(option.default)
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits:
            raise InvalidSpec(
                f"{path} must be of type {wanted.__name__}, not {value!r}.", field=path
            )
        low, high = option.low, option.high
        if low is not None and high is not None and not low <= value <= high:
            raise InvalidSpec(f"{path} must be {low:g} to {high:g}, not {value}.", field=path)


def _from_validation(error: msgspec.ValidationError) -> InvalidSpec:
    """Turn msgspec's ``... - at `$.a.b` `` into our sentence and a dotted field."""
    text, _, where = str(error).partition(" - at `")
    field = where.rstrip("`").removeprefix("$").lstrip(".") or None
    unknown = unknown_field(text)
    if unknown is not None:
        field = f"{field}.{unknown}" if field else unknown
        perhaps = meant(field, field_paths(JobSpec))
        return InvalidSpec(f"A job specification has no field {field!r}{perhaps}.", field=field)
    place = f"{field}: " if field else ""
    return InvalidSpec(f"{place}{text}.", field=field)
