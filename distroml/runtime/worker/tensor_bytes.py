"""The edge between tensors and bytes: names of dtypes, copies into a buffer, tensors over a buffer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distroml.errors import DistroMLError
from distroml.runtime.checkpoint.shard_file import TensorBytes

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
ALIGNMENT = 64
"""Each tensor starts at a multiple of this in a buffer: whole cache lines, any dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as safetensors calls it.

    Raises:
        DistroMLError: it cannot be saved.
    """
    if dtype not in _NAMES:
        raise DistroMLError(f"Tensors of dtype {dtype} cannot be saved in a checkpoint.")
    return _NAMES[dtype]


def tensor_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row; without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()).cast("B")


def buffer_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of the buffer that ``copy_into`` needs for ``tensors``."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors.values())


def copy_into(buffer: memoryview, tensors: dict[str, Tensor]) -> list[TensorBytes]:
    """Copy ``tensors`` into ``buffer`` one after the other; views of where they now are."""
    copies, at = [], 0
    for name, tensor in tensors.items():
        place = buffer[at : at + tensor.nbytes]
        _copy(tensor.detach(), place)
        copies.append(TensorBytes(name, dtype_name(tensor.dtype), tuple(tensor.shape), place))
        at += _aligned(tensor.nbytes)
    return copies


def _copy(tensor: Tensor, place: memoryview) -> None:
    if not tensor.nbytes:
        return
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        # One memcpy, which writes past the caches; torch's own copy reads what it is about to overwrite.
        np.copyto(np.frombuffer(place, np.uint8), tensor.reshape(-1).view(torch.uint8).numpy())
    else:
        torch.frombuffer(place, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def as_tensor(source: TensorBytes) -> Tensor:
    """A tensor over the bytes of ``source``, sharing their memory where its alignment allows."""
    dtype = _DTYPES[source.dtype]
    if not source.data.nbytes:
        return torch.empty(source.shape, dtype=dtype)
    return torch.frombuffer(source.data, dtype=dtype).view(source.shape)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
