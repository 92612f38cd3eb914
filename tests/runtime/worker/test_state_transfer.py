"""One state from its holder to whoever lacks it: one rank or several, a short description or a long one."""

from __future__ import annotations

import pytest
import torch

from distroml.runtime.control import MetricRecord
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.state_transfer import FIRST_BYTES, Arrived, Transfer, pack
from tests.runtime.worker.rank_threads import run_ranks

STEP = 7
SOURCE = 1


def blob_of(tensors: int) -> StateBlob:
    named = {
        f"model.layer.{i}.weight": torch.arange(i % 5 + 1, dtype=torch.float64)
        for i in range(tensors)
    }
    named["model.none"] = torch.empty(0)
    named["model.transposed"] = torch.arange(6.0).view(2, 3).t()
    return StateBlob(named, {"user": {"tensors": tensors}})


@pytest.mark.parametrize("behind", [[0], [2], [0, 2]])
@pytest.mark.parametrize("tensors", [0, 3, 3000])
def test_a_state_arrives_whole(behind: list[int], tensors: int) -> None:
    blob = blob_of(tensors)
    records = [MetricRecord(STEP, 0, 1.0, {"loss": 0.5})]
    parcel = pack(blob, STEP, records)
    assert (len(parcel.header) > FIRST_BYTES) is (tensors == 3000)

    def take_part(group: RankGroup) -> Arrived | None:
        transfer = Transfer(group, SOURCE, behind)
        if group.rank == SOURCE:
            return transfer.send(parcel)
        if group.rank in behind:
            return transfer.receive()
        return transfer.attend()

    for rank, came in enumerate(run_ranks(3, take_part)):
        assert (came is not None) is (rank in behind)
        if came is not None:
            assert came.step == STEP
            assert came.records == records
            assert came.blob.values == blob.values
            assert list(came.blob.tensors) == list(blob.tensors)
            for name, tensor in blob.tensors.items():
                assert torch.equal(came.blob.tensors[name], tensor)
