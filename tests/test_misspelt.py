from __future__ import annotations

import pytest

from distroml.misspelt import MAX_SHOWN, field_paths, meant, unknown_field
from distroml.settings import NodeSettings
from distroml.spec import JobSpec


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resources.max_restarts", "max_restarts"),
        ("lr", "hyperparameters.lr"),
        ("resource.workers", "resources.workers"),
        ("hyperparameters.batchsize", "hyperparameters.batch_size"),
        ("init_from.jb", "init_from.job"),
        ("checkpointing.evry_n_steps", "checkpointing.every_n_steps"),
    ],
)
def test_a_field_in_the_wrong_place_or_misspelt_is_found(name: str, wanted: str) -> None:
    assert meant(name, field_paths(JobSpec)) == f" (perhaps {wanted} was meant)"


def test_nothing_is_suggested_where_nothing_is_close() -> None:
    assert meant("colour", field_paths(JobSpec)) == ""


def test_settings_are_plain_names() -> None:
    assert meant("data_dri", NodeSettings.__struct_fields__) == " (perhaps data_dir was meant)"


def test_paths_go_into_parts_that_may_be_null() -> None:
    paths = set(field_paths(JobSpec))
    assert {"name", "resources", "resources.workers", "init_from", "init_from.job"} <= paths


def test_a_long_name_is_cut() -> None:
    assert unknown_field(f"Object contains unknown field `{'x' * 5000}`") == "x" * MAX_SHOWN
    assert unknown_field("Object missing required field `name`") is None
