"""What this machine allows: tried out, never guessed, so that faults it cannot inflict are left out and named."""

from __future__ import annotations

import tempfile
from pathlib import Path

from msgspec import Struct

from chaos import leftovers, network, storage
from chaos.kinds import Need
from chaos.objects import missing_for_objects
from chaos.processes import own_mark


class Machine(Struct, frozen=True):
    """What faults may need, and why the rest is missing."""

    has: frozenset[Need]
    lacks: dict[Need, str]


async def look(*, namespaces: bool = True) -> Machine:
    """Try namespaces, delays and small file systems, and look for what makes an object store.

    Args:
        namespaces: False: they are not wanted.
    """
    await leftovers.remove_of_dead_harnesses()
    lacks: dict[Need, str] = {}
    missing = network.missing_for_namespaces() if namespaces else "they were switched off"
    no_delays = ""
    if not missing:
        try:
            no_delays = await network.probe(own_mark())
        except network.NetworkUnusable as error:
            missing = str(error)
    if missing:
        lacks[Need.NAMESPACES] = lacks[Need.DELAYS] = missing
    elif no_delays:
        lacks[Need.DELAYS] = no_delays
    if not _can_mount():
        lacks[Need.DISKS] = "file systems can be mounted by root only, and not in every container"
    if no_objects := missing_for_objects():
        lacks[Need.OBJECTS] = no_objects
    return Machine(frozenset(set(Need) - lacks.keys()), lacks)


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        disk = storage.Disk(f"chaos-{own_mark()}-probe", Path(place, "probe"), 1)
        disk.make()
        if disk.own:
            storage.unmount(own_mark())
        return disk.own
