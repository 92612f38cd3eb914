"""The jobs that a run trains: small, different from each other, and the same bits each time.

Each name has one specification and one seed, so that every job of that name must end like the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PATIENCE = 10_000
"""``max_restarts``: however often a job is struck, it is never its own fault."""
VICTIM = "victim"
"""Trains until somebody cancels or stops it."""

Spec = dict[str, Any]

FILE, OBJECTS = "file", "s3"
_STORES: dict[str, tuple[str, ...]] = {"text": (FILE,), "cnn": (OBJECTS,), "wide": (OBJECTS, FILE)}
"""Where a job keeps its checkpoints: in the first of these that the run has, else on the nodes' own disks."""
_SAVING = {"every_n_steps": 40, "keep_last": 3, "keep_every_n_steps": 200}

TRAINED: dict[str, Spec] = {
    "digits-elastic": {
        "model": "mlp",
        "model_options": {"hidden": 128, "layers": 3},
        "dataset": "digits",
        "resources": {"workers": 2, "min_workers": 1},
        "hyperparameters": {"batch_size": 64, "epochs": 100},
        "steps": 800,
        "seed": 11,
    },
    "text": {
        "model": "transformer",
        "model_options": {"layers": 1, "heads": 2, "width": 32, "context": 32, "dropout": 0.1},
        "dataset": "text",
        "dataset_options": {"max_bytes": 65_536},
        "resources": {"workers": 2},
        "hyperparameters": {"batch_size": 8, "epochs": 100, "optimizer": "adamw"},
        "steps": 400,
        "seed": 12,
    },
    "cnn": {
        "model": "cnn",
        "model_options": {"channels": 4, "dropout": 0.2},
        "dataset": "digits",
        "resources": {"workers": 2},
        "hyperparameters": {"batch_size": 32, "epochs": 100, "optimizer": "sgd", "momentum": 0.9},
        "steps": 400,
        "seed": 13,
    },
    "points-lone": {
        "model": "mlp",
        "model_options": {"hidden": 64, "layers": 1},
        "dataset": "synthetic",
        "resources": {"workers": 1},
        "hyperparameters": {"batch_size": 32, "epochs": 1000},
        "steps": 1200,
        "seed": 14,
    },
    "wide": {  # its one shard is more than an object store takes in one part
        "model": "mlp",
        "model_options": {"hidden": 1200, "layers": 2},
        "dataset": "digits",
        "resources": {"workers": 1},
        "hyperparameters": {"batch_size": 16, "epochs": 100, "optimizer": "adamw"},
        "steps": 160,
        "seed": 16,
    },
}

_VICTIM: Spec = {
    "model": "mlp",
    "model_options": {"hidden": 16, "layers": 1},
    "dataset": "synthetic",
    "resources": {"workers": 1},
    "hyperparameters": {"batch_size": 8, "epochs": 1_000_000},
    "steps": 1_000_000_000,
    "seed": 15,
}


def spec_of(name: str, stores: Mapping[str, str]) -> Spec:
    """What is submitted under a name.

    Args:
        stores: URLs of the stores that all nodes see, by kind.
    """
    spec = _VICTIM if name == VICTIM else TRAINED[name]
    found = [stores[kind] for kind in _STORES.get(name, ()) if kind in stores]
    saving = {**_SAVING, "store": found[0]} if found else _SAVING
    return {"name": name, "checkpointing": saving, "max_restarts": PATIENCE, **spec}


def kept_in(store: str) -> tuple[str, ...]:
    """Names of the jobs that keep their checkpoints in this kind of store, where the run has it."""
    return tuple(name for name, kinds in _STORES.items() if kinds[0] == store)
