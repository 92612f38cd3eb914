from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distroml.runtime.checkpoint.stores.opening import Stores
from distroml.runtime.control import Join, WorkerPlan
from distroml.runtime.worker.builtin import load_adapter
from distroml.runtime.worker.meetings import Meetings
from distroml.runtime.worker.membership import Membership, Prepared
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import CollectiveBroken
from tests.runtime.worker.test_training import spec_of


class Breaks:
    """A transfer whose source dies."""

    def receive(self) -> Any:
        raise CollectiveBroken("the source is gone")


def test_a_transfer_that_breaks_is_no_state(tmp_path: Any) -> None:
    spec = spec_of(2)
    join = Join(generation=1, rank=1, local_rank=0, world_size=2, checkpoint=None)
    plan = WorkerPlan(
        job_id="job",
        run_id="run",
        worker=1,
        node="a",
        host="127.0.0.1",
        spec=spec,
        store_dir=str(tmp_path),
        control_path="",
        log_path="",
        join=join,
    )
    adapter = load_adapter(spec)
    prepared = Prepared(plan, adapter, None, adapter.new_state(), Stores(str(tmp_path)))
    group = RankGroup(1, 1, 2, "127.0.0.1", lambda key, value: None)
    link: Any = SimpleNamespace(meetings=Meetings(lambda arrival: None))
    membership = Membership(join, group, prepared, link, lambda: 0)
    transfer: Any = Breaks()
    with pytest.raises(CollectiveBroken):
        membership._share(transfer, 0, [1])
    assert prepared.run is None, "it would pass its own first weights off as the run's"
