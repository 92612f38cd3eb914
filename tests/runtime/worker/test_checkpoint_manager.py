"""Checkpoints in a script of one's own."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distroml
from distroml.errors import CorruptCheckpoint, DistroMLError, NotFound, StoreError
from distroml.runtime.checkpoint import manifest
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.worker.plain_values import from_plain, to_plain
from tests.runtime.checkpoint.object_server import BUCKET, CREDENTIALS, object_server

ROOT = Path(__file__).resolve().parents[3]
DIRECTORY = "script/run/checkpoints"


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((3, 4), value), "steps": torch.tensor(7)},
        "optimizer": {
            "state": {0: {"exp_avg": torch.full((5,), -value, dtype=torch.bfloat16)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
        },
        "best": math.inf,
        "note": None,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and same(dict(enumerate(one)), dict(enumerate(other)))
    return bool(one == other)


def test_a_state_comes_back_as_it_was_given(tmp_path: Path) -> None:
    with distroml.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save_async(state(1.5), 10)
        checkpoints.save_async(state(2.5), 20)
    again = distroml.CheckpointManager(f"file://{tmp_path}")
    assert again.steps() == [10, 20]
    assert again.latest() == 20
    assert same(again.restore(), state(2.5))
    assert same(again.restore(10), state(1.5))


_SCRIPT = """
import sys, torch, distroml
with distroml.CheckpointManager(sys.argv[1]) as checkpoints:
    print(checkpoints.latest())
    checkpoints.save_async({"weight": torch.arange(3_000_000.0)}, 10)
again = distroml.CheckpointManager(sys.argv[1])
print(again.steps(), float(again.restore()["weight"].sum()))
"""


def test_a_script_keeps_its_checkpoints_in_s3() -> None:
    with object_server() as server:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, f"s3://{BUCKET}/scripts?endpoint={server}"],
            env={**os.environ, **CREDENTIALS},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.stderr == ""
    assert done.stdout.split("\n") == ["None", f"[10] {torch.arange(3_000_000.0).sum()}", ""]


def test_a_place_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="must be local, or a URL"):
        distroml.CheckpointManager("ftp://host/x")
    with pytest.raises(StoreError, match="must not hold credentials"):
        distroml.CheckpointManager("s3://key:secret@bucket")
    with (
        pytest.raises(StoreError, match="is not there on this node"),
        distroml.CheckpointManager(f"file://{tmp_path}/missing") as checkpoints,
    ):
        checkpoints.latest()


def test_what_changes_after_save_async_returned_is_not_saved(tmp_path: Path) -> None:
    given = state(1.0)
    checkpoints = distroml.CheckpointManager(tmp_path)
    checkpoints.save_async(given, 1)
    given["model"]["weight"].fill_(9.0)
    given["optimizer"]["param_groups"][0]["lr"] = 9.0
    assert same(checkpoints.restore(), state(1.0))


def test_a_step_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoints = distroml.CheckpointManager(tmp_path)
    with pytest.raises(NotFound, match="There is no checkpoint of 'script' yet"):
        checkpoints.restore()
    checkpoints.save_async(state(1.0), 5)
    with pytest.raises(NotFound, match="no checkpoint of step 6 of 'script'; there are: 5"):
        checkpoints.restore(6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": {"hook": print}}, "'model/hook' is a builtin_function_or_method"),
        ({1: torch.zeros(1), "1": torch.zeros(1)}, "two tensors are called '1'"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "complex64 cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DistroMLError, match=message):
        distroml.CheckpointManager(tmp_path).save_async(given, 1)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path: Path) -> None:
    with distroml.CheckpointManager(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save_async(state(step), step)
    flip(tmp_path / DIRECTORY / "ckpt_step_00000002/worker_0.safetensors", -1)
    with pytest.warns(RuntimeWarning, match=r"worker_0\.safetensors .*has BLAKE3"):
        assert same(checkpoints.restore(), state(1))
    with pytest.raises(CorruptCheckpoint, match="has BLAKE3"):
        checkpoints.restore(2)


def test_a_store_that_fails_is_no_reason_to_take_an_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with distroml.CheckpointManager(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save_async(state(step), step)
    read = FileStore.read_into

    def hiccup(store: FileStore, path: str, target: memoryview, offset: int = 0) -> int:
        if "ckpt_step_00000002" in path:
            raise StoreError(f"The checkpoint store cannot read '{path}': Stale file handle.")
        return read(store, path, target, offset)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "read_into", hiccup)
        with pytest.raises(StoreError, match="Stale file handle"):
            checkpoints.restore()
    assert same(checkpoints.restore(), state(2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damaged_here", [False, True])
def test_nor_is_a_store_that_fails_another_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged_here: bool
) -> None:
    with distroml.CheckpointManager(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save_async(state(step), step)
    if damaged_here:
        flip(tmp_path / DIRECTORY / "ckpt_step_00000002/worker_0.safetensors", -1)
    others = [
        b'{"text": "step 2 has other bytes", "damaged": true}',
        b'{"text": "Stale file handle", "damaged": false}',
    ]
    monkeypatch.setattr(checkpoints, "_exchange", lambda mine: [mine, *others])
    with pytest.raises(StoreError, match="Another rank cannot read step 2: Stale") as caught:
        checkpoints.restore()
    assert not isinstance(caught.value, CorruptCheckpoint)


@pytest.mark.filterwarnings("error")
def test_one_of_another_version_is_no_reason_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with distroml.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save_async(state(1), 1)
    monkeypatch.setattr(manifest, "FORMAT", 4)
    with pytest.raises(StoreError, match="another version") as caught:
        checkpoints.restore()
    assert not isinstance(caught.value, CorruptCheckpoint)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_each_byte_of_a_manifest_counts_though_no_log_has_its_hash(tmp_path: Path) -> None:
    with distroml.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save_async(state(1.0), 1)
    path = tmp_path / DIRECTORY / "ckpt_step_00000001/manifest.json"
    whole = path.read_bytes()
    generation = re.search(rb'"generation": \d+', whole)  # which no shard has: it restores nothing
    assert generation is not None
    for at in range(0, len(whole), 7):
        if generation.start() <= at < generation.end():
            continue
        flip(path, at)
        with pytest.raises(CorruptCheckpoint):
            checkpoints.restore(1)
        path.write_bytes(whole)
    (path.parent / "worker_0.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="no file"):
        checkpoints.restore(1)


def test_a_step_that_is_trained_again_takes_the_place_of_the_former(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        checkpoints = distroml.CheckpointManager(tmp_path)
        checkpoints._attempt = attempt
        checkpoints.save_async(state(attempt), 5)
        assert same(checkpoints.restore(), state(attempt))


def test_a_save_that_failed_is_told_once_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = distroml.CheckpointManager(tmp_path)
    monkeypatch.setattr(checkpoints._writer, "_wait_s", lambda _: None)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoints._store, "stage", _refuses)
        checkpoints.save_async(state(1.0), 1)
        checkpoints._writer.wait()
        with pytest.raises(StoreError, match=r"disk on fire.*after 5 attempts"):
            checkpoints.wait()
    checkpoints.save_async(state(2.0), 2)
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def _refuses(path: str, size_bytes: int) -> None:
    raise StoreError("disk on fire")


def run(directory: Path, world_size: int, steps: int, meet: str) -> list[list[str]]:
    """What each rank of the script printed, in words."""
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.runtime.worker.checkpoint_script",
                *map(str, (directory, directory / meet, rank, world_size, steps)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [rank.communicate(timeout=90)[0].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size
    return said


def test_a_script_goes_on_where_it_was_with_any_number_of_ranks(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    (whole,) = run(tmp_path / "whole", 1, 6, "m")
    pair = run(tmp_path / "parts", 2, 4, "m1")
    assert [words[1] for words in pair] == ["0", "0"]
    shards = sorted(
        p.name for p in (tmp_path / "parts" / DIRECTORY / "ckpt_step_00000004").iterdir()
    )
    assert shards == ["manifest.json", "worker_0.safetensors", "worker_1.safetensors"]
    (rest,) = run(tmp_path / "parts", 1, 6, "m2")
    assert rest[1] == "4"
    assert rest[-1] == whole[-1]


def test_the_example_of_the_readme_runs_and_resumes(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = [
        part.partition("```")[0]
        for part in readme.split("```python\n")
        if part.startswith("import distroml\n\nwith distroml.CheckpointManager")
    ]
    code = code.replace('"checkpoints"', repr(str(tmp_path)))
    trained: list[int] = []

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        trained.append(step)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    for steps in (150, 210):
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        exec(code, {"model": model, "optimizer": optimizer, "steps": steps, "train": train})
    assert trained == [*range(150), *range(100, 210)]


plain: Callable[..., Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text() | st.integers() | st.sampled_from(["$float", "$items"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(plain)  # type: ignore[arg-type]
def test_plain_values_survive_json(value: Any) -> None:
    told = msgspec.json.decode(msgspec.json.encode(to_plain(value, "")))
    assert from_plain(told) == value
