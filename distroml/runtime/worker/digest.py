"""One hash for a whole state: equal digests mean equal bits."""

from __future__ import annotations

import hashlib

from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.tensor_bytes import dtype_name, tensor_view


def state_digest(blob: StateBlob) -> str:
    """SHA-256, as hex, over the tensors in name order: name, dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for name in sorted(blob.tensors):
        tensor = blob.tensors[name].detach()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\n{dtype_name(tensor.dtype)}\n{shape}\n".encode())
        digest.update(tensor_view(tensor))
    return digest.hexdigest()
