"""The checkpoint benchmark measures what it says, on a state of a few tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import checkpoint
from bench.parts import Bench
from bench.table import Row

SCALE = checkpoint.Scale(
    state_bytes=48 * checkpoint.MIB, rounds=1, ranks=(2,), commits=1, rate_s=0.5
)


@pytest.mark.parametrize("part", checkpoint.PARTS)
async def test_each_part_gives_rows_that_were_measured(tmp_path: Path, part: str) -> None:
    said: list[str] = []
    rows: list[Row] = await checkpoint.PARTS[part](
        Bench(scale=SCALE, directory=tmp_path, say=said.append)
    )
    assert rows
    assert said
    for row in rows:
        assert row.runs == 1
        assert all(value > 0 for value in row.values.ours + row.values.peer if row.unit != "s")
        assert row.peer is not None or part == "commit"
