from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from distroml.errors import DistroMLError
from distroml.runtime.worker import datasets
from distroml.runtime.worker.batches import (
    CollatedDataset,
    IndexedBatches,
    as_dataset,
    samples_in,
)
from distroml.runtime.worker.datasets import Synthetic, digits, synthetic, text

PINNED_CLASSES = [4, 0, 7]
PINNED_SUM = -22.88408564403653


def test_synthetic_is_a_function_of_the_index(monkeypatch) -> None:
    kept, _ = synthetic(500, 12, 4)
    monkeypatch.setattr(datasets, "MAX_KEPT_VALUES", 0)
    fresh, _ = synthetic(500, 12, 4)
    order = np.random.default_rng(0).permutation(500)
    for begin in range(0, 500, 64):
        part = order[begin : begin + 64]
        for _ in range(2):
            for ours, theirs in zip(kept.batch(part), fresh.batch(part), strict=True):
                assert torch.equal(ours, theirs)
    inputs, targets = fresh.batch(np.arange(500))
    assert inputs.shape == (500, 12)
    assert inputs.dtype == torch.float32
    assert set(targets.tolist()) == {0, 1, 2, 3}


def test_synthetic_is_pinned() -> None:
    """Other data would be another job."""
    train, _ = synthetic(8192, 64, 10)
    inputs, targets = train.batch(np.array([0, 1, 8191]))
    assert targets.tolist() == PINNED_CLASSES
    assert inputs.double().sum().item() == PINNED_SUM


def test_synthetic_noise_is_about_normal() -> None:
    inputs, _ = Synthetic(20_000, 4, 2).batch(np.arange(20_000))
    assert abs(inputs.mean().item()) < 0.5
    assert 0.9 < inputs.std().item() < 1.3


def test_held_out_samples_are_others() -> None:
    train, held_out = synthetic(1000, 8, 3)
    assert len(held_out) == 125
    assert train.digest != held_out.digest
    seen = {tuple(row) for row in train.batch(np.arange(1000))[0].tolist()}
    assert not seen & {tuple(row) for row in held_out.batch(np.arange(125))[0].tolist()}


def test_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    train, held_out = digits(0.2)
    assert (len(train), len(held_out)) == (1438, 359)
    inputs, targets = train.batch(np.arange(len(train)))
    assert inputs.shape == (1438, 64)
    assert (inputs.min().item(), inputs.max().item()) == (0.0, 1.0)
    assert sorted(set(targets.tolist())) == list(range(10))
    assert len(set(held_out.batch(np.arange(359))[1].tolist())) == 10


def test_digits_are_those_of_scikit_learn() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    loaded = sklearn_datasets.load_digits()
    table = datasets._digits_table()
    assert np.array_equal(table[:, :-1], loaded.data)
    assert np.array_equal(table[:, -1], loaded.target)


def test_missing_scikit_learn_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DistroMLError, match=r"pip install 'distroml\[digits\]'"):
        digits(0.2)


def test_text_predicts_the_next_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20
    (tmp_path / "file.txt").write_bytes(content)
    train, held_out = text(str(tmp_path / "file.txt"), 1 << 20, 0.1, context=32)
    assert len(train) == (4608 - 1) // 32
    assert len(held_out) == (512 - 1) // 32
    inputs, targets = train.batch(np.array([3, 0]))
    assert inputs.shape == targets.shape == (2, 32)
    assert inputs[0].tolist() == list(content[96:128])
    assert targets[0].tolist() == list(content[97:129])
    assert held_out.batch(np.array([0]))[0][0, 0].item() == content[4608]


def test_text_of_a_directory_is_in_order_of_path_and_capped(tmp_path: Path) -> None:
    for name, letter in (("b/two", "b"), ("a", "a"), ("b/one", "c"), (".hidden", "x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(letter * 1000)
    train, held_out = text(str(tmp_path), 2500, 0.1, context=10)
    whole = bytes(train._text) + bytes(held_out._text)
    assert whole == b"a" * 1000 + b"c" * 1000 + b"b" * 500


def test_text_defaults_to_real_text_on_every_machine() -> None:
    train, _ = text("", 65_536, 0.05, context=64)
    first = min(Path(os.__file__).parent.glob("*.py"))
    assert bytes(train._text[:40]) == first.read_bytes()[:40]
    assert train.digest == text("", 65_536, 0.05, context=32)[0].digest


def test_text_that_is_missing_or_too_short_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DistroMLError, match=r"no file or directory '/nowhere/x'"):
        text("/nowhere/x", 1024, 0.05, context=8)
    (tmp_path / "short").write_text("too short")
    with pytest.raises(DistroMLError, match=r"has 9 bytes .* too few for windows of 8 bytes"):
        text(str(tmp_path / "short"), 1024, 0.05, context=8)


def test_samples_of_a_sequence_are_collated() -> None:
    dataset = as_dataset([(torch.tensor([float(i)]), i) for i in range(5)])
    assert isinstance(dataset, CollatedDataset)
    inputs, targets = dataset.batch(np.array([4, 1]))
    assert inputs.tolist() == [[4.0], [1.0]]
    assert targets.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("thing", "message"),
    [(iter([1]), "needs __len__"), ({1, 2}, r"needs batch\(indices\) or __getitem__")],
)
def test_what_is_no_dataset_is_refused(thing: object, message: str) -> None:
    with pytest.raises(DistroMLError, match=message):
        as_dataset(thing)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DistroMLError, match="is empty"):
        IndexedBatches(as_dataset([]), 4, 0)


def test_samples_of_a_batch_are_counted() -> None:
    assert samples_in(torch.zeros(3, 2)) == 3
    assert samples_in(("text", {"x": torch.zeros(4)})) == 4
    with pytest.raises(DistroMLError, match="must contain a tensor"):
        samples_in(["a", "b"])
