"""Where a worker computes: on the host's processor, or with ``backend: nccl`` on a GPU that nobody else has.

A GPU is claimed by a lock on a file of its name, which the kernel lets go of with the process, however that ends. So
nobody has to keep account of GPUs, and the workers of several agents on one host do not take each other's. Nothing here
runs before the worker was forked: CUDA does not survive a fork.
"""

from __future__ import annotations

import copy
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d

from distroml.errors import DistroMLError

CPU = torch.device("cpu")
NCCL = "nccl"
CLAIM_TIMEOUT_S = 30.0
"""A process that was killed keeps its GPU for as long as the driver needs to clean up."""
CLAIM_POLL_S = 0.05
FINISH_POLL_S = 0.0001
_ENVIRONMENT = {
    # Equal bits from the same cuBLAS calls (its documentation, "Results reproducibility").
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # A collective that fails ends a generation, not the process, and no watchdog of torch's decides about either.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def prepare_device(backend: str) -> torch.device:
    """The device of this process from now on.

    Raises:
        DistroMLError: there is no GPU, none is free, or this torch cannot use NCCL.
    """
    if backend != NCCL:
        return CPU
    gpus, has_nccl = torch.cuda.device_count(), c10d.is_nccl_available()
    if not torch.cuda.is_available() or not has_nccl:
        raise DistroMLError(
            "distributed.backend is nccl, and on this node torch "
            f"{torch.__version__} finds {gpus} GPUs and has {'' if has_nccl else 'no '}NCCL; start the node "
            "without slots, install a CUDA build of torch there, or use gloo."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(gpus)]
    directory = Path(tempfile.gettempdir()) / f"distroml-gpus-{os.getuid()}"
    device = torch.device("cuda", claim(directory, names))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = False  # or it chooses algorithms by how long they take
    return device


def claim(directory: Path, names: Sequence[str], timeout_s: float = CLAIM_TIMEOUT_S) -> int:
    """The place in ``names`` of the first one that no other process has; it is this one's until it ends.

    Raises:
        DistroMLError: none became free in time.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    ends_s = time.monotonic() + timeout_s
    while True:
        for place, name in enumerate(names):
            if _lock(directory / f"{name}.lock"):
                return place
        if time.monotonic() >= ends_s:
            raise DistroMLError(
                f"All {len(names)} GPUs of this node have been taken by other workers for {timeout_s:g} s; "
                "start the node with as many slots as it has GPUs (--slots)."
            )
        time.sleep(CLAIM_POLL_S)


def _lock(path: Path) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    return True  # the descriptor stays open, and the lock with it


def moved(batch: Any, device: torch.device) -> Any:
    """``batch`` with all in it that can be moved on ``device``: in tuples, lists and mappings of any depth."""
    if device == CPU:
        return batch
    if callable(getattr(batch, "to", None)):  # tensors, packed sequences, graphs, encodings
        return batch.to(device)
    if isinstance(batch, Mapping):
        there = {key: moved(value, device) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return there
        like = copy.copy(batch)
        for key, value in there.items():  # ``update`` may mean something else
            like[key] = value
        return like
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


class Stream:
    """Where exchanges run beside backward: a CUDA stream of its own; on the host they just run.

    A process has one for good: torch keeps the memory that was used on a stream for that stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of(device) if device.type == "cuda" else None

    def enter_thread(self) -> None:
        """To be called first in each thread that uses it: CUDA's present device is a thread's own."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    @property
    def is_beside(self) -> bool:
        """Whether work is put here rather than done."""
        return self._stream is not None

    def mark(self) -> torch.cuda.Event | None:
        """What the present stream has been given so far."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """What is done in this context is done here, once all up to ``mark`` has been."""
        if self._stream is None or mark is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield

    def finish(self, timeout_s: float) -> bool:
        """Wait until all of it is done; False where that takes longer."""
        if self._stream is None:
            return True
        end, ends_s = self._stream.record_event(), time.monotonic() + timeout_s
        while not end.query():
            if time.monotonic() >= ends_s:
                return False
            time.sleep(FINISH_POLL_S)
        return True


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
