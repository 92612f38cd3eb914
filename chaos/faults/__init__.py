"""How each kind of fault is inflicted and taken back: one table, put together from the families' modules."""

from __future__ import annotations

from chaos.faults import disk, network, process, store, time
from chaos.faults.strike import Inflict

INFLICT: dict[str, Inflict] = {
    **process.INFLICT,
    **network.INFLICT,
    **disk.INFLICT,
    **store.INFLICT,
    **time.INFLICT,
}
"""Name of a kind -> what does it."""
