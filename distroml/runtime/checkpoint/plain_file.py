"""A checkpoint as one plain safetensors file, for use without DistroML.

The weights have the names that the model gives them; with everything, the optimizer's tensors are beside them under
``optimizer.``. Tensors are put at their places as the reader verifies them, in whatever order they come.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from distroml.errors import Conflict
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.manifest import (
    MODEL_PREFIX,
    OPTIMIZER_PREFIX,
    Manifest,
)
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.shard_file import (
    ALIGNMENT,
    ITEM_BYTES,
    LENGTH,
    TensorRecord,
    size_of,
)
from distroml.runtime.checkpoint.stores.interface import CheckpointStore


def write_plain(
    store: CheckpointStore,
    checkpoint: Checkpoint,
    target: Path,
    *,
    everything: bool,
    checkpoint_time: Callable[[], None] = lambda: None,
) -> int:
    """Write the file; its size in bytes.

    Args:
        everything: the optimizer's tensors too.
        checkpoint_time: called between tensors; what it raises ends the work.

    Raises:
        CorruptCheckpoint: bytes are missing or differ from what was committed.
        StoreError: the store cannot be read.
        Conflict: two tensors would have the same name.
        OSError: the file cannot be written.
    """
    manifest = read_manifest(store, checkpoint)
    chosen = plain_names(manifest, everything=everything)
    header, places = layout(manifest, chosen)
    with target.open("xb") as file:
        file.write(header)
        file.flush()
        for tensor in read_tensors(store, checkpoint, manifest):
            checkpoint_time()
            if tensor.name in places:
                _write_at(file.fileno(), tensor.data, len(header) + places[tensor.name])
        return file.seek(0, os.SEEK_END)


def plain_names(manifest: Manifest, *, everything: bool) -> dict[str, str]:
    """From the names of the tensors to be written to those in the file.

    Raises:
        Conflict: two would be the same.
    """
    names = {}
    for tensor in manifest.tensors:
        if tensor.name.startswith(MODEL_PREFIX):
            names[tensor.name] = tensor.name.removeprefix(MODEL_PREFIX)
        elif everything or not tensor.name.startswith(OPTIMIZER_PREFIX):
            names[tensor.name] = tensor.name
    if len(set(names.values())) != len(names):
        raise Conflict(
            "The model has a part whose name begins with 'optimizer.', so its tensors and the optimizer's "
            "cannot be in one file; export the model alone."
        )
    return names


def layout(manifest: Manifest, names: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of the file, and the offset behind it of each tensor that is written.

    Larger element types come first, so that each tensor lies at a multiple of its element size.
    """

    def order(tensor: TensorRecord) -> tuple[int, str]:
        return -ITEM_BYTES[tensor.dtype], names[tensor.name]

    places: dict[str, int] = {}
    entries: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "job": manifest.job_id,
            "step": str(manifest.step),
            "epoch": str(manifest.epoch),
        }
    }
    at = 0
    for tensor in sorted((t for t in manifest.tensors if t.name in names), key=order):
        end = at + size_of(tensor.dtype, tensor.shape)
        entries[names[tensor.name]] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (at, end),
        }
        places[tensor.name], at = at, end
    body = msgspec.json.encode(entries)
    body += b" " * (-len(body) % ALIGNMENT)
    return LENGTH.pack(len(body)) + body, places


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    view = data.cast("B") if data.nbytes else data
    while view.nbytes:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
