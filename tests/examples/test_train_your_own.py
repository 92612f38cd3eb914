from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distroml.spec import parse_spec

SPEC = Path(__file__).parents[2] / "examples" / "own.json"


def test_the_users_own_model_trains_on_real_data(agent: Any) -> None:
    pytest.importorskip("sklearn")
    spec = parse_spec(SPEC.read_bytes())
    workers = agent.run(spec)
    for worker in workers:
        assert worker.failure is None, worker.failure
    first = workers[0]
    assert first.total_steps == 4 * 15
    assert {w.outcome.state_digest for w in workers} == {first.outcome.state_digest}
    accuracy = first.series("accuracy")
    assert sorted(accuracy) == [15, 30, 45, 60]
    assert accuracy[60] > 0.9
    assert [s.step for s in first.shards] == [20, 40, 60]
