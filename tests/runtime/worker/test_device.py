"""GPUs as far as a host without any can tell: who has which, what is moved there, and the line between them with Gloo in it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from torch.nn.utils.rnn import pack_sequence

from distroml.errors import DistroMLError
from distroml.runtime.worker import device_group
from distroml.runtime.worker.device import CPU, claim, moved, prepare_device
from distroml.runtime.worker.device_group import PREFIX, DeviceGroup
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import CollectiveBroken
from tests.runtime.worker.agent_stub import AgentStub
from tests.runtime.worker.rank_threads import run_ranks
from tests.runtime.worker.test_gradient_sync import UNEVEN, equal, train
from tests.runtime.worker.test_training import spec_of

GPUS = ["GPU-a", "GPU-b"]
CLAIM = """
import sys
from pathlib import Path
from distroml.runtime.worker.device import claim
print(claim(Path(sys.argv[1]), sys.argv[2:], timeout_s=20), flush=True)
sys.stdin.read()
"""
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")


# --- who has which -----------------------------------------------------------------------------------------------


def claimed(directory: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process that has a GPU, and which."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(directory), *GPUS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_each_process_has_a_gpu_of_its_own_until_it_dies(tmp_path: Path) -> None:
    directory = tmp_path / "gpus"
    first, first_has = claimed(directory)
    second, second_has = claimed(directory)
    try:
        assert [first_has, second_has] == [0, 1]
        with pytest.raises(DistroMLError, match=r"All 2 GPUs .* as many slots as it has GPUs"):
            claim(directory, GPUS, timeout_s=0.0)
        first.kill()
        assert claim(directory, GPUS, timeout_s=20.0) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@no_gpu
def test_without_a_gpu_the_job_is_told_what_is_missing_and_where(agent: AgentStub) -> None:
    with pytest.raises(DistroMLError, match=r"distributed\.backend is nccl"):
        prepare_device("nccl")
    assert prepare_device("gloo") == CPU
    (worker,) = agent.run(spec_of(1, distributed={"backend": "nccl"}))
    assert worker.failure is not None
    assert "distributed.backend is nccl, and on this node torch" in worker.failure.error


# --- what is moved there -----------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "inputs targets")


def test_all_tensors_of_a_batch_are_moved_in_whatever_they_are() -> None:
    meta, tensor = torch.device("meta"), torch.zeros(2)
    batch = {"pair": Pair(tensor, [tensor, "text"]), "rest": (tensor, 7, None)}
    there = moved(batch, meta)
    assert type(there["pair"]) is Pair
    assert there["pair"].targets[1:] == ["text"]
    assert there["rest"][1:] == (7, None)
    for one in (there["pair"].inputs, there["pair"].targets[0], there["rest"][0]):
        assert one.device == meta
    assert moved(batch, CPU) is batch


def test_batches_keep_their_kind() -> None:
    meta, tensor = torch.device("meta"), torch.zeros(2)
    lists = moved(defaultdict(list, a=[tensor]), meta)
    assert lists["a"][0].device == meta
    assert lists["b"] == []
    assert moved(Counter(a=2), meta) == Counter(a=2)
    assert moved(MappingProxyType({"a": tensor}), meta)["a"].device == meta
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    assert moved(packed, meta).data.device == meta


# --- the line between them ---------------------------------------------------------------------------------------


def gloo(group: RankGroup, device: torch.device) -> c10d.ProcessGroup:
    """As ``connect``, in host memory."""
    store = c10d.PrefixStore(PREFIX, group.store)
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    backend = c10d.ProcessGroupGloo(store, group.rank, group.world_size, options)
    handle = c10d.ProcessGroup(store, group.rank, group.world_size)
    handle._set_default_backend(c10d.ProcessGroup.BackendType.GLOO)
    handle._register_backend(device, c10d.ProcessGroup.BackendType.GLOO, backend)
    return handle


@pytest.fixture
def in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_group, "connect", gloo)


@pytest.mark.usefixtures("in_host_memory")
@pytest.mark.parametrize("reduction", ["deterministic", "fast"])
@pytest.mark.parametrize("world_size", [3, 2])
def test_gradients_on_a_line_of_their_own_are_the_same(reduction: str, world_size: int) -> None:
    def on_two_lines(group: RankGroup) -> dict[str, torch.Tensor]:
        line = DeviceGroup(group, CPU)
        line.open()
        return train(group, UNEVEN, reduction, line=line)

    expected = run_ranks(world_size, lambda group: train(group, UNEVEN, reduction))[0]
    for result in run_ranks(world_size, on_two_lines):
        equal(result, expected)


def a_group() -> RankGroup:
    return RankGroup(1, 0, 2, "127.0.0.1", lambda key, value: None)


class Handle:
    """A line that is up, and whether it was aborted."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        raise RuntimeError("NCCL error: remote process exited")


def test_an_abort_reaches_a_rank_that_connects_and_what_it_connected_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, handle = a_group(), Handle()
    connecting, go_on = threading.Event(), threading.Event()

    def connect(*_: object) -> Handle:
        connecting.set()
        go_on.wait(20)
        return handle

    monkeypatch.setattr(device_group, "connect", connect)

    def abort() -> None:
        connecting.wait(20)
        group.abort("another rank is gone")

    threading.Thread(target=abort, daemon=True).start()
    with pytest.raises(CollectiveBroken, match="another rank is gone"):
        DeviceGroup(group, CPU).open()
    go_on.set()
    assert handle.aborted.wait(20)


def test_a_line_is_aborted_with_its_group_and_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group, handle = a_group(), Handle()
    monkeypatch.setattr(device_group, "connect", lambda *_: handle)
    line = DeviceGroup(group, CPU)
    line.open()
    with pytest.raises(CollectiveBroken, match="remote process exited"):
        line.all_reduce(torch.zeros(1))
    assert handle.aborted.wait(20)
    with pytest.raises(CollectiveBroken, match="remote process exited"):
        line.all_reduce(torch.zeros(1))


def test_a_line_that_cannot_be_had_breaks_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise RuntimeError("ncclInvalidUsage: duplicate GPU")

    monkeypatch.setattr(device_group, "connect", connect)
    group = a_group()
    with pytest.raises(CollectiveBroken, match=r"connecting GPUs .* duplicate GPU"):
        DeviceGroup(group, CPU).open()
    assert group.broken
