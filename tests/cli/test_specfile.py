"""Specification files: three formats, overrides, and errors that name the file and the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distroml.cli.specfile import MAX_SPEC_BYTES, read_spec
from distroml.errors import InvalidSpec, NotBuilt

DOCUMENT = {
    "name": "three",
    "resources": {"workers": 4},
    "hyperparameters": {"lr": 1e-3, "batch_size": 64},
    "steps": None,
    "checkpointing": {"enabled": False},
}
YAML = """\
name: three
resources: {workers: 4}
hyperparameters:
  lr: 1e-3      # YAML 1.1 alone would read a string here
  batch_size: 64
steps: null
checkpointing: {enabled: false}
"""
TOML = """\
name = "three"
resources.workers = 4
[hyperparameters]
lr = 1e-3
batch_size = 64
[checkpointing]
enabled = false
"""


def write(directory: Path, name: str, text: str) -> str:
    file = directory / name
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("name", "text"),
    [("s.json", json.dumps(DOCUMENT)), ("s.yaml", YAML), ("s.YML", YAML), ("s.toml", TOML)],
)
def test_all_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    document = read_spec(write(tmp_path, name, text))
    assert {"steps": None, **document} == DOCUMENT


def test_overrides_are_json_or_text_and_reach_into_parts(tmp_path: Path) -> None:
    file = write(tmp_path, "s.json", "{}")
    overrides = ["name=quick", "hyperparameters.lr=0.5", "compression.enabled=false", "seed=7"]
    assert read_spec(file, overrides) == {
        "name": "quick", "hyperparameters": {"lr": 0.5}, "compression": {"enabled": False}, "seed": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "field", "says"),
    [
        ("s.json", '{"resources": {"workers": 0}}', "resources.workers", ">= 1"),
        ("s.json", '{"naem": "x"}', "naem", "perhaps name was meant"),
        (
            "s.json",
            '{"resources": {"max_restarts": 1}}',
            "resources.max_restarts",
            "max_restarts was",
        ),
        ("s.json", '{"workers": 1}', "workers", "perhaps resources.workers was meant"),
        ("s.json", '{"resources": {"xyz": 1}}', "resources.xyz", "no field 'resources.xyz'."),
        ("s.yaml", "hyperparameters: {lr: fast}", "hyperparameters.lr", "Expected `float`"),
        ("s.yaml", "name: 2026-01-31", None, None),
        ("s.yaml", "name: 2026", "name", "Expected `str`"),
        ("s.toml", "resources.workers = 'x'", "resources.workers", "Expected `int`"),
        ("s.toml", "name = 2026-01-31", "name", "Expected `str`"),
        ("s.json", '{"model": "resnet"}', "model", "mlp, cnn, transformer"),
        ("s.json", '{"a": 1, "a": 2}', None, "given twice"),
        ("s.json", '{"hyperparameters": {"lr": NaN}}', None, "NaN"),
        ("s.json", '{"name":\n "x",}', None, "line 2"),
        ("s.yaml", "a: [1,\nb: 2", None, "line 2"),
        ("s.toml", "a = \n", None, "line 1"),
        ("s.json", "[1]", None, "a list"),
        ("s.yaml", "", None, "empty"),
        ("s.txt", "{}", None, ".json, .yaml, .yml, .toml"),
        ("s.json", '{"a":' * 5000, None, "s.json"),
    ],
)
def test_errors_name_the_file_and_the_field(
    tmp_path: Path, name: str, text: str, field: str | None, says: str | None
) -> None:
    file = write(tmp_path, name, text)
    if says is None:
        read_spec(file)
        return
    with pytest.raises(InvalidSpec) as caught:
        read_spec(file)
    assert caught.value.detail.startswith(file)
    assert says in caught.value.detail
    assert caught.value.field == field
    if field is not None:
        assert field in caught.value.detail


def test_what_is_not_built_stays_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotBuilt, match=r"s\.json: .*not available in this version"):
        read_spec(write(tmp_path, "s.json", '{"distributed": {"strategy": "fsdp"}}'))


@pytest.mark.parametrize(
    ("override", "says"),
    [("steps", "field=value"), ("=1", "field=value"), ("a..b=1", "field=value"), ("name.x=1", "no fields")],
)  # fmt: skip
def test_a_wrong_override_is_named(tmp_path: Path, override: str, says: str) -> None:
    file = write(tmp_path, "s.json", '{"name": "x"}')
    with pytest.raises(InvalidSpec, match=says) as caught:
        read_spec(file, [override])
    assert override in caught.value.detail


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"none\.json: cannot be read: No such file"):
        read_spec(str(tmp_path / "none.json"))
    (tmp_path / "big.json").write_bytes(b" " * (MAX_SPEC_BYTES + 1))
    with pytest.raises(InvalidSpec, match="larger than"):
        read_spec(str(tmp_path / "big.json"))
    (tmp_path / "odd.json").write_bytes(b"\xff")
    with pytest.raises(InvalidSpec, match="not UTF-8"):
        read_spec(str(tmp_path / "odd.json"))
