"""Real nodes: three in this process over loopback and tmp files, and three processes to be killed."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from distroml.consensus.peers import Channel
from distroml.consensus.raft_types import (
    EntryTooLarge,
    NotLeader,
    Overloaded,
    RaftSettings,
    RaftStatus,
    Role,
    StorageCorrupt,
    UnreadableEntry,
    check_voters,
)
from tests.consensus.faulty_disk import ENOSPC, FaultyDisk
from tests.consensus.live import PATIENT, LiveCluster, free_addresses, until

SMALL = msgspec.structs.replace(
    PATIENT, compaction_entries=50, trailing_entries=5, snapshot_chunk_bytes=1024
)


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[LiveCluster]:
    cluster = LiveCluster(tmp_path, "a", "b", "c", settings=SMALL)
    await cluster.start_all()
    yield cluster
    await cluster.close()


async def test_a_first_start_waits_for_all_and_says_for_whom(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a", "b", "c", settings=SMALL)
    a, b = await cluster.start("a"), await cluster.start("b")
    awaited = "a new cluster is founded once by all of its voters; not heard yet: c"
    await until(lambda: a.node.status().awaits == b.node.status().awaits == awaited, "both wait")
    rounds = a.node.counters["pre_vote_rounds"]
    await until(lambda: a.node.counters["pre_vote_rounds"] > rounds + 3, "it asks in vain")
    assert (a.node.term, a.node.leader) == (0, None)
    await cluster.start("c")
    await cluster.commit(b"founded")
    assert {live.node.status().awaits for live in cluster.nodes.values()} == {""}
    for name in ("a", "b", "c"):
        await cluster.kill(name)
    await cluster.start("b")
    await cluster.start("c")
    await cluster.commit(b"any majority")
    await cluster.close()


def others(cluster: LiveCluster, name: str) -> list[str]:
    return [other for other in cluster.nodes if other != name]


async def test_three_nodes_elect_one_leader_and_replicate(three: LiveCluster) -> None:
    leader = await three.leader()
    await three.commit(*(b"%d" % number for number in range(20)))
    for live in three.nodes.values():
        assert live.entries == [b"%d" % number for number in range(20)]
        await until(lambda live=live: live.node.leader == leader.node.name, "all know the leader")
        assert live.node.term == leader.node.term


async def test_only_the_leader_accepts_and_says_who_it_is(three: LiveCluster) -> None:
    leader = await three.leader()
    follower = three.nodes[others(three, leader.node.name)[0]]
    await until(lambda: follower.node.leader is not None, "the follower knows the leader")
    with pytest.raises(NotLeader) as refused:
        follower.node.append(b"x")
    assert refused.value.leader == leader.node.name
    with pytest.raises(EntryTooLarge):
        leader.node.append(bytes(40_000))


async def test_too_many_waiting_entries_are_refused_not_queued(three: LiveCluster) -> None:
    leader = await three.leader()

    def flood() -> None:
        for _ in range(100_000):
            leader.node.append(bytes(1000))

    with pytest.raises(Overloaded):
        flood()


async def test_a_killed_leader_is_replaced_and_comes_back(three: LiveCluster) -> None:
    await three.commit(b"one", b"two")
    old = await three.leader()
    name = old.node.name
    await three.kill(name)
    await three.commit(b"three")
    back = await three.start(name)
    await until(lambda: back.entries == [b"one", b"two", b"three"], "the old leader caught up")
    assert back.journal.restored == 0, "the log alone was enough"


async def test_a_node_far_behind_catches_up_by_snapshot(three: LiveCluster) -> None:
    leader = await three.leader()
    away = others(three, leader.node.name)[0]
    await three.commit(b"first")
    await three.kill(away)
    for start in range(0, 300, 50):
        await three.commit(*(b"entry-%d" % number for number in range(start, start + 50)))
    assert leader.node.status().snapshot_index > 200
    back = await three.start(away)
    await until(lambda: back.entries == leader.entries, "the node caught up")
    assert back.journal.restored == 1
    await three.commit(b"after")
    assert back.entries[-1] == b"after"


async def test_all_nodes_stop_and_start_again_with_everything(three: LiveCluster) -> None:
    await three.commit(*(b"%d" % number for number in range(130)))
    expected = [b"%d" % number for number in range(130)]
    for name in list(three.nodes):
        await three.kill(name)
    await three.start_all()
    await three.commit(b"more")
    for live in three.nodes.values():
        assert live.entries == [*expected, b"more"]
        assert live.node.status().log_entries < 130


async def test_reads_are_linearizable_on_every_node(three: LiveCluster) -> None:
    leader = await three.leader()
    for live in three.nodes.values():
        await until(lambda live=live: live.node.leader == leader.node.name, "all know the leader")
    for round_ in range(5):
        entry = b"round-%d" % round_
        leader.node.append(entry)
        await until(lambda entry=entry: entry in leader.entries, "the leader applied")
        for live in three.nodes.values():
            index = await live.node.read_index(timeout_s=5)
            assert index <= live.node.applied_index
            assert entry in live.entries


async def test_a_read_without_a_quorum_ends_in_an_error(three: LiveCluster) -> None:
    leader = await three.leader()
    for name in others(three, leader.node.name):
        await three.kill(name)
    with pytest.raises((NotLeader, TimeoutError)):
        await leader.node.read_index(timeout_s=0.3)
    await until(lambda: not leader.node.is_leader, "without a quorum it leads no more")
    with pytest.raises(NotLeader):
        leader.node.append(b"x")


async def test_leadership_is_handed_over_on_request(three: LiveCluster) -> None:
    leader = await three.leader()
    await three.commit(b"x")
    target = others(three, leader.node.name)[1]
    assert await leader.node.transfer_leadership(target, timeout_s=5) == target
    assert three.nodes[target].node.is_leader
    await three.commit(b"y")
    assert await leader.node.transfer_leadership(leader.node.name, timeout_s=5) == leader.node.name
    await until(lambda: leader.node.is_leader, "leadership came back on the old leader's request")
    assert await three.nodes[target].node.transfer_leadership(leader.node.name) == leader.node.name


async def test_a_transfer_to_a_dead_node_leaves_the_leader_in_place(three: LiveCluster) -> None:
    leader = await three.leader()
    target = others(three, leader.node.name)[0]
    await three.kill(target)
    await until(lambda: not leader.links.connected(target), "the leader noticed")
    assert await leader.node.transfer_leadership(target, timeout_s=0.3) is None
    await three.commit(b"still leading")
    assert leader.node.is_leader


async def test_a_learner_that_is_there_before_a_voter_has_read_its_disk_is_followed(
    tmp_path: Path,
) -> None:
    cluster = LiveCluster(tmp_path, "a")
    voter, learner = cluster.make("a"), cluster.learner("x")
    await learner.links.start()
    await learner.node.start()
    await voter.links.start()
    await until(lambda: voter.links.connected("x"), "the learner is connected")
    await voter.node.start()
    cluster.nodes |= {"a": voter, "x": learner}
    await cluster.commit(b"for the learner too")
    assert learner.node.status().role is Role.LEARNER
    await cluster.close()


async def test_role_handlers_hear_of_every_change(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a")
    heard: list[RaftStatus] = []
    live = cluster.make("a")
    live.node.on_role(heard.append)  # before it starts: a lone voter leads within milliseconds
    await live.links.start()
    await live.node.start()
    cluster.nodes["a"] = live
    await until(
        lambda: any(status.role is Role.LEADER and status.leader == "a" for status in heard),
        "it hears that it leads",
    )
    await cluster.close()
    await until(lambda: heard[-1].healthy is False, "it hears that it is stopped")


async def test_a_node_that_has_not_started_says_so_instead_of_failing(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a")
    live = cluster.make("a")
    assert live.node.status().reason == "not started"
    assert (live.node.leader, live.node.term, live.node.is_leader) == (None, 0, False)
    with pytest.raises(NotLeader):
        live.node.append(b"x")
    with pytest.raises(NotLeader):
        await live.node.read_index(timeout_s=1)


async def test_settings_that_the_links_cannot_carry_are_refused(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(PATIENT, append_batch_bytes=8 * 1024 * 1024)
    with pytest.raises(ValueError, match="links carry frames of 4194304 bytes"):
        LiveCluster(tmp_path, "a", settings=settings).make("a")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"election_min_s": 0.1}, "must exceed 3"),
        ({"election_max_s": 0.2}, "votes split"),
        ({"heartbeat_s": 0}, "above 0"),
        ({"check_quorum_s": 0.01}, "check_quorum_s"),
        ({"entry_max_bytes": 0}, "entry_max_bytes"),
        ({"trailing_entries": -1}, "trailing_entries"),
    ],
)
def test_unusable_settings_are_named(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RaftSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("voters", "complaint"),
    [
        ((), "0 voters given"),
        (tuple("abcdefgh"), "8 voters given"),
        (("a", "a"), "must differ"),
        (("a", ""), "must have 1 to"),
    ],
)
def test_unusable_voter_sets_are_named(voters: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_voters(voters)


async def test_a_cluster_of_one_commits_and_restarts_alone(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a", settings=SMALL)
    await cluster.start("a")
    await cluster.commit(*(b"%d" % number for number in range(200)))
    assert await cluster.nodes["a"].node.read_index(timeout_s=5) > 200
    assert await cluster.nodes["a"].node.transfer_leadership(timeout_s=0.2) is None
    await cluster.kill("a")
    live = await cluster.start("a")
    await until(lambda: len(live.entries) == 200, "everything came back")
    await cluster.close()


async def test_a_full_disk_stops_acknowledging_until_there_is_space(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a", "b", "c", settings=SMALL)
    disks = {name: FaultyDisk() for name in cluster.addresses}
    for name, disk in disks.items():
        await cluster.start(name, disk)
    leader = await cluster.leader()
    await cluster.commit(b"before")
    disks[leader.node.name].fail["write"] = ENOSPC
    leader.node.append(b"never promised by this node alone")
    await until(lambda: not leader.node.status().healthy, "the node says that it is unwell")
    assert "No space left" in leader.node.status().reason
    assert not leader.node.is_leader
    with pytest.raises(NotLeader):
        leader.node.append(b"x")
    await until(
        lambda: any(live.node.is_leader for live in cluster.nodes.values()), "another node leads"
    )
    disks[leader.node.name].fail.clear()
    await until(lambda: leader.node.status().healthy, "the node is well again")
    await cluster.commit(b"after")
    assert leader.entries[-1] == b"after"
    await cluster.close()


async def test_nothing_is_acknowledged_before_it_is_on_disk(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a", "b", "c")
    disks = {name: FaultyDisk() for name in cluster.addresses}
    for name, disk in disks.items():
        await cluster.start(name, disk)
    leader = await cluster.leader()
    await cluster.commit(b"before")
    followers = [cluster.nodes[name] for name in others(cluster, leader.node.name)]
    for follower in followers:
        disks[follower.node.name].flowing.clear()
    leader.node.append(b"not yet durable")
    for follower in followers:
        await until(
            lambda node=follower.node: node.core.raft.log.last_index > node.commit_index,
            "the follower has the entry in memory",
        )
    for _ in range(50):
        await asyncio.sleep(0.002)
        assert b"not yet durable" not in leader.entries
    for follower in followers:
        disks[follower.node.name].flowing.set()
    await until(lambda: b"not yet durable" in leader.entries, "it is committed once it is durable")
    await cluster.close()


async def test_a_hanging_disk_makes_the_node_unwell(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a")
    disk = FaultyDisk()
    live = await cluster.start("a", disk)
    await cluster.commit(b"before")
    disk.flowing.clear()
    live.node.append(b"hangs")
    await until(lambda: not live.node.status().healthy, "the hanging write is noticed")
    assert "takes longer than" in live.node.status().reason
    disk.flowing.set()
    await until(lambda: b"hangs" in live.entries, "it goes on")
    assert live.node.is_leader
    await cluster.close()


async def test_a_damaged_log_keeps_the_node_from_starting(three: LiveCluster) -> None:
    await three.commit(b"needle")
    await three.commit(b"another")
    name = others(three, (await three.leader()).node.name)[0]
    await three.kill(name)
    segments = sorted((three.directory / name / "raft").glob("*.wal"))
    segments[-1].write_bytes(segments[-1].read_bytes().replace(b"needle", b"noodle"))
    with pytest.raises(StorageCorrupt, match="is damaged at byte"):
        await three.start(name)


async def test_an_emptied_node_comes_back_as_itself(three: LiveCluster) -> None:
    await three.commit(*(b"%d" % number for number in range(120)))
    name = others(three, (await three.leader()).node.name)[0]
    await three.kill(name)
    directory = three.directory / name / "raft"
    for path in directory.iterdir():
        path.unlink()
    back = await three.start(name)
    assert not back.node.status().proven
    await until(lambda: len(back.entries) == 120, "the node has everything again")
    await until(lambda: back.node.status().proven, "the node votes again")


async def test_garbage_from_a_peer_is_dropped_and_counted(three: LiveCluster) -> None:
    leader = await three.leader()
    follower = three.nodes[others(three, leader.node.name)[0]]
    for body in (b"", b"\xc1", b"pickle\x80\x02.", bytes(1000)):
        assert follower.links.send(leader.node.name, Channel.RAFT, body)
    await until(lambda: leader.node.counters["frames_malformed"] == 4, "all four were counted")
    await three.commit(b"unharmed")


# ---------------------------------------------------------------------- real processes


class Victim:
    """A node in a process of its own."""

    def __init__(self, name: str, directory: Path, voters: list[str]) -> None:
        self.name, self.directory, self.voters = name, directory, voters
        self.acked: set[str] = set()
        self.dumped: list[str] | None = None
        self.leads = False
        self.process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.leads, self.dumped = False, None
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.consensus.kill_victim",
            self.name,
            str(self.directory),
            *self.voters,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            limit=2**22,
        )
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if not line.endswith(b"\n"):
                return  # cut by the kill
            word, *rest = line.decode().split()
            if word == "acked":
                self.acked.add(rest[0])
            elif word == "leader":
                self.leads = True
            elif word == "entries":
                self.dumped = rest

    def say(self, line: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(line.encode() + b"\n")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    async def gone(self) -> None:
        assert self.process is not None
        await self.process.wait()
        assert self._reading is not None
        await self._reading


async def test_a_snapshot_that_cannot_be_taken_is_counted_and_told(tmp_path: Path) -> None:
    cluster = LiveCluster(tmp_path, "a", settings=SMALL)
    live = await cluster.start("a")
    snapshot = live.journal.snapshot

    def fails() -> bytes:
        raise ValueError("the state is too large")

    live.journal.snapshot = fails  # type: ignore[method-assign]
    try:
        every = range(SMALL.compaction_entries)
        await cluster.commit(*(b"%d" % number for number in every))
        await until(lambda: live.node.counters["snapshots_failed"] > 0, "one has failed")
        assert "the state is too large" in live.node.status().snapshot_error
        live.journal.snapshot = snapshot  # type: ignore[method-assign]
        await cluster.commit(*(b"later %d" % number for number in every))
        await until(lambda: live.node.status().snapshot_index > 0, "one was taken")
        assert live.node.status().snapshot_error == ""
    finally:
        await cluster.close()


async def test_an_entry_that_cannot_be_read_stops_the_node_and_says_what_to_do(
    tmp_path: Path,
) -> None:
    cluster = LiveCluster(tmp_path, "a")
    live = cluster.make("a")

    def apply(index: int, entry: bytes) -> None:
        raise UnreadableEntry(index, "Invalid value 'ShapeJobs'")

    live.journal.apply = apply  # type: ignore[method-assign]
    await live.node.start()
    try:
        await until(lambda: live.node.is_leader, "it leads")
        live.node.append(b"newer")
        await until(lambda: bool(live.node.failure), "it stopped")
        assert "entry 3 of the log is of a newer version" in live.node.failure
        assert "upgrade this node" in live.node.status().reason
    finally:
        await live.node.stop()


@pytest.mark.parametrize("others", ["a", "abcde", "abd"])
async def test_a_voter_does_not_start_under_other_voters(tmp_path: Path, others: str) -> None:
    founded = LiveCluster(tmp_path, *"abc")
    await founded.start_all()
    await founded.commit(b"acknowledged")
    await founded.close()
    changed = LiveCluster(tmp_path, *others)
    with pytest.raises(StorageCorrupt, match="voters a, b, c, but this node was given"):
        await changed.make("a").node.start()
    await founded.start_all()
    await founded.commit(b"later")
    await founded.close()


async def test_sigkill_of_all_nodes_at_once_loses_nothing_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(5)
    voters = [f"{name}={address.port}" for name, address in free_addresses(*"abc").items()]
    victims = [Victim(name, tmp_path / name, voters) for name in "abc"]
    sent = 0
    for round_ in range(3):
        for victim in victims:
            victim.directory.mkdir(exist_ok=True)
            await victim.start()
        await until(lambda: any(v.leads for v in victims), f"round {round_}: one leads", 20)
        enough = len(set().union(*(v.acked for v in victims))) + rng.randint(50, 400)
        while len(set().union(*(v.acked for v in victims))) < enough:
            for victim in victims:
                for _ in range(20 if victim.leads else 0):
                    victim.say(f"append e{sent}")
                    sent += 1
            await asyncio.sleep(0.001)
        for victim in victims:
            victim.kill()
        for victim in victims:
            await victim.gone()
    acked: set[str] = set().union(*(victim.acked for victim in victims))
    for victim in victims:
        await victim.start()
    await until(lambda: any(v.leads for v in victims), "one leads after the last start", 20)
    leader = next(v for v in victims if v.leads)
    leader.say("append last")
    await until(lambda: "last" in leader.acked, "the cluster commits again", 20)

    def complete(victim: Victim) -> bool:
        victim.say("dump")
        return victim.dumped is not None and "last" in victim.dumped

    for victim in victims:
        await until(lambda v=victim: complete(v), f"node {victim.name} caught up", 20)
    for victim in victims:
        assert victim.dumped is not None
        assert acked <= set(victim.dumped), "an acknowledged entry was lost"
        assert victim.dumped == victims[0].dumped
        victim.kill()
    for victim in victims:
        await victim.gone()
