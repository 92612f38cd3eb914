"""Faults of the checkpoint stores that all nodes share: a directory, and an object store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from chaos.faults.disk import fail
from chaos.faults.strike import Inflict, Inflicted, Strike, Unfit
from chaos.object_server import Outage
from chaos.under_test.failpoints import Failpoints, SyncFault


async def down(strike: Strike) -> Inflicted:
    """The directory is a link that leads nowhere: nothing in it can be opened, and nothing made in its place."""
    store = strike.cluster.store_dir
    away = store.with_name("away")
    if store.is_symlink() or away.exists():
        raise Unfit("the store is down already")
    strike.strikes_now()
    store.rename(away)
    os.symlink(store.with_name("nowhere") / "nothing", store)

    async def take_back() -> None:
        store.unlink()
        away.rename(store)

    return Inflicted(nodes=_everybody(strike), detail={}, take_back=take_back)


async def full(strike: Strike) -> Inflicted:
    """A balloon takes every free byte of the store."""
    disk = strike.cluster.store_disk
    strike.strikes_now()
    taken = await asyncio.to_thread(disk.fill)

    async def take_back() -> None:
        disk.empty()

    return Inflicted(nodes=_everybody(strike), detail={"taken_bytes": taken}, take_back=take_back)


async def sync_fails(strike: Strike) -> Inflicted:
    """fsync of files in the store fails, or takes longer, on all nodes."""
    pause_s = float(strike.planned.choices.get("pause_s", 0.0))
    fault = SyncFault(
        under=str(strike.cluster.store_disk.path), error=pause_s == 0, pause_s=pause_s
    )
    detail: dict[str, object] = {"pause_s": pause_s} if pause_s else {"error": "EIO"}
    return fail(strike, list(strike.cluster.nodes.values()), Failpoints(syncs=(fault,)), detail)


async def outage(strike: Strike) -> Inflicted:
    """The object store is down, slow or failing, for everybody."""
    objects = strike.cluster.objects
    if objects is None:
        raise Unfit(f"there is no object store: {strike.cluster.without_objects}")
    await _in_use(strike, objects.url)
    strike.strikes_now()
    before = await objects.fail(strike.fault, _OUTAGES[strike.planned.kind](strike))

    async def take_back() -> str:
        return f"{await objects.heal(strike.fault) - before} requests were struck meanwhile"

    return Inflicted(nodes=_everybody(strike), detail={}, take_back=take_back)


async def _in_use(strike: Strike, store: str) -> None:
    """Waits a moment for it. Raises Unfit where no job has its checkpoints there."""

    async def look() -> list[dict[str, Any]]:
        jobs = await strike.active_jobs()
        return [job for job in jobs if job["spec"]["checkpointing"]["store"] == store]

    if not await strike.soon(look):
        raise Unfit("there is no job now whose checkpoints are in the object store")


def _everybody(strike: Strike) -> tuple[str, ...]:
    return tuple(strike.cluster.nodes)


_OUTAGES: dict[str, Callable[[Strike], Outage]] = {
    "s3-down": lambda strike: Outage(down=strike.choice("how")),
    "s3-slow": lambda strike: Outage(delay_s=strike.choice("delay_s")),
    "s3-errors": lambda strike: Outage(errors=strike.choice("share")),
}

INFLICT: dict[str, Inflict] = {
    "store-down": down,
    "store-full": full,
    "store-slow": sync_fails,
    "store-error": sync_fails,
    **dict.fromkeys(_OUTAGES, outage),
}
