"""Whatever the links lose, double or reorder and whoever dies: stores converge to the union of prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distroml.runtime.store import sync
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.outgoing import MAX_OUTGOING_BYTES
from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.retention import HistoryLimits
from distroml.runtime.store.sync import MAX_WANTS, Offer, Want, choose, plan_pulls
from tests.runtime.store.histories import JOB, Cluster, content, key, lines, originate


def alike(cluster: Cluster, job_id: str = JOB) -> bool:
    held = [content(store, job_id) for store in cluster.stores.values()]
    return all(one == held[0] for one in held)


# --- decisions -------------------------------------------------------------------------------------------------


def test_asks_who_has_what_comes_next_and_most_of_it() -> None:
    offers = {"a": Offer(0, 5, 0.0), "b": Offer(2, 9, 0.0), "c": Offer(4, 20, 0.0)}
    assert choose(3, offers, skip_before=99.0) == ("b", 3, False)
    assert choose(0, offers, skip_before=99.0) == ("a", 0, False)
    assert choose(20, offers, skip_before=99.0) is None


def test_gives_records_up_only_when_nobody_has_them_for_long() -> None:
    offers = {"b": Offer(7, 9, 10.0), "c": Offer(4, 20, 10.0)}
    assert choose(3, offers, skip_before=9.0) is None
    assert choose(3, offers, skip_before=10.0) == ("c", 4, True)


peer_offers = st.dictionaries(
    st.sampled_from("abc"),
    st.dictionaries(
        st.builds(key, st.integers(0, 80)),
        st.builds(Offer, st.integers(0, 20), st.integers(0, 40), st.floats(0, 10)),
    ),
)


@settings(max_examples=50, deadline=None)
@given(
    mine=st.dictionaries(st.builds(key, st.integers(0, 80)), st.integers(0, 40)),
    offers=peer_offers,
    in_flight=st.sets(st.builds(key, st.integers(0, 80))),
    slots=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)),
)
def test_plans_are_useful_bounded_and_deterministic(
    mine: dict[StreamKey, int],
    offers: dict[str, dict[StreamKey, Offer]],
    in_flight: set[StreamKey],
    slots: dict[str, int],
) -> None:
    plan = plan_pulls(mine, offers, in_flight, slots, skip_before=5.0)
    assert plan == plan_pulls(mine, offers, in_flight, dict(reversed(slots.items())), 5.0)
    asked = [want.key for _, wants in plan for want in wants]
    assert len(asked) == len(set(asked))
    assert not in_flight & set(asked)
    for peer, wants in plan:
        assert 0 < len(wants) <= MAX_WANTS
        for want in wants:
            offer = offers[peer][want.key]
            assert offer.first <= want.from_seq < max(offer.next, want.from_seq + 1)
            assert want.from_seq >= mine[want.key]
            assert want.skip == (want.from_seq > mine[want.key])
    for peer, slot in slots.items():
        assert sum(1 for other, _ in plan if other == peer) <= slot


def test_messages_survive_the_wire_and_nonsense_does_not() -> None:
    message = sync.Records(3, (sync.Chunk(sync.Span(key(), 0, 9), 2, lines(2, 4)),))
    assert sync.decode(sync.encode(message)) == message
    pull = sync.Pull(1, (Want(key(), 4),))
    assert sync.decode(sync.encode(pull)) == pull
    bad_key = StreamKey("../x", "run", 0, 0, "logs")
    for body in (b"", b"\x93\x01", sync.encode(sync.Pull(1, (Want(bad_key, 0),)))):
        with pytest.raises(sync.Undecodable):
            sync.decode(body)


# --- between nodes ---------------------------------------------------------------------------------------------


def test_what_one_node_writes_is_pushed_to_all(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.run(0.5)
    originate(cluster, "a", key(0), 5)
    originate(cluster, "b", key(1), 7)
    cluster.step()
    cluster.step(seconds=0.0)
    assert alike(cluster)
    assert {k: len(r) for k, (_, r) in content(cluster.stores["c"]).items()} == {
        key(0): 5,
        key(1): 7,
    }
    # what was received is not pushed on
    assert cluster.replicators["c"].counts.pushed == 0


def test_a_node_that_was_down_catches_up_in_bounded_steps(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.crash("c")
    for rank in range(3):
        for _ in range(10):
            start = cluster.stores["a"].next_seq(key(rank))
            cluster.stores["a"].append(key(rank), start, [b"x" * 9000] * 10)
            cluster.step()
    for generation in range(2, 40):
        originate(cluster, "b", key(0, generation), 3)
    cluster.run(1)
    cluster.start("c")
    largest = 0
    while not alike(cluster):
        assert cluster.now < 60, "c did not catch up within 60 virtual seconds"
        cluster.now += 0.1
        cluster.stores["c"].flush()
        for replicator in cluster.replicators.values():
            replicator.tick()
        while cluster.wire.letters:
            largest = max(largest, len(cluster.wire.letters[0][2]))
            cluster.wire.deliver()
    assert largest < 2 * sync.MAX_BODY_BYTES


def test_the_prefix_of_a_dead_source_reaches_everybody(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.wire.set_link("a", "c", up=False)
    originate(cluster, "a", key(), 20)
    cluster.run(1)
    assert cluster.stores["c"].next_seq(key()) in (0, 20)
    cluster.crash("a")
    cluster.run_until(
        lambda: cluster.stores["c"].heads(JOB).get(key()) == 20, "c has it from b, a being dead"
    )


def test_a_source_that_lost_its_disk_gets_its_own_stream_back(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    originate(cluster, "a", key(), 20)
    cluster.run(1)
    cluster.crash("a")
    cluster.directory /= "fresh"
    cluster.start("a")
    cluster.run_until(lambda: alike(cluster), "a has its history again")
    assert cluster.stores["a"].next_seq(key()) == 20


def test_more_than_a_push_can_hold_is_pulled(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    store = cluster.stores["a"]
    record = b"x" * 60_000
    for rank in range(3):
        store.append(key(rank), 0, [record] * (MAX_OUTGOING_BYTES // len(record) // 2))
    cluster.run_until(lambda: alike(cluster) and len(store.heads(JOB)) == 3, "all pulled")
    assert cluster.replicators["a"].counts.push_dropped > 0


def test_unknown_jobs_are_refused_until_they_are_known(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    cluster.known.discard(JOB)
    originate(cluster, "a", key(), 5)
    cluster.run(5)
    assert cluster.stores["b"].jobs() == []
    cluster.known.add(JOB)
    cluster.run_until(lambda: alike(cluster), "b has the job that it knows now")


def test_removed_jobs_stay_removed(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    originate(cluster, "a", key(), 5)
    cluster.run(1)
    cluster.crash("c")
    cluster.known.discard(JOB)
    cluster.replicators["b"].forget(JOB)
    cluster.run(5)
    assert cluster.stores["b"].jobs() == []
    cluster.start("c")
    cluster.run(5)
    assert cluster.stores["c"].jobs() == [JOB]
    assert cluster.replicators["c"].sweep() == [JOB]
    cluster.replicators["a"].forget(JOB)
    cluster.run(5)
    assert [store.jobs() for store in cluster.stores.values()] == [[], [], []]


def test_records_that_nobody_has_are_given_up(tmp_path: Path) -> None:
    limits = HistoryLimits(segment_bytes=500, log_stream_bytes=2000)
    cluster = Cluster(tmp_path, "ab", limits=limits)
    originate(cluster, "a", key(), 10)
    cluster.run(1)
    cluster.crash("b")
    for _ in range(50):
        originate(cluster, "a", key(), 10)
        cluster.step()
    first = cluster.stores["a"].first_seq(key())
    assert first > 10
    cluster.start("b")
    cluster.run_until(
        lambda: cluster.stores["b"].heads(JOB)[key()] == 510, "b goes on with what a still has"
    )
    assert cluster.stores["b"].first_seq(key()) >= first
    assert cluster.replicators["b"].counts.skipped == 1


def test_an_evicted_job_does_not_come_back(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    cluster.known.add("big")
    cluster.crash("b")
    originate(cluster, "a", key(), 10)
    cluster.run(1)
    originate(cluster, "a", key(job_id="big"), 200)
    cluster.run(1)
    cluster.limits = HistoryLimits(total_bytes=3000)
    cluster.start("b")
    cluster.run(10)
    assert cluster.stores["b"].evicted(JOB)
    assert cluster.stores["b"].jobs() == ["big"]
    quiet = cluster.replicators["a"].counts.served
    cluster.run(10)
    assert cluster.replicators["a"].counts.served == quiet


def test_equal_stores_only_exchange_digests(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    originate(cluster, "a", key(), 5)
    cluster.run(5)
    sent: list[sync.Message] = []
    for _ in range(50):
        cluster.now += 0.1
        for replicator in cluster.replicators.values():
            replicator.tick()
        while cluster.wire.letters:
            sent.append(sync.decode(cluster.wire.letters[0][2]))
            cluster.wire.deliver()
    assert sent
    assert all(isinstance(message, sync.Digests) for message in sent)


def test_many_jobs_are_compared_in_turn(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    jobs = [f"job-{number}" for number in range(200)]
    cluster.known.update(jobs)
    cluster.crash("b")
    for job_id in jobs:
        originate(cluster, "a", key(job_id=job_id), 1)
    cluster.step()
    cluster.start("b")
    cluster.run_until(lambda: set(jobs) <= set(cluster.stores["b"].jobs()), "b has all jobs")


actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("abc"), st.integers(1, 2), st.integers(1, 30)),
        st.tuples(st.just("crash"), st.sampled_from("abc")),
        st.tuples(st.just("start"), st.sampled_from("abc")),
        st.tuples(st.just("link"), st.sampled_from(["ab", "ac", "bc"]), st.booleans()),
        st.tuples(st.just("step"), st.integers(1, 30), st.integers(0, 8)),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=actions, seed=st.integers(0, 10), loss=st.sampled_from([0.0, 0.3]))
def test_any_schedule_converges_to_the_union_of_prefixes(
    tmp_path_factory: pytest.TempPathFactory,
    plan: list[tuple],  # type: ignore[type-arg]
    seed: int,
    loss: float,
) -> None:
    cluster = Cluster(
        tmp_path_factory.mktemp("any"), seed=seed, limits=HistoryLimits(segment_bytes=300)
    )
    cluster.wire.loss, cluster.wire.doubling, cluster.wire.reorder = loss, 0.3, True
    longest: dict[StreamKey, int] = {}
    for action, *arguments in plan:
        match action, arguments:
            case "write", [name, generation, count] if name in cluster.stores:
                originate(cluster, name, key("abc".index(name), generation), count)
            case "crash", [name] if name in cluster.stores:
                cluster.crash(name)
            case "start", [name] if name not in cluster.stores:
                cluster.start(name)
            case "link", [pair, up]:
                cluster.wire.set_link(pair[0], pair[1], up)
            case "step", [tenths, deliveries]:
                cluster.step(tenths / 10, deliveries)
        for store in cluster.stores.values():
            for stream, head in store.heads(JOB).items():
                if head:
                    longest[stream] = max(head, longest.get(stream, 0))
    for name in "abc":
        if name not in cluster.stores:
            cluster.start(name)
    cluster.wire.cut.clear()
    cluster.wire.loss = 0.0
    cluster.run_until(lambda: alike(cluster), "all stores are alike")
    for store in cluster.stores.values():
        for stream, head in longest.items():
            assert store.heads(JOB)[stream] >= head, (
                "what was once readable anywhere is nowhere lost"
            )
        for stream, (first, records) in content(store).items():
            assert first == 0
            assert records == lines(0, len(records)), stream


async def test_in_the_background(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "a")
    store: HistoryStore = cluster.stores["a"]
    await store.start()
    replicator = cluster.replicators["a"]
    replicator.start()
    originate(cluster, "a", key(), 3)
    await store.settled()
    await replicator.close()
    await store.close()
    assert store.heads(JOB) == {key(): 3}
