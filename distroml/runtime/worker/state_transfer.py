"""From ranks that met with different states to ranks with the same one.

Every rank says where it stands; from these facts all draw the same conclusion: the furthest state wins, and a step
that any of them completed is never done again. Its holder sends it, in a few flat pieces of memory: to all at once, or
straight to the one rank that lacks it, as after most failures. Nobody outside of the group takes part, so no stale
report can choose the source. Where each stands costs next to nothing to say; only the source packs what it has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from distroml.errors import DistroMLError
from distroml.runtime.control import MetricRecord
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.state import StateBlob

PIECE_BYTES = 64 * 1024 * 1024
"""Sent at once: bounds the memory that a transfer needs beside the state itself."""
NO_STATE = -1
FIRST_BYTES = 64 * 1024
"""Of the first message: sizes, and what describes the state as far as there is room for it."""
_ROW = struct.Struct(">qq32s32sqq")
_SIZES = struct.Struct(">qq")
_HEADER_BYTES = FIRST_BYTES - _SIZES.size


class Standing(msgspec.Struct, frozen=True):
    """What one rank brings to a generation."""

    position: int
    """How far the state that it holds has come (``train.Run.position``), or ``NO_STATE``."""
    total_steps: int
    dataset: bytes
    """SHA-256 of what names its data."""
    model: bytes
    """SHA-256 of its model's parameter names, shapes and types."""
    flags: int = 0
    """What it wishes for the boundary at which the generation begins (``dist.STOP``, ``dist.MOVE``), and ``dist.BUSY``."""
    former: int = 0
    """The newest generation that it began with the others; 0: none."""


class Tensors(msgspec.Struct, frozen=True):
    """What is about to be sent: names, dtypes and shapes in order; the blob's values; the step; newest records."""

    step: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    values: dict[str, Any]
    records: list[MetricRecord]


class Arrived(NamedTuple):
    """What a rank behind is given."""

    blob: StateBlob
    step: int
    records: list[MetricRecord]
    """The holder's, of the steps that the ranks behind have not done."""


@dataclass(frozen=True)
class Parcel:
    """A state ready to be sent."""

    header: bytes
    tensors: list[Tensor]

    @property
    def size_bytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def pack(blob: StateBlob, step: int, records: Sequence[MetricRecord] = ()) -> Parcel:
    """What others need to have this state, without a copy of what is on the CPU."""
    tensors = [tensor.detach().cpu().contiguous() for tensor in blob.tensors.values()]
    header = Tensors(
        step=step,
        names=list(blob.tensors),
        dtypes=[_dtype_name(tensor.dtype) for tensor in tensors],
        shapes=[list(tensor.shape) for tensor in tensors],
        values=blob.values,
        records=list(records),
    )
    return Parcel(msgspec.msgpack.encode(header), tensors)


def gather_standings(group: RankGroup, mine: Standing) -> list[Standing]:
    """Where each rank stands, in rank order."""
    row = _ROW.pack(*msgspec.structs.astuple(mine))
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


class Transfer:
    """The way of one state from its holder to the ranks behind; all ranks of the group take part.

    The first message goes to all: how much is to come, and how the state is described.

    Args:
        behind: at least one rank, in order.
    """

    def __init__(self, group: RankGroup, source: int, behind: Sequence[int]) -> None:
        self._group, self._source, self._behind = group, source, behind

    def send(self, parcel: Parcel) -> None:
        """As the holder."""
        header = parcel.header
        first = bytearray(_SIZES.pack(len(header), parcel.size_bytes) + header[:_HEADER_BYTES])
        first += bytes(FIRST_BYTES - len(first))
        self._group.broadcast(torch.frombuffer(first, dtype=torch.uint8), self._source)
        if rest := bytearray(header[_HEADER_BYTES:]):
            self._pass_on(torch.frombuffer(rest, dtype=torch.uint8))
        for piece in _pieces(parcel.tensors):
            self._pass_on(piece[0] if len(piece) == 1 else torch.cat(piece))

    def receive(self) -> Arrived:
        """As a rank behind."""
        header_bytes, _, header = self._first()
        if header_bytes > len(header):
            rest = torch.empty(header_bytes - len(header), dtype=torch.uint8)
            self._pass_on(rest)
            header += bytes(rest.numpy())
        described = msgspec.msgpack.decode(header, type=Tensors)
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(described.shapes, described.dtypes, strict=True)
        ]
        for piece in _pieces(tensors):
            flat = torch.empty(sum(map(len, piece)), dtype=torch.uint8)
            self._pass_on(flat)
            for part, came in zip(piece, flat.split([len(part) for part in piece]), strict=True):
                part.copy_(came)
        named = dict(zip(described.names, tensors, strict=True))
        return Arrived(StateBlob(named, described.values), described.step, described.records)

    def attend(self) -> None:
        """As a rank that neither has to give nor lacks anything."""
        header_bytes, state_bytes, header = self._first()
        sizes = [header_bytes - len(header)] * (header_bytes > len(header))
        full, rest = divmod(state_bytes, PIECE_BYTES)
        sizes += [PIECE_BYTES] * full + [rest] * (rest > 0)
        for size in sizes:
            self._pass_on(torch.empty(0 if self._direct else size, dtype=torch.uint8))

    def _first(self) -> tuple[int, int, bytes]:
        """Of the header and of the state, the size in bytes; the header as far as the first message has it."""
        first = torch.empty(FIRST_BYTES, dtype=torch.uint8)
        self._group.broadcast(first, self._source)
        data = bytes(first.numpy())
        header_bytes, state_bytes = _SIZES.unpack_from(data)
        return header_bytes, state_bytes, data[_SIZES.size :][:header_bytes]

    @property
    def _direct(self) -> bool:
        return len(self._behind) == 1

    def _pass_on(self, values: Tensor) -> None:
        """The flat ``values`` of the holder to the ranks behind."""
        group = self._group
        if not self._direct:
            group.broadcast(values, self._source)
            return
        nothing, nowhere = values.new_empty(0), [0] * group.world_size
        (target,) = self._behind
        if group.rank == self._source:
            sent = [len(values) * (rank == target) for rank in range(group.world_size)]
            group.all_to_all(nothing, values, nowhere, sent)
        elif group.rank == target:
            received = [len(values) * (rank == self._source) for rank in range(group.world_size)]
            group.all_to_all(values, nothing, received, nowhere)
        else:
            group.all_to_all(nothing, nothing, nowhere, nowhere)


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
