"""The S3 store where network and server fail: right answers or clear errors, no litter, nothing secret told."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distroml.errors import CorruptCheckpoint, StoreError
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.stores import retrying, s3_client
from distroml.runtime.checkpoint.stores.interface import MissingFile
from distroml.runtime.checkpoint.stores.loop_thread import MAX_IN_FLIGHT, loop_thread
from distroml.runtime.checkpoint.stores.s3 import S3Store
from distroml.store_urls import StoreSettings, parse_store
from tests.runtime.checkpoint.conftest import s3_store
from tests.runtime.checkpoint.object_server import (
    BUCKET,
    SECRET_KEY,
    SESSION_TOKEN,
    Asked,
    Fault,
    FaultProxy,
)
from tests.runtime.checkpoint.shards import CURSOR, committed, tensor, verify, writer

ALWAYS = 10**6
MIB = 1024 * 1024
MOTO_DATE = re.compile(rb"(?<=<Initiated>)[^<]*")


def writes(asked: Asked) -> bool:
    return asked.method == "PUT" and asked.named("/x")


def reads(asked: Asked) -> bool:
    return asked.method == "GET" and asked.named("/x")


def _flipped(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


@pytest.fixture
def store(proxy: FaultProxy) -> S3Store:
    made = s3_store(proxy.url)
    made.health()
    return made


@pytest.fixture
def clean(proxy: FaultProxy, store: S3Store) -> Callable[[], None]:
    """Fails where something unfinished is left in the store."""

    def check() -> None:
        proxy.faults.clear()
        store.remove_orphans("d", time.time() + 10, 0.0)
        uploads = loop_thread().run(store._do("list_multipart_uploads"))
        assert uploads.get("Uploads", []) == []

    return check


@pytest.mark.parametrize(
    "fault",
    [
        Fault(writes, 5, answer=(503, "SlowDown")),
        Fault(writes, 3, answer=(500, "InternalError")),
        Fault(writes, 2, answer=(429, "TooManyRequests")),
        Fault(writes, 2, answer=(409, "ConditionalRequestConflict")),
        Fault(writes, 2, answer=(400, "BadDigest")),
        Fault(writes, 2, answer=(400, "RequestTimeout")),
        Fault(writes, 2, reset="request"),
    ],
    ids=lambda fault: fault.answer[1] if fault.answer else fault.reset,
)
def test_a_write_is_tried_again(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    proxy.faults.append(fault)
    assert store.put_if_absent("x", [b"content" * 1000]).created
    assert fault.times == 0
    assert store.read("x") == b"content" * 1000


def test_a_write_whose_answer_was_lost_is_there_once(store: S3Store, proxy: FaultProxy) -> None:
    """The second attempt finds the name taken, by the first one."""
    proxy.faults.append(Fault(writes, 1, reset="answer"))
    stored = store.put_if_absent("x", [b"content"])
    assert stored == store.put_if_absent("x", [b"other"])
    assert store.read("x") == b"content"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(reads, 4, answer=(503, "SlowDown")),
        Fault(reads, 2, reset="answer"),
        Fault(reads, 2, cut=10),
        Fault(reads, 1, change=_flipped),
        Fault(reads, 2, change=lambda body: body[:-100]),
    ],
    ids=["503", "reset", "cut", "flipped", "short"],
)
def test_a_read_is_tried_again(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    content = os.urandom(100_000)
    store.put_if_absent("x", [content])
    proxy.faults.append(fault)
    assert store.read("x") == content
    assert fault.times == 0


def test_what_is_stored_otherwise_is_handed_on_to_who_knows_the_hash(
    store: S3Store, proxy: FaultProxy
) -> None:
    store.put_if_absent("x", [b"content"])
    proxy.faults.append(Fault(reads, ALWAYS, change=_flipped))
    assert store.read("x") == _flipped(b"content")


def test_a_reader_asks_twice_before_it_calls_a_checkpoint_damaged(
    store: S3Store, proxy: FaultProxy
) -> None:
    checkpoint = committed(store, state=[tensor("model.large", [0.5] * 1_000_000)], world_size=1)
    manifest = read_manifest(store, checkpoint)

    def bytes_of_tensors(asked: Asked) -> bool:
        return (
            asked.method == "GET"
            and asked.named("worker_0")
            and not asked.headers.get("range", "").startswith("bytes=0-")
        )

    proxy.faults.append(Fault(bytes_of_tensors, 1, change=_flipped))
    verify(store, checkpoint)
    proxy.faults.append(Fault(bytes_of_tensors, ALWAYS, change=_flipped))
    with pytest.raises(CorruptCheckpoint, match=r"worker_0.*has BLAKE3"):
        list(read_tensors(store, checkpoint, manifest))


def test_retry_after_is_honoured(store: S3Store, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(writes, 1, answer=(503, "SlowDown"), headers={"Retry-After": "1"}))
    began = time.monotonic()
    store.put_if_absent("x", [b"content"])
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize(
    ("answer", "said", "attempts"),
    [
        ((503, "SlowDown"), r"it asks for fewer requests .*Tried 8 times", retrying.MAX_ATTEMPTS),
        ((403, "AccessDenied"), r"s3:PutObject.*AccessDenied, HTTP 403", 1),
        ((403, "InvalidAccessKeyId"), r"the access key is not known there", 1),
        ((403, "SignatureDoesNotMatch"), r"secret key does not belong to the access key", 1),
        ((400, "ExpiredToken"), r"credentials have expired: renew", 1),
        ((403, "RequestTimeTooSkewed"), r"clock of this node is wrong", 1),
        ((301, "PermanentRedirect"), r"another region.*region=", 2),
        ((404, "NoSuchBucket"), r"the bucket does not exist there: create it", 1),
        ((501, "NotImplemented"), r"If-None-Match and checksums are needed", 1),
        ((400, "WhoKnows"), r"it refused \(WhoKnows, HTTP 400\): told by", 1),
    ],
)
def test_errors_say_what_to_do_and_nothing_secret(
    store: S3Store,
    proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
    answer: tuple[int, str],
    said: str,
    attempts: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.faults.append(Fault(writes, ALWAYS, answer=answer))
    before = len(proxy.seen)
    with pytest.raises(StoreError, match=said) as caught:
        store.put_if_absent("x", [b"content"])
    assert len([one for one in proxy.seen[before:] if writes(one)]) == attempts
    told = f"{caught.value}{caught.value.__context__!r}{caplog.text}"
    assert proxy.url in str(caught.value)
    assert BUCKET in str(caught.value)
    for secret in (SECRET_KEY, SESSION_TOKEN):
        assert secret not in told
    proxy.faults.clear()
    assert store.put_if_absent("x", [b"content"]).created


def test_a_missing_bucket_is_no_missing_file(proxy: FaultProxy) -> None:
    """Else a checkpoint would count as damaged because of a wrong URL."""
    other = s3_store(proxy.url, bucket="not-there")
    for action in (
        lambda: other.size("x"),
        lambda: other.read("x"),
        lambda: other.list(""),
        lambda: other.put_if_absent("x", [b""]),
    ):
        with pytest.raises(StoreError, match="bucket does not exist there") as caught:
            action()
        assert not isinstance(caught.value, MissingFile)


def test_without_credentials_the_error_says_where_they_go(
    s3_server: str, aws: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    url = parse_store(f"s3://{BUCKET}?endpoint={s3_server}/", "store")
    with pytest.raises(StoreError, match=r"--s3-credentials-file.*AWS_ACCESS_KEY_ID"):
        S3Store(url, StoreSettings()).size("x")
    with pytest.raises(StoreError, match=r"profile of --s3-profile"):
        S3Store(url, StoreSettings(s3_profile="nobody")).size("x")
    # the next request looks anew
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = A\naws_secret_access_key = {SECRET_KEY}\n")
    open_to_all = StoreSettings(s3_credentials_file=str(file))
    file.chmod(0o644)
    with pytest.raises(StoreError, match=r"mode 0644.*chmod 600"):
        S3Store(url, open_to_all).size("x")
    file.chmod(0o600)
    with pytest.raises(MissingFile):
        S3Store(url, open_to_all).size("x")


def test_a_server_that_ignores_if_none_match_is_refused(proxy: FaultProxy) -> None:
    """Such as an old MinIO: it would let two writers overwrite each other."""

    def condition(asked: Asked) -> bool:
        asked.headers.pop("if-none-match", None)
        return False

    proxy.faults.append(Fault(condition))
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        s3_store(proxy.url).put_if_absent("x", [b"content"])


# --- large files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(lambda a: a.is_part, 6, answer=(503, "SlowDown")),
        Fault(lambda a: a.is_part, 3, reset="request"),
        Fault(lambda a: a.is_part, 3, reset="answer"),
        Fault(
            lambda a: a.method == "POST" and a.named("uploads"), 2, answer=(500, "InternalError")
        ),
        Fault(lambda a: a.method == "POST" and a.named("uploadId"), 2, answer=(503, "SlowDown")),
        Fault(lambda a: a.is_part, 2, answer=(400, "BadDigest")),
    ],
    ids=["503", "reset mid-part", "answer lost", "create", "complete", "altered"],
)
def test_an_upload_in_parts_survives(
    store: S3Store,
    proxy: FaultProxy,
    small_parts: int,
    clean: Callable[[], None],
    fault: Fault,
) -> None:
    content = os.urandom(2 * small_parts + 1000)
    proxy.faults.append(fault)
    assert stage(store, "d/x", content)
    assert fault.times == 0
    assert store.read("d/x") == content
    clean()


def stage(store: S3Store, path: str, content: bytes) -> bool:
    with store.stage(path, len(content)) as staged:
        for begin in range(0, len(content), MIB):
            staged.write(begin, content[begin : begin + MIB])
        staged.sync()
        return staged.publish()


def test_an_upload_whose_last_answer_was_lost_is_looked_at(
    store: S3Store, proxy: FaultProxy, small_parts: int, clean: Callable[[], None]
) -> None:
    content = os.urandom(small_parts + 1000)
    complete = Fault(lambda a: a.method == "POST" and a.named("uploadId"), 1, reset="answer")
    proxy.faults.append(complete)
    stage(store, "d/x", content)  # a server may tell that it is done, or that the name is taken
    assert complete.times == 0
    assert store.read("d/x") == content
    clean()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(lambda a: a.is_part, ALWAYS, answer=(403, "AccessDenied")),
        Fault(lambda a: a.is_part and a.named("partNumber=2"), ALWAYS, answer=(503, "SlowDown")),
        Fault(lambda a: a.method == "POST" and a.named("uploadId"), ALWAYS, answer=(403, "AccessDenied")),
        Fault(lambda a: a.is_part, ALWAYS, answer=(404, "NoSuchUpload")),
    ],
    ids=["denied", "down", "complete", "aborted by another"],
)  # fmt: skip
def test_an_upload_that_fails_leaves_nothing(
    store: S3Store,
    proxy: FaultProxy,
    small_parts: int,
    clean: Callable[[], None],
    fault: Fault,
) -> None:
    proxy.faults.append(fault)
    with pytest.raises(StoreError, match="cannot write 'd/x'"):
        stage(store, "d/x", os.urandom(2 * small_parts + 1000))
    proxy.faults.clear()
    assert store.list("") == []
    uploads = loop_thread().run(store._do("list_multipart_uploads"))
    assert uploads.get("Uploads", []) == []
    clean()


def test_what_could_not_be_aborted_is_an_orphan_once_it_is_old(
    store: S3Store, proxy: FaultProxy, small_parts: int
) -> None:
    proxy.faults += [
        Fault(lambda a: a.is_part, ALWAYS, answer=(403, "AccessDenied")),
        Fault(lambda a: a.method == "DELETE", ALWAYS, answer=(403, "AccessDenied")),
    ]
    with pytest.raises(StoreError):
        stage(store, "d/x", os.urandom(2 * small_parts))
    proxy.faults.clear()
    now = time.time()
    began = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now)).encode()
    # moto tells one date of all uploads
    listing = Fault(lambda a: a.named("?uploads"), ALWAYS, change=lambda b: MOTO_DATE.sub(began, b))
    proxy.faults.append(listing)
    assert store.remove_orphans("d", now, 60.0) == 0
    assert store.remove_orphans("other", now + 100, 60.0) == 0
    assert store.remove_orphans("d", now + 100, 60.0) == 1
    assert store.remove_orphans("d", now + 100, 60.0) == 0


def test_memory_in_flight_is_bounded(
    store: S3Store, proxy: FaultProxy, small_parts: int, clean: Callable[[], None]
) -> None:
    """Two uploads at once before a server that takes nothing: they hold as many parts as there are slots, and wait."""
    gate = threading.Event()
    proxy.faults.append(Fault(lambda a: a.is_part and not gate.wait(30), ALWAYS))
    content = bytes(6 * small_parts)
    done: list[bool] = []
    uploads = [
        threading.Thread(target=lambda name=name: done.append(stage(store, name, content)))
        for name in ("d/x", "d/y")
    ]
    for one in uploads:
        one.start()
    deadline = time.monotonic() + 30
    while proxy.in_flight_bytes < MAX_IN_FLIGHT * small_parts and time.monotonic() < deadline:
        gate.wait(0.01)
    assert proxy.in_flight_bytes >= MAX_IN_FLIGHT * small_parts, "not all slots are used"
    held = loop_thread().upload_slots
    assert not held.acquire(blocking=False), "there is a slot left, and nobody takes it"
    gate.set()
    for one in uploads:
        one.join(60)
    assert done == [True, True]
    assert proxy.most_in_flight_bytes <= MAX_IN_FLIGHT * small_parts + MIB
    clean()


def test_a_server_that_is_silent_is_given_up_in_bounded_time(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "ATTEMPT_S", 0.2)
    monkeypatch.setattr(retrying, "LEAST_BYTES_PER_S", 1024 * MIB)
    monkeypatch.setattr(retrying, "MAX_RETRY_S", 1.0)
    proxy.faults.append(Fault(reads, ALWAYS, delay_s=0.6))
    store.put_if_absent("x", [b"content"])
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"it is too slow.*Tried"):
        store.read("x")
    assert time.monotonic() - began < 5


def test_a_shard_is_written_once_the_store_is_back(store: S3Store, proxy: FaultProxy) -> None:
    """The writer's own attempts outlast those of one request."""
    fault = Fault(lambda a: True, 2 * retrying.MAX_ATTEMPTS + 1, answer=(503, "SlowDown"))
    proxy.faults.append(fault)
    checkpoint = committed(store, world_size=1)
    assert fault.times == 0
    verify(store, checkpoint)


def test_a_store_that_stays_away_costs_that_checkpoint_only(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.faults.append(Fault(lambda a: True, ALWAYS, answer=(503, "SlowDown")))
    made, durable, abandoned = writer(store)
    made.write(100, *_shard())
    made.wait()
    assert not durable
    assert "it failed (HTTP 503). Tried 8 times. Given up after 5 attempts." in abandoned[0][1]
    proxy.faults.clear()
    made.write(200, *_shard())
    made.wait()
    assert [fact.step for fact in durable] == [200]


def _shard() -> tuple[Any, ...]:
    return CURSOR, [tensor("model.a", [1.0])], {}


def test_a_fork_begins_with_a_loop_of_its_own(store: S3Store) -> None:
    store.put_if_absent("x", [b"content"])
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(write, store.read("x"))
        finally:
            os._exit(0)
    os.close(write)
    try:
        assert os.read(read, 100) == b"content"
    finally:
        os.close(read)
        os.waitpid(pid, 0)
    assert store.read("x") == b"content"


def test_requests_of_one_place_share_their_connections(store: S3Store, proxy: FaultProxy) -> None:
    other = s3_store(proxy.url)
    assert other.place == store.place
    other.health()
    assert list(loop_thread()._clients).count(store.place) == 1
    assert s3_client.DEFAULT_REGION == "us-east-1"
