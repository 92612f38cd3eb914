"""From ranks that met with different states to ranks with the same one.

Every rank says where it stands; from these facts all draw the same conclusion: the furthest state wins, and a step
that any of them completed is never done again. Its holder broadcasts it, in a few flat pieces of memory. Nobody
outside of the group takes part, so no stale report can choose the source.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from distroml.errors import DistroMLError
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.state import StateBlob

PIECE_BYTES = 64 * 1024 * 1024
"""Sent at once: bounds the memory that a transfer needs beside the state itself."""
NO_STATE = -1
_ROW = struct.Struct(">qq32s32s")


class Standing(msgspec.Struct, frozen=True):
    """What one rank brings to a generation."""

    position: int
    """How far the state that it holds has come (``train.Run.position``), or ``NO_STATE``."""
    total_steps: int
    dataset: bytes
    """SHA-256 of what names its data."""
    model: bytes
    """SHA-256 of its model's parameter names, shapes and types."""


class Tensors(msgspec.Struct, frozen=True):
    """What is about to be sent: names, dtypes and shapes in order; the blob's values; the step."""

    step: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    values: dict[str, Any]


def gather_standings(group: RankGroup, mine: Standing) -> list[Standing]:
    """Where each rank stands, in rank order."""
    row = _ROW.pack(mine.position, mine.total_steps, mine.dataset, mine.model)
    rows = group.all_gather(torch.frombuffer(bytearray(row), dtype=torch.uint8))
    return [Standing(*_ROW.unpack(bytes(row.numpy()))) for row in rows]


def check_agreement(standings: Sequence[Standing]) -> None:
    """Check that all ranks are about to train the same thing.

    Raises:
        DistroMLError: a rank has other data or another model; names what and who.
    """
    first = standings[0]
    for what, field in (
        ("dataset", "dataset"),
        ("number of steps", "total_steps"),
        ("model", "model"),
    ):
        other = [
            rank
            for rank, one in enumerate(standings)
            if getattr(one, field) != getattr(first, field)
        ]
        if other:
            raise DistroMLError(
                f"The {what} of ranks {other} differs from rank 0's; all nodes need the same code, data "
                "files and checkpoint store."
            )


def choose_source(standings: Sequence[Standing], least: int | None) -> int | None:
    """The rank whose state all take: the furthest, the lowest rank among equals.

    None where no rank has a state, or none that is as far as ``least``, the position of the committed checkpoint.
    """
    best = max(range(len(standings)), key=lambda rank: (standings[rank].position, -rank))
    furthest = standings[best].position
    if furthest == NO_STATE or (least is not None and furthest < least):
        return None
    return best


def send_state(group: RankGroup, blob: StateBlob, step: int) -> None:
    """Broadcast this rank's state to all others."""
    tensors = [tensor.detach().contiguous() for tensor in blob.tensors.values()]
    header = msgspec.msgpack.encode(
        Tensors(
            step=step,
            names=list(blob.tensors),
            dtypes=[_dtype_name(tensor.dtype) for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
            values=blob.values,
        )
    )
    group.broadcast(torch.tensor([len(header)]), group.rank)
    group.broadcast(torch.frombuffer(bytearray(header), dtype=torch.uint8), group.rank)
    _broadcast_all(group, tensors, group.rank)


def receive_state(group: RankGroup, source: int) -> tuple[StateBlob, int]:
    """The state that rank ``source`` broadcasts, and its step."""
    size = torch.zeros(1, dtype=torch.int64)
    group.broadcast(size, source)
    header = torch.zeros(int(size), dtype=torch.uint8)
    group.broadcast(header, source)
    described = msgspec.msgpack.decode(bytes(header.numpy()), type=Tensors)
    tensors = [
        torch.empty(shape, dtype=getattr(torch, dtype))
        for shape, dtype in zip(described.shapes, described.dtypes, strict=True)
    ]
    _broadcast_all(group, tensors, source)
    return StateBlob(
        dict(zip(described.names, tensors, strict=True)), described.values
    ), described.step


def _broadcast_all(group: RankGroup, tensors: Sequence[Tensor], source: int) -> None:
    """Send many tensors as few: small ones share a piece, large ones are cut."""
    sends = group.rank == source
    for piece in _pieces(tensors):
        flat = torch.empty(sum(len(part) for part in piece), dtype=torch.uint8)
        parts = flat.split([len(part) for part in piece])
        if sends:
            for part, target in zip(piece, parts, strict=True):
                target.copy_(part)
        group.broadcast(flat, source)
        if not sends:
            for part, target in zip(piece, parts, strict=True):
                part.copy_(target)


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors' memory as lists of byte views of at most ``PIECE_BYTES`` together."""
    piece: list[Tensor] = []
    room = PIECE_BYTES
    for tensor in tensors:
        left = tensor.reshape(-1).view(torch.uint8)
        while len(left):
            part, left = left[:room], left[room:]
            piece.append(part)
            room -= len(part)
            if room == 0:
                yield piece
                piece, room = [], PIECE_BYTES
    if piece:
        yield piece


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
