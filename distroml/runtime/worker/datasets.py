"""The built-in datasets, each in a training and a held-out part: synthetic, digits, text."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distroml.errors import DistroMLError
from distroml.runtime.data.order import MULTIPLIER_1, MULTIPLIER_2, round_keys
from distroml.runtime.worker.sample_order import Indices, permute

SYNTHETIC_NOISE = 1.0
SYNTHETIC_DISTANCE = 0.28
"""Typical size of a class centre's components, in units of the noise: learnable, not at a glance."""
MAX_KEPT_VALUES = 1 << 20
"""Synthetic data of up to this many values are kept once generated (4 MiB)."""
MAX_HOLDOUT_SAMPLES = 2048
DIGITS_CLASSES = 10
DIGITS_SCALE = 16.0
BYTE_VALUES = 256

Pair = tuple[Tensor, Tensor]


class TensorPairs:
    """Inputs and targets held in memory."""

    def __init__(self, inputs: Tensor, targets: Tensor, digest: str) -> None:
        self.inputs, self.targets, self.digest = inputs, targets, digest

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def batch(self, indices: Indices) -> Pair:
        """Inputs [n, ...] and targets [n, ...]."""
        rows = torch.from_numpy(indices)
        return self.inputs[rows], self.targets[rows]


# --- synthetic -------------------------------------------------------------------------------------------------


class Synthetic:
    """Noisy points around one random centre per class, each a pure function of its index.

    Only integer arithmetic decides the bits, so that every machine generates the same data.

    Args:
        first: index of the first sample; the held-out part begins where the training part ends.
    """

    def __init__(self, samples: int, features: int, classes: int, first: int = 0) -> None:
        self._first, self._samples, self._features = first, samples, features
        name = f"synthetic/1/{samples}/{features}/{classes}/{first}"
        self.digest = hashlib.sha256(name.encode()).hexdigest()
        self._classes = classes
        centres = _noise(np.arange(classes * features, dtype=np.uint64) + np.uint64(1 << 62))
        self._centres = centres.reshape(classes, features) * np.float32(SYNTHETIC_DISTANCE)
        self._keeps = samples * features <= MAX_KEPT_VALUES
        if (
            self._keeps
        ):  # filled as samples are first asked for: a worker starts without waiting for it
            self._present = np.zeros(samples, dtype=bool)
            self._inputs = torch.empty(samples, features)
            self._targets = torch.empty(samples, dtype=torch.int64)

    def __len__(self) -> int:
        return self._samples

    def batch(self, indices: Indices) -> Pair:
        """Inputs float32 [n, features] and classes int64 [n]."""
        if not self._keeps:
            return self._generate(indices)
        missing = indices[~self._present[indices]]
        if missing.size:
            places = torch.from_numpy(missing)
            self._inputs[places], self._targets[places] = self._generate(missing)
            self._present[missing] = True
        rows = torch.from_numpy(indices)
        return self._inputs[rows], self._targets[rows]

    def _generate(self, indices: Indices) -> Pair:
        numbers = indices.astype(np.uint64) + np.uint64(self._first)
        targets = (_mix(numbers + np.uint64(1 << 61)) % np.uint64(self._classes)).astype(np.int64)
        lanes = np.arange(self._features, dtype=np.uint64)
        noise = _noise(numbers[:, None] * np.uint64(self._features) + lanes)
        inputs = self._centres[targets] + noise * np.float32(SYNTHETIC_NOISE)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def synthetic(samples: int, features: int, classes: int) -> tuple[Synthetic, Synthetic]:
    """Training and held-out part; the latter has an eighth of the samples, up to 2048, at least 64."""
    held_out = max(64, min(MAX_HOLDOUT_SAMPLES, samples // 8))
    train = Synthetic(samples, features, classes)
    return train, Synthetic(held_out, features, classes, first=samples)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))


def _noise(numbers: NDArray[np.uint64]) -> NDArray[np.float32]:
    """About normal with variance 1: the sum of the four 16-bit quarters of a hash (Irwin-Hall)."""
    quarters = _mix(numbers).view(np.uint16).reshape(*numbers.shape, 4)
    sums = quarters.sum(axis=-1, dtype=np.int64) - 2 * 65_535
    return (sums * np.float64(3.0**0.5 / 65_536)).astype(np.float32)


# --- digits ----------------------------------------------------------------------------------------------------


def digits(holdout: float) -> tuple[TensorPairs, TensorPairs]:
    """scikit-learn's 1,797 handwritten digits: inputs float32 [n, 64] in 0..1, classes int64 [n].

    Raises:
        DistroMLError: scikit-learn is not installed on this node.
    """
    table = _digits_table()
    digest = hashlib.sha256(table.tobytes() + repr(holdout).encode()).hexdigest()
    keys = round_keys("digits-holdout", 0, 0)
    table = table[permute(np.arange(len(table)), len(table), keys)]
    inputs = torch.from_numpy((table[:, :-1] / DIGITS_SCALE).astype(np.float32))
    targets = torch.from_numpy(table[:, -1].astype(np.int64))
    cut = max(1, round(len(table) * (1 - holdout)))
    return (
        TensorPairs(inputs[:cut], targets[:cut], digest),
        TensorPairs(inputs[cut:], targets[cut:], digest),
    )


def _digits_table() -> NDArray[np.float64]:
    """Rows of 64 pixels (0..16) and a class.

    Importing scikit-learn takes longer than everything else a worker does before its first step, so its data
    file is read where it lies; the import is for a version that keeps it elsewhere.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DistroMLError(
            "Dataset 'digits' needs scikit-learn on each node: pip install 'distroml[digits]'.",
            field="dataset",
        )
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        text = gzip.decompress(file.read_bytes()).decode("ascii")
        return np.loadtxt(io.StringIO(text), delimiter=",")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.column_stack([loaded.data, loaded.target]).astype(np.float64)


# --- text ------------------------------------------------------------------------------------------------------


class Windows:
    """Byte-level text cut into windows of ``context`` bytes, each predicting the next byte."""

    def __init__(self, text: NDArray[np.uint8], context: int, digest: str) -> None:
        self._text, self._context, self.digest = text, context, digest
        self._lanes = np.arange(context + 1)

    def __len__(self) -> int:
        return max(0, (self._text.size - 1) // self._context)

    def batch(self, indices: Indices) -> Pair:
        """Inputs and targets, int64 [n, context]; targets are the inputs one byte later."""
        places = indices[:, None] * self._context + self._lanes
        tokens = torch.from_numpy(self._text[places].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


def text(path: str, max_bytes: int, holdout: float, context: int) -> tuple[Windows, Windows]:
    """Training part and held-out end of a text.

    Args:
        path: a file, a directory (all its files in order of path) or "" for the Python standard library.

    Raises:
        DistroMLError: nothing there, or too little for one window in each part.
    """
    content = bytearray()
    for file in _text_files(path):
        with file.open("rb") as stream:
            content += stream.read(max_bytes - len(content))
        if len(content) >= max_bytes:
            break
    tokens = np.frombuffer(bytes(content), dtype=np.uint8)
    cut = round(tokens.size * (1 - holdout))
    if min(cut, tokens.size - cut) <= context:
        raise DistroMLError(
            f"Dataset 'text' has {tokens.size} bytes at {path or 'the standard library'!r}: too few for "
            f"windows of {context} bytes with a holdout of {holdout:g}. Give more text, a smaller "
            "model_options.context or another dataset_options.holdout.",
            field="dataset_options.path",
        )
    digest = hashlib.sha256(content).hexdigest()
    return Windows(tokens[:cut], context, digest), Windows(tokens[cut:], context, digest)


def _text_files(path: str) -> Iterator[Path]:
    if not path:
        yield from sorted(Path(os.__file__).parent.glob("*.py"))
        return
    place = Path(path)
    if place.is_file():
        yield place
    elif place.is_dir():
        for folder, folders, names in os.walk(place):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
    else:
        raise DistroMLError(
            f"Dataset 'text' finds no file or directory {path!r} on this node (working directory "
            f"{os.getcwd()}).",
            field="dataset_options.path",
        )
