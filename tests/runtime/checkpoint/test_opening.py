"""From the name of a store to the store."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.interface import MissingFile
from distroml.runtime.checkpoint.stores.opening import LOCAL, MAX_OPENED, Stores
from distroml.runtime.checkpoint.stores.s3_client import Place, place_of
from distroml.store_urls import StoreSettings, parse_store


def test_local_is_the_given_directory(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    stores.of(LOCAL).put_if_absent("a", [b"1"])
    assert (tmp_path / "a").read_bytes() == b"1"
    assert stores.of(LOCAL) is stores.of(LOCAL)


def test_a_file_url_is_a_directory_that_is_there(tmp_path: Path) -> None:
    shared = tmp_path / "with space"
    store = Stores(tmp_path / "local").of(f"file://{tmp_path}/with%20space")
    for use in (
        lambda: store.put_if_absent("a", [b"1"]),
        lambda: store.read("a"),
        lambda: store.size("a"),
        lambda: store.list(""),
        lambda: store.put_latest("a", b""),
        lambda: store.remove_orphans("a", 0.0),
        store.health,
    ):
        with pytest.raises(StoreError, match="with space is not there on this node; mount or make"):
            use()
    shared.mkdir()
    store.put_if_absent("a/b", [b"1"])
    assert (shared / "a" / "b").read_bytes() == b"1"


def test_a_store_is_opened_once_by_whichever_thread(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        opened = set(threads.map(lambda _: id(stores.of("s3://bucket/prefix")), range(200)))
    assert len(opened) == 1
    for number in range(2 * MAX_OPENED):
        stores.of(f"s3://bucket/{number}")
    assert len(stores._opened) == MAX_OPENED


@pytest.mark.parametrize("name", ["ftp://x/y", "s3", "", "s3://key:hidden-value@bucket"])
def test_what_is_no_store_is_refused_without_repeating_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError) as caught:
        Stores(tmp_path).of(name)
    assert "hidden-value" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("s3://bucket?endpoint=http://127.0.0.1:1/missing-package", "aiobotocore.config", "s3"),
        ("gs://bucket", "gcsfs", "gcs"),
        ("az://container?account=name1", "adlfs", "azure"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    store = Stores(tmp_path).of(name)
    for use in (lambda: store.size("x"), lambda: store.put_if_absent("x", [b"1"]), store.health):
        with pytest.raises(StoreError, match=rf"pip install 'distroml\[{extra}\]'") as caught:
            use()
        assert not isinstance(caught.value, MissingFile)


def test_what_a_url_says_goes_before_what_the_node_and_its_environment_say() -> None:
    environ = {"AWS_ENDPOINT_URL": "http://variable", "AWS_ENDPOINT_URL_S3": "http://of-s3"}
    node = StoreSettings(s3_endpoint="http://node", s3_region="node", s3_profile="p")
    bare = parse_store("s3://bucket", "store")
    full = parse_store("s3://bucket?endpoint=http://url&region=url&path_style=false", "store")
    assert place_of(full, node, environ) == Place(
        endpoint="http://url",
        region="url",
        path_style="false",
        profile="p",
        credentials_file="",
    )
    assert place_of(bare, node, environ).endpoint == "http://node"
    assert place_of(bare, StoreSettings(), environ).endpoint == "http://of-s3"
    assert place_of(bare, StoreSettings(), {}).told == "AWS"
    assert (
        "hidden"
        not in place_of(bare, StoreSettings(), {"AWS_ENDPOINT_URL": "http://u:hidden@h"}).told
    )


def test_libraries_are_loaded_by_those_who_use_them_only(tmp_path: Path) -> None:
    program = (
        "import sys; from distroml.runtime.checkpoint.stores.opening import Stores; "
        "[Stores('.').of(u) for u in ('local', 'file:///x', 's3://bucket', 'gs://bucket', 'az://bucket')]; "
        "print(sorted({'aiobotocore', 'botocore', 'fsspec', 'gcsfs', 'adlfs'} & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout.strip() == "[]"
