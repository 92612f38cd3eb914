"""One S3 server for all tests of this directory; each test has a prefix of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from distroml.runtime.checkpoint.stores import retrying, s3
from distroml.runtime.checkpoint.stores.s3 import S3Store
from distroml.store_urls import StoreSettings, parse_store
from tests.runtime.checkpoint.object_server import (
    BUCKET,
    CREDENTIALS,
    SMALL_PART_BYTES,
    WITH_PART_BYTES,
    FaultProxy,
    object_server,
)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with object_server() as url:
        yield url


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retrying, "MAX_PAUSE_S", 0.05)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    for module in WITH_PART_BYTES:
        monkeypatch.setattr(module, "PART_BYTES", SMALL_PART_BYTES)
    monkeypatch.setattr(s3, "RANGE_BYTES", SMALL_PART_BYTES)
    return SMALL_PART_BYTES


@pytest.fixture(scope="session")
def one_proxy(s3_server: str) -> Iterator[FaultProxy]:
    made = FaultProxy(s3_server)
    yield made
    made.close()


@pytest.fixture
def proxy(one_proxy: FaultProxy, aws: None) -> FaultProxy:
    """The same for all tests, since each other address costs a client of its own."""
    one_proxy.forget()
    return one_proxy


def s3_store(endpoint: str, prefix: str = "", bucket: str = BUCKET) -> S3Store:
    prefix = prefix or secrets.token_hex(8)
    url = parse_store(f"s3://{bucket}/{prefix}?endpoint={endpoint}", "store")
    return S3Store(url, StoreSettings())
