"""Faults of wall clocks: they jump. Monotonic clocks never do, on any machine."""

from __future__ import annotations

from chaos.faults.disk import fail
from chaos.faults.strike import Inflict, Inflicted, Strike
from chaos.under_test.failpoints import Failpoints


async def jump(strike: Strike) -> Inflicted:
    """All processes of a node see another time of day, until it jumps back."""
    node, offset_s = await strike.node(), float(strike.choice("offset_s"))
    return fail(strike, [node], Failpoints(wall_offset_s=offset_s), {"offset_s": offset_s})


INFLICT: dict[str, Inflict] = {"clock-jump": jump}
