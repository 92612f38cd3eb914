"""Faults of disks: full, failing and slow ones, damaged checkpoints, data directories that are lost or old.

An older copy of ``raft/`` is never put back: a voter that forgets what it has promised breaks Raft, and no cluster can
notice it (architecture, "Lost data directories"). What can be old is everything else in the data directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

from chaos.cluster import ChaosNode
from chaos.faults.moments import POLL_S, checkpoint_directories
from chaos.faults.process import power_off
from chaos.faults.strike import Inflict, Inflicted, Strike, TakeBack, Unfit
from chaos.processes import Process, Role
from chaos.schedule import minority
from chaos.under_test.failpoints import Failpoints, SyncFault

RAFT = "raft"
DYING_TIMEOUT_S = 10.0
_SOCKETS_AND_LOCKS = (".sock", "lock")


async def full(strike: Strike) -> Inflicted:
    """A balloon takes every free byte of a node's disk."""
    node = await strike.node()
    strike.strikes_now()
    taken = await asyncio.to_thread(node.disk.fill)

    async def take_back() -> None:
        node.disk.empty()

    return Inflicted(nodes=(node.name,), detail={"taken_bytes": taken}, take_back=take_back)


async def sync_fails(strike: Strike) -> Inflicted:
    """fsync of files in a node's data directory fails, or takes longer."""
    node, pause_s = await strike.node(), float(strike.planned.choices.get("pause_s", 0.0))
    fault = SyncFault(under=str(node.data_dir), error=pause_s == 0, pause_s=pause_s)
    detail: dict[str, object] = {"pause_s": pause_s} if pause_s else {"error": "EIO"}
    return fail(strike, [node], Failpoints(syncs=(fault,)), detail)


def fail(
    strike: Strike, nodes: list[ChaosNode], failpoints: Failpoints, detail: dict[str, object]
) -> Inflicted:
    """Set failpoints on nodes."""
    strike.strikes_now()
    for node in nodes:
        node.fail(strike.fault, failpoints)

    async def take_back() -> None:
        for node in nodes:
            node.heal(strike.fault)

    return Inflicted(nodes=tuple(n.name for n in nodes), detail=detail, take_back=take_back)


async def damage_shard(strike: Strike) -> Inflicted:
    """A file of a checkpoint is deleted, cut or changed; its old content comes back at the end."""
    path = _shard(strike)
    content = path.read_bytes()
    relative = Path(*path.parts[-5:])  # job, run, "checkpoints", step, file
    job_id = relative.parts[0]
    victims = await _workers_of(strike, job_id) if strike.choice("then_kill") else []
    strike.strikes_now()
    where = _damage(strike, path, content)
    killed = [victim.pid for victim in victims if victim.kill()]

    async def take_back() -> str:
        """As soon as the store is there and has room: it may suffer from other faults still."""
        while True:
            if strike.cluster.store_dir.is_dir() and not path.parent.is_dir():
                return "the checkpoint was removed meanwhile"
            with contextlib.suppress(OSError):
                fresh = path.with_name(f".{path.name}.healed")
                fresh.write_bytes(content)
                fresh.replace(path)
                return ""
            await asyncio.sleep(POLL_S)

    return Inflicted(
        nodes=(),
        detail={
            "job_id": job_id,
            "step": int(path.parent.name.rpartition("_")[2]),
            "file": str(relative),
            "damage": where,
            "killed": killed,
        },
        take_back=take_back,
    )


def _shard(strike: Strike) -> Path:
    found = checkpoint_directories(strike.cluster.store_dirs)
    directories = [directory for directory in found if any(directory.glob("*.safetensors"))]
    if strike.choice("checkpoint") == "newest":
        newest = {directory.parent: directory for directory in directories}
        directories = list(newest.values())
    directory = strike.one_of(directories, "checkpoint in the store")
    return strike.one_of(sorted(directory.glob("*.safetensors")), f"file in {directory.name}")


def _damage(strike: Strike, path: Path, content: bytes) -> str:
    if strike.planned.kind == "shard-deleted":
        path.unlink()
        return "deleted"
    place = int(strike.planned.pick * len(content))
    damaged = bytearray(content)
    if strike.planned.kind == "shard-truncated":
        del damaged[place:]
    else:
        damaged[place] ^= 1 << (place % 8)
    path.write_bytes(damaged)
    return f"{strike.planned.kind.removeprefix('shard-')} at byte {place} of {len(content)}"


async def _workers_of(strike: Strike, job_id: str) -> list[Process]:
    pids = {
        worker["pid"]
        for job in await strike.active_jobs()
        if job["job_id"] == job_id
        for worker in job["workers"]
    }
    return [
        process
        for node in strike.cluster.nodes.values()
        for process in node.processes(Role.WORKER)
        if process.pid in pids
    ]


async def lose_directory(strike: Strike) -> Inflicted:
    """Power failure, and the data directory is gone; of a minority in one run (see ``who_may_forget``)."""
    node = await who_may_forget(strike)
    await _off(strike, node)
    shutil.rmtree(node.data_dir)
    lost = sorted(strike.cluster.lost_directories)
    return Inflicted(nodes=(node.name,), detail={"lost": lost}, take_back=_return(strike, node))


async def who_may_forget(strike: Strike) -> ChaosNode:
    """A node whose files may be lost, all or the newest: one that was drawn, or another one that lost some before.

    Never more than a minority in one run. With two copies of each checkpoint, and no time in which they are made up for, the
    loss of a second node's files takes checkpoints with it.

    Raises:
        Unfit: none of those that may runs now.
    """
    node, lost = await strike.node(), strike.cluster.lost_directories
    if node.name not in lost and len(lost) >= minority(len(strike.cluster.nodes)):
        running = [strike.cluster.nodes[name] for name in sorted(lost)]
        node = strike.one_of(
            [one for one in running if one.running], "node that lost files before, and runs"
        )
    lost.add(node.name)
    return node


async def stale_directory(strike: Strike) -> Inflicted:
    """Power failure, and all but the Raft log is as it was before the agent's last restart; of a minority in one run."""
    node, age_s = await who_may_forget(strike), float(strike.choice("age_s"))
    copy = node.disk.path / "older"
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(node.data_dir, copy, ignore=_not_to_be_copied)
    except shutil.Error as error:  # a file went away under it
        shutil.rmtree(copy, ignore_errors=True)
        raise Unfit(f"the data directory could not be copied: {error}") from None
    if agent := node.agent():
        agent.kill()  # the next incarnation's number is not in the copy
    await asyncio.sleep(age_s)
    await _off(strike, node)
    for entry in node.data_dir.iterdir():
        if entry.name != RAFT:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in copy.iterdir():
        entry.rename(node.data_dir / entry.name)
    copy.rmdir()
    return Inflicted(nodes=(node.name,), detail={"age_s": age_s}, take_back=_return(strike, node))


def _not_to_be_copied(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if name == RAFT or name.endswith(_SOCKETS_AND_LOCKS)]


async def _off(strike: Strike, node: ChaosNode) -> None:
    """Until nothing of the node is left that could still write."""
    strike.strikes_now()
    node.hold(strike.fault)
    async with asyncio.timeout(DYING_TIMEOUT_S):
        while power_off([node]):  # noqa: ASYNC110 - processes tell nobody that they are gone
            await asyncio.sleep(POLL_S)


def _return(strike: Strike, node: ChaosNode) -> TakeBack:
    async def take_back() -> None:
        node.let_go(strike.fault)
        if not node.held:
            node.start()

    return take_back


INFLICT: dict[str, Inflict] = {
    "disk-full": full,
    "sync-error": sync_fails,
    "sync-slow": sync_fails,
    "shard-deleted": damage_shard,
    "shard-truncated": damage_shard,
    "shard-flipped": damage_shard,
    "directory-lost": lose_directory,
    "directory-stale": stale_directory,
}
