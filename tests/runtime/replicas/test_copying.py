"""Copies between nodes whose links break, whose disks fill and whose bytes rot."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distroml.errors import CheckpointAway, CorruptCheckpoint, StoreError
from distroml.model import NodeStatus
from distroml.runtime.checkpoint import manifest
from distroml.runtime.checkpoint.commit import write_manifest
from distroml.runtime.checkpoint.examination import survey
from distroml.runtime.checkpoint.stores.file import TEMPORARY_PREFIX
from distroml.runtime.checkpoint.stores.interface import MissingFile
from distroml.runtime.replicas import bringing, exchange, fetching, keeping, wire
from distroml.runtime.replicas.copies import LEFT_S
from distroml.runtime.replicas.fetching import NoGoodCopy
from distroml.runtime.replicas.wire import Failed, File, Holds, Keep, Message, Part, Read
from tests.runtime.checkpoint.shards import JOB, RUN, TensorBytes, tensor, verify, write_shards
from tests.runtime.replicas.world import World, flip, saved_at, until, within

BIG: list[TensorBytes] = [tensor("model.weight", [float(n) for n in range(40_000)])]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(fetching, "RETRY_S", 0.05)
    monkeypatch.setattr(keeping, "PATIENCE_S", 0.6)
    monkeypatch.setattr(keeping, "RETRY_S", 0.05)
    monkeypatch.setattr(keeping, "LOOK_S", 0.01)
    monkeypatch.setattr(bringing, "PATIENCE_S", 0.3)
    monkeypatch.setattr(bringing, "COMPLETE_PATIENCE_S", 0.1)
    monkeypatch.setattr(bringing, "RETRY_S", 0.05)
    monkeypatch.setattr(exchange, "ANSWER_S", 1.0)
    monkeypatch.setattr(exchange, "WORKING_S", 0.1)
    monkeypatch.setattr(exchange, "STALLED_S", 0.5)
    monkeypatch.setattr(fetching, "ENOUGH_S", 0.2)


def litter(root: Path) -> list[Path]:
    return list(root.rglob(f"{TEMPORARY_PREFIX}*"))


async def kept(world: World, file: File, by: str = "a") -> list[str]:
    async with within():
        return await world.nodes[by]._keeper.keep(file, JOB)


# --- before the commit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [None, 1, 2, 3, 9])
async def test_as_many_nodes_keep_a_file_as_the_job_wants(
    tmp_path: Path, replicas: int | None
) -> None:
    async with World(tmp_path, replicas=replicas) as world:
        _, files = saved_at(world, "a")
        for file in files:
            held = await kept(world, file)
            copies = min(3, replicas or 2)
            assert world.holders(file) == "".join(sorted(["a", *held]))
            assert len(world.holders(file)) == copies
            assert await kept(world, file) == held, "asked again, the same nodes say yes at once"
        assert not litter(tmp_path)


async def test_a_node_alone_keeps_its_files_to_itself(tmp_path: Path) -> None:
    async with World(tmp_path, "a") as world:
        _, (_, shard, *_) = saved_at(world, "a")
        assert not world.nodes["a"].for_workers.must_secure(JOB)
        assert await kept(world, shard) == []


async def test_a_node_that_dies_while_it_takes_a_copy_is_replaced_by_another(
    tmp_path: Path,
) -> None:
    async with World(tmp_path) as world:
        _, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        asked: list[str] = []

        def die_in_the_middle(sender: str, target: str, message: Message) -> Message | None:
            if isinstance(message, Read) and message.offset > 50_000 and not asked:
                asked.append(sender)
                asyncio.get_running_loop().call_soon(world.network.cut, sender)
            return message

        world.network.tamper = die_in_the_middle
        held = await kept(world, shard)
        assert len(held) == 1
        assert held != asked
        assert world.holders(shard) == f"a{held[0]}"


async def test_a_receiver_that_starts_again_in_the_middle_takes_it_the_second_time(
    tmp_path: Path,
) -> None:
    async with World(tmp_path, "ab") as world:
        _, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        restarts: list[asyncio.Task[None]] = []

        async def restart() -> None:
            await world.stop("b")
            world.start("b")

        def tamper(sender: str, target: str, message: Message) -> Message | None:
            if isinstance(message, Read) and message.offset > 50_000 and not restarts:
                restarts.append(asyncio.create_task(restart()))
            return message

        world.network.tamper = tamper
        assert await kept(world, shard) == ["b"]
        assert restarts
        assert world.holders(shard) == "ab"


async def test_wrong_bytes_on_the_way_are_not_taken(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        _, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        spoilt = 0

        def spoil_once(sender: str, target: str, message: Message) -> Message | None:
            nonlocal spoilt
            if isinstance(message, Part) and len(message.data) > 100 and not spoilt:
                spoilt += 1
                data = bytearray(message.data)
                data[50] ^= 1
                return Part(message.number, bytes(data), message.size_bytes)
            return message

        world.network.tamper = spoil_once
        assert await kept(world, shard) == ["b"]
        assert spoilt == 1
        assert world.nodes["b"].counts["broken"] == 1
        assert world.holders(shard) == "ab", "the copy that was doubted is good, and stays"
        assert not litter(tmp_path)


async def test_lost_messages_cost_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ANSWER_S", 0.2)
    async with World(tmp_path, "ab") as world:
        _, files = saved_at(world, "a", state=BIG, world_size=1)
        count = 0

        def lose_some(sender: str, target: str, message: Message) -> Message | None:
            nonlocal count
            count += 1
            return None if count % 23 == 0 else message

        world.network.tamper = lose_some
        for file in files:
            assert await kept(world, file) == ["b"]
            assert world.holders(file) == "ab"
        assert not litter(tmp_path)


async def test_a_full_disk_passes_the_copy_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path) as world:
        _, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        first = (await kept(world, shard))[0]
        other = "b" if first == "c" else "c"
        await asyncio.to_thread((tmp_path / first / shard.path).unlink)
        full = str(tmp_path / first)
        write = os.pwrite

        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(full):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        assert await kept(world, shard) == [other]
        assert world.holders(shard) == f"a{other}"
        assert not litter(tmp_path)


async def test_where_nodes_are_missing_what_there_is_must_do(tmp_path: Path) -> None:
    async with World(tmp_path, replicas=3) as world:
        _, (_, shard, *_) = saved_at(world, "a")
        await world.stop("b")
        world.nodes["c"].own.run = _never  # type: ignore[method-assign]
        assert await kept(world, shard) == []
        assert world.nodes["a"].counts["copies_lacking"] == 2
        world.set_status("b", NodeStatus.LOST)
        world.set_status("c", NodeStatus.LOST)
        assert await kept(world, shard) == []
        assert world.nodes["a"].counts["copies_lacking"] == 2, "of lost nodes nothing is wanted"


async def _never(work: Callable[[], object]) -> object:
    raise StoreError("the disk is gone")


def hang(world: World, name: str) -> None:
    """A node's disk answers no more; its loop goes on."""

    async def wait(work: Callable[[], object]) -> object:
        return await asyncio.Event().wait()

    world.nodes[name].own.run = wait  # type: ignore[method-assign,assignment]


async def test_a_node_whose_disk_hangs_is_passed_over(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        _, files = saved_at(world, "a")
        hang(world, "c")
        for file in files:
            assert await kept(world, file) == ["b"]
        assert world.nodes["a"].counts["copies_lacking"] == 0


async def test_a_copy_that_comes_slowly_but_comes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "STALLED_S", 2.0)
    async with World(tmp_path, "ab") as world:
        _, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        loop = asyncio.get_running_loop()
        begun_s, arrive = loop.time(), world.network.links["a"]._arrive

        def slowly(sender: str, target: str, message: Message) -> Message | None:
            if not isinstance(message, Part):
                return message
            loop.call_later(0.3, arrive, target, wire.encode(message))
            return None

        world.network.tamper = slowly
        assert await kept(world, shard) == ["b"]
        assert loop.time() - begun_s > exchange.STALLED_S
        assert world.nodes["a"].counts["copies_refused"] == 0


async def test_a_node_that_leaves_has_others_keep_even_what_is_to_be_kept_once(
    tmp_path: Path,
) -> None:
    async with World(tmp_path, replicas=1) as world:
        _, (_, shard, *_) = saved_at(world, "a")
        assert await kept(world, shard) == []
        world.set_status("a", NodeStatus.DRAINING)
        (other,) = await kept(world, shard)
        assert other in "bc"
        assert world.holders(shard) == f"a{other}"


async def test_nodes_that_leave_are_given_no_copies(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        _, files = saved_at(world, "a")
        world.set_status("b", NodeStatus.DRAINING)
        for file in files:
            assert await kept(world, file) == ["c"]


async def test_learners_have_their_copies_with_voters(tmp_path: Path) -> None:
    async with World(tmp_path, "abc", "lm") as world:
        _, files = saved_at(world, "l")
        for file in files:
            (voter,) = await kept(world, file, by="l")
            assert voter in "abc"


async def test_what_a_learner_wrote_is_always_on_a_voter_that_other_learners_can_ask(
    tmp_path: Path,
) -> None:
    async with World(tmp_path, "abc", "lm", replicas=1) as world, within():
        checkpoint, files = saved_at(world, "l")
        assert world.nodes["l"].for_workers.must_secure(JOB)
        with pytest.raises(CheckpointAway, match=r"may have it: l\b"):
            await world.nodes["m"].bringer.bring(checkpoint, mend=False)
        for file in files:
            (voter,) = await kept(world, file, by="l")
            assert voter in "abc"
        await world.nodes["m"].bringer.bring(checkpoint, mend=False)


async def test_a_name_that_others_bytes_have_is_not_taken_from_them(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        _, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        write_shards(world.store("b"), world_size=1, state=[tensor("model.weight", [1, 2])])
        before = world.store("b").read(shard.path)
        assert await kept(world, shard) == []
        assert world.store("b").read(shard.path) == before


# --- the commit --------------------------------------------------------------------------------------------------


async def test_a_leader_commits_shards_that_are_all_elsewhere(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        facts = write_shards(world.store("b"))
        store = world.nodes["a"].store
        async with within():
            record = await asyncio.to_thread(
                lambda: write_manifest(
                    store, job_id=JOB, run_id=RUN, generation=4, shards=facts, committed_at=1.0,
                    scattered=True,
                )
            )  # fmt: skip
        assert record.manifest == "manifest.g4.json", "only the first generation has the plain name"
        places = [
            name
            for name in "abc"
            if (tmp_path / name / record.directory / record.manifest).exists()
        ]
        assert "a" in places
        assert len(places) == 2
        await asyncio.to_thread(verify, store, record)


# --- a restore ---------------------------------------------------------------------------------------------------


async def test_any_node_brings_a_checkpoint_from_wherever_its_files_are(tmp_path: Path) -> None:
    async with World(tmp_path, "abc", "l") as world:
        checkpoint, (manifest, one, other) = saved_at(world, "a", state=BIG * 1, world_size=2)
        async with within():
            await world.nodes["b"]._fetcher.fetch(one)
            await world.nodes["c"]._fetcher.fetch(manifest)
            await asyncio.to_thread((tmp_path / "a" / one.path).unlink)
            await asyncio.to_thread((tmp_path / "a" / manifest.path).unlink)
            await world.nodes["l"].bringer.bring(checkpoint, mend=False)
        await asyncio.to_thread(verify, world.store("l"), checkpoint)
        assert {path for name, path in world.landed if name == "l"} == {
            manifest.path, one.path, other.path,
        }  # fmt: skip


async def test_a_broken_copy_is_passed_over_named_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with World(tmp_path, "abc") as world:
        checkpoint, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        async with within():
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)
            await asyncio.to_thread(flip, tmp_path / "b" / shard.path, -9)
            for _ in range(20):  # whoever is asked first
                await world.nodes["c"].bringer.bring(checkpoint, mend=False)
                assert world.holders(shard) == "ac"
                if "broken" in caplog.text:
                    break
                await asyncio.to_thread((tmp_path / "c" / shard.path).unlink)
            assert "node b has a broken copy of" in caplog.text
            assert "BLAKE3" in caplog.text
            await until(lambda: not (tmp_path / "b" / shard.path).exists())


@pytest.mark.parametrize("what", ["shard", "header", "manifest", "missing"])
async def test_a_broken_copy_here_is_replaced_by_anothers(tmp_path: Path, what: str) -> None:
    async with World(tmp_path, "ab") as world:
        checkpoint, (manifest, shard) = saved_at(world, "a", state=BIG, world_size=1)
        async with within():
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)
            broken = tmp_path / "b" / (manifest if what == "manifest" else shard).path
            if what == "missing":
                await asyncio.to_thread(broken.unlink)
            else:
                await asyncio.to_thread(flip, broken, -9 if what == "shard" else 60)
            await world.nodes["b"].bringer.bring(checkpoint, mend=True)
        await asyncio.to_thread(verify, world.store("b"), checkpoint)
        assert world.nodes["b"].counts["mended"] == (what != "missing")


async def test_it_is_corrupt_only_if_nobody_has_it_whole(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        checkpoint, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        async with within():
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)
            for name in "ab":
                await asyncio.to_thread(flip, tmp_path / name / shard.path, -9)
            with pytest.raises(CorruptCheckpoint, match=r"worker_0\.safetensors") as caught:
                await world.nodes["b"].bringer.bring(checkpoint, mend=True)
        assert "'b' is broken" in str(caught.value)
        assert caught.value.extra["checkpoint_step"] == checkpoint.step


async def test_one_of_another_version_is_not_corrupt_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path, "ab") as world, within():
        checkpoint, files = saved_at(world, "a")
        monkeypatch.setattr(manifest, "FORMAT", 4)
        for mend in (False, True):
            with pytest.raises(StoreError, match="is of another version") as caught:
                await world.nodes["b"].bringer.bring(checkpoint, mend=mend)
            assert not isinstance(caught.value, CorruptCheckpoint | CheckpointAway)
        assert all("a" in world.holders(file) for file in files)


async def test_a_restore_does_not_wait_for_a_node_whose_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "STALLED_S", 1000.0)
    async with World(tmp_path) as world, within():
        checkpoint, _ = saved_at(world, "a")
        hang(world, "c")
        await world.nodes["b"].bringer.bring(checkpoint, mend=False)
        await asyncio.to_thread(verify, world.store("b"), checkpoint)


async def test_what_only_a_node_whose_disk_hangs_may_have_is_away(tmp_path: Path) -> None:
    async with World(tmp_path) as world, within():
        checkpoint, (_, shard, *_) = saved_at(world, "a")
        await asyncio.to_thread((tmp_path / "a" / shard.path).unlink)
        hang(world, "c")
        with pytest.raises(CheckpointAway, match=r"may have it: c\b"):
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)
        with pytest.raises(StoreError, match="'c' has not got on"):
            await asyncio.to_thread(world.nodes["b"].store.list, "")


async def test_a_holder_that_comes_back_in_time_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing, "PATIENCE_S", 10.0)
    async with World(tmp_path, "abc") as world:
        checkpoint, _ = saved_at(world, "a")
        await world.stop("a")
        bringing_it = asyncio.create_task(world.nodes["b"].bringer.bring(checkpoint, mend=False))
        async with within():
            await until(lambda: world.nodes["b"].counts["failed"] > 0)
            world.start("a")
            await bringing_it
        await asyncio.to_thread(verify, world.store("b"), checkpoint)


async def test_who_can_ask_everybody_does_not_wait_for_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing, "PATIENCE_S", 1000.0)
    async with World(tmp_path, "abc") as world:
        checkpoint, (_, shard, *_) = saved_at(world, "a")
        await asyncio.to_thread((tmp_path / "a" / shard.path).unlink)
        async with within():
            with pytest.raises(CorruptCheckpoint):
                await world.nodes["b"].bringer.bring(checkpoint, mend=False)
            await world.stop("c")
            waiting = asyncio.create_task(world.nodes["b"].bringer.bring(checkpoint, mend=False))
            failed = world.nodes["b"].counts["failed"]
            await until(lambda: world.nodes["b"].counts["failed"] >= failed + 8)
            assert not waiting.done(), "c may have it"
            world.start("c")
            with pytest.raises(CorruptCheckpoint):
                await waiting


@pytest.mark.parametrize(("voters", "learners"), [("abc", ""), ("ac", "b"), ("bc", "a")])
async def test_what_a_node_that_is_away_may_have_is_not_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voters: str, learners: str
) -> None:
    begun_s = time.time()
    now_s = begun_s
    monkeypatch.setattr(time, "time", lambda: now_s)
    async with World(tmp_path, voters, learners) as world, within():
        checkpoint, _ = saved_at(world, "a")
        await world.stop("a")
        long_ago = begun_s - 10 * LEFT_S
        for status in (NodeStatus.ALIVE, NodeStatus.LOST, NodeStatus.LEFT):
            # who left long ago, but not before this node began, may only be slower to begin again
            world.set_status("a", status, at=long_ago)
            now_s = begun_s + LEFT_S - 1
            with pytest.raises(CheckpointAway, match="may have it: a") as caught:
                await world.nodes["b"].bringer.bring(checkpoint, mend=False)
            assert caught.value.extra["checkpoint_step"] == checkpoint.step
        now_s = begun_s + LEFT_S
        with pytest.raises(CheckpointAway if "a" in voters else CorruptCheckpoint):
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)
        world.set_status("a", NodeStatus.LEFT, at=now_s - 1)
        with pytest.raises(CheckpointAway):
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)


async def test_a_voter_that_the_log_does_not_know_yet_may_have_it(tmp_path: Path) -> None:
    async with World(tmp_path) as world, within():
        checkpoint, _ = saved_at(world, "a")
        await world.stop("a")
        world.forget("a")
        with pytest.raises(CheckpointAway, match="may have it: a"):
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)


@pytest.mark.parametrize("how", ["it is busy", "its lane is full", "it breaks off"])
async def test_a_holder_that_did_not_answer_may_have_it_and_nothing_is_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(bringing, "COMPLETE_PATIENCE_S", 0.0)
    async with World(tmp_path) as world, within():
        checkpoint, (_, shard) = saved_at(world, "a", state=BIG, world_size=1)
        links = world.network.links["b"]
        send = links.send

        def busy(sender: str, target: str, message: Message) -> Message | None:
            return Failed(message.number, how) if isinstance(message, Holds) else message

        def break_off(sender: str, target: str, message: Message) -> Message | None:
            if isinstance(message, Read) and message.path == shard.path and message.offset:
                asyncio.get_running_loop().call_soon(world.network.cut, "a")
            return message

        if how == "its lane is full":
            monkeypatch.setattr(links, "send", lambda to, *what: to != "a" and send(to, *what))
        else:
            world.network.tamper = busy if how == "it is busy" else break_off
        with pytest.raises(CheckpointAway, match=r"may have it: a\b"):
            await world.nodes["b"].bringer.bring(checkpoint, mend=False)


async def test_who_comes_back_while_the_others_are_asked_is_asked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing, "PATIENCE_S", 10.0)
    async with World(tmp_path) as world, within():
        checkpoint, _ = saved_at(world, "a")
        await world.stop("a")
        fetch = fetching.Fetcher.fetch

        async def asked_before(*arguments: Any, **options: Any) -> None:
            monkeypatch.setattr(fetching.Fetcher, "fetch", fetch)
            await asyncio.sleep(bringing.COMPLETE_PATIENCE_S)
            world.start("a")
            raise NoGoodCopy("b and c have nothing", "", "bc")

        monkeypatch.setattr(fetching.Fetcher, "fetch", asked_before)
        await world.nodes["b"].bringer.bring(checkpoint, mend=False)
        await asyncio.to_thread(verify, world.store("b"), checkpoint)


async def test_what_is_wanted_twice_comes_once(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        checkpoint, files = saved_at(world, "a", state=BIG, world_size=1)
        async with within():
            bring = world.nodes["b"].bringer.bring
            await asyncio.gather(*(bring(checkpoint, mend=False) for _ in range(8)))
        sizes = sum((tmp_path / "a" / file.path).stat().st_size for file in files)
        assert world.nodes["b"].bytes_moved["received"] == sizes
        assert world.nodes["a"].bytes_moved["sent"] == sizes


# --- the store as the whole cluster has it -----------------------------------------------------------------------


async def test_the_clusters_store_lists_and_reads_what_any_node_has(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        checkpoint, files = saved_at(world, "a", state=BIG, world_size=2)
        async with within():
            await world.nodes["b"]._fetcher.fetch(files[1])
            await asyncio.to_thread((tmp_path / "a" / files[1].path).unlink)
            store = world.nodes["c"].store
            found = await asyncio.to_thread(
                survey, store, "local", thorough=True, stopped=lambda: False
            )
            assert [one.checkpoint.step for one in found.found] == [checkpoint.step]
            assert not found.unusable
            await asyncio.to_thread(verify, store, checkpoint)
            with pytest.raises(MissingFile):
                await asyncio.to_thread(store.read, files[1].path.replace("100", "101"))
        assert not (tmp_path / "c").exists(), "what is only looked at is not copied"


async def test_only_files_of_checkpoints_are_shown_to_peers(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        saved_at(world, "a")
        (tmp_path / "a" / "secret").write_text("x")
        ask = world.nodes["b"]._exchange
        async with within():
            for path in ("secret", "../a/secret", "job-1/../secret", "/etc/passwd"):
                with pytest.raises(exchange.NotAnswered):
                    await ask.read("a", path, 0, 10)
            assert (await ask.read("a", f"{JOB}/{RUN}/checkpoints/LATEST", 0, 10)).size_bytes == -1


async def test_a_source_without_the_file_is_told(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        _, (_, shard, *_) = saved_at(world, "a")
        gone = File(shard.path, "0" * 64, shard.size_bytes)
        async with within():
            with pytest.raises(NoGoodCopy):
                await world.nodes["b"]._fetcher.fetch(gone)
            with pytest.raises(exchange.NotAnswered, match="broken copy"):
                await world.nodes["c"]._exchange.keep("b", gone, ("a",))
        assert world.holders(shard) == "a"


async def test_a_message_that_asks_for_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        bad = Keep(1, File("job-1/run-1/notes.txt", "0" * 64, 5), ("a",))
        world.network.links["b"].handler("a", exchange.wire.encode(bad))  # type: ignore[misc]
        assert world.nodes["b"].counts["messages_malformed"] == 1
