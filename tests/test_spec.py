"""What a job specification accepts and how it says no."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distroml.errors import InvalidSpec, NotBuilt
from distroml.spec import JobSpec, convert_spec, option_value, parse_spec

ISSUE_SPEC = b"""{"name":"mnist-ddp-demo","framework":"pytorch","model":"mlp","dataset":"synthetic",
     "resources":{"workers":4,"gpus_per_worker":0},
     "distributed":{"strategy":"data_parallel","backend":"gloo"},
     "hyperparameters":{"batch_size":64,"lr":0.001,"epochs":2},
     "checkpointing":{"enabled":true,"every_n_steps":200,"store":"local"},
     "compression":{"enabled":false}}"""


def test_the_documented_spec_is_accepted_as_it_stands() -> None:
    spec = parse_spec(ISSUE_SPEC)
    assert spec.resources.workers == 4
    assert spec.hyperparameters.epochs == 2


def test_every_field_has_a_default() -> None:
    assert parse_spec(b"{}") == JobSpec()


@pytest.mark.parametrize(
    ("document", "field", "kind"),
    [
        ({"nmae": "x"}, "nmae", InvalidSpec),
        ({"name": ""}, "name", InvalidSpec),
        ({"name": "no spaces"}, "name", InvalidSpec),
        ({"name": "newline\n"}, "name", InvalidSpec),
        ({"name": "x" * 64}, "name", InvalidSpec),
        ({"resources": {"worker": 1}}, "resources.worker", InvalidSpec),
        ({"resources": {"workers": 0}}, "resources.workers", InvalidSpec),
        ({"resources": {"workers": "4"}}, "resources.workers", InvalidSpec),
        ({"resources": {"workers": 1025}}, "resources.workers", InvalidSpec),
        ({"resources": None}, "resources", InvalidSpec),
        ({"resources": {"gpus_per_worker": 1}}, "resources.gpus_per_worker", NotBuilt),
        ({"framework": "jax"}, "framework", NotBuilt),
        ({"framework": "lisp"}, "framework", InvalidSpec),
        ({"distributed": {"strategy": "fsdp"}}, "distributed.strategy", NotBuilt),
        ({"distributed": {"strategy": "magic"}}, "distributed.strategy", InvalidSpec),
        ({"distributed": {"backend": "mpi"}}, "distributed.backend", NotBuilt),
        ({"checkpointing": {"store": "s3"}}, "checkpointing.store", InvalidSpec),
        ({"checkpointing": {"store": "ftp://host/x"}}, "checkpointing.store", InvalidSpec),
        ({"checkpointing": {"replicas": 0}}, "checkpointing.replicas", InvalidSpec),
        ({"checkpointing": {"replicas": 17}}, "checkpointing.replicas", InvalidSpec),
        ({"checkpointing": {"every_n_steps": 0}}, "checkpointing.every_n_steps", InvalidSpec),
        ({"checkpointing": {"compression": "lz4"}}, "checkpointing.compression", InvalidSpec),
        ({"compression": {"enabled": True}}, "compression.enabled", NotBuilt),
        ({"hyperparameters": {"lr": 0}}, "hyperparameters.lr", InvalidSpec),
        ({"hyperparameters": {"lr": -1}}, "hyperparameters.lr", InvalidSpec),
        ({"hyperparameters": {"epochs": 1.5}}, "hyperparameters.epochs", InvalidSpec),
        ({"hyperparameters": {"optimizer": "lion"}}, "hyperparameters.optimizer", InvalidSpec),
        (
            {"hyperparameters": {"batch_size": 3}, "resources": {"workers": 4}},
            "hyperparameters.batch_size",
            InvalidSpec,
        ),
        ({"model": "transformer"}, "dataset", InvalidSpec),
        ({"model": "mlp", "model_options": {"hiden": 4}}, "model_options.hiden", InvalidSpec),
        ({"model": "mlp", "model_options": {"hidden": 0}}, "model_options.hidden", InvalidSpec),
        ({"model": "mlp", "model_options": {"hidden": "8"}}, "model_options.hidden", InvalidSpec),
        ({"model": "mlp", "model_options": {"hidden": True}}, "model_options.hidden", InvalidSpec),
        (
            {"model": "transformer", "dataset": "text", "model_options": {"width": 65}},
            "model_options.width",
            InvalidSpec,
        ),
        ({"seed": -1}, "seed", InvalidSpec),
        ({"steps": 0}, "steps", InvalidSpec),
        ({"max_restarts": -1}, "max_restarts", InvalidSpec),
        ({"priority": 1001}, "priority", InvalidSpec),
        ({"entrypoint": "no_colon"}, "entrypoint", InvalidSpec),
        ({"entrypoint": "os; rm:X"}, "entrypoint", InvalidSpec),
    ],
)
def test_bad_specs_name_the_field(document: dict[str, Any], field: str, kind: type) -> None:
    for parse in (
        lambda: parse_spec(json.dumps(document).encode()),
        lambda: convert_spec(document),
    ):
        with pytest.raises(InvalidSpec) as caught:
            parse()
        assert type(caught.value) is kind
        assert caught.value.field == field
        assert caught.value.detail


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"1e999", b'{"name":"\xff"}', b'{"\xff":1}'],
)
def test_what_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidSpec):
        parse_spec(body)


def test_options_fill_in_defaults() -> None:
    spec = parse_spec(b'{"model_options": {"hidden": 7}}')
    assert option_value(spec, "model", "hidden") == 7
    assert option_value(spec, "model", "layers") == 2
    assert option_value(spec, "dataset", "classes") == 10


def test_an_entrypoint_takes_the_place_of_model_and_dataset() -> None:
    spec = parse_spec(b'{"entrypoint": "mine.train:Adapter", "model": "custom", "dataset": "mine"}')
    assert spec.entrypoint == "mine.train:Adapter"
