"""The names of checkpoint stores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.errors import InvalidSpec
from distroml.spec import convert_spec
from distroml.store_urls import LOCAL, StoreUrl, parse_store


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("local", StoreUrl(LOCAL)),
        ("file:///mnt/checkpoints", StoreUrl("file", "/mnt/checkpoints")),
        ("file:///mnt/with%20space/", StoreUrl("file", "/mnt/with space")),
        ("s3://bucket", StoreUrl("s3", "bucket")),
        ("s3://bucket/a/b/", StoreUrl("s3", "bucket", "a/b")),
        (
            "s3://bucket/a?endpoint=http://127.0.0.1:9000&region=eu-central-1&path_style=true",
            StoreUrl(
                "s3",
                "bucket",
                "a",
                {
                    "endpoint": "http://127.0.0.1:9000",
                    "region": "eu-central-1",
                    "path_style": "true",
                },
            ),
        ),
        ("gs://bucket/a", StoreUrl("gs", "bucket", "a")),
        ("az://container/a?account=name1", StoreUrl("az", "container", "a", {"account": "name1"})),
    ],
)
def test_stores_are_understood(name: str, url: StoreUrl) -> None:
    assert parse_store(name, "store") == url
    convert_spec({"checkpointing": {"store": name}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "must be local, or a URL"),
        ("Local", "must be local, or a URL"),
        ("/mnt/x", "must be local, or a URL"),
        ("s3", "must be local, or a URL"),
        ("s3:bucket", "must be local, or a URL"),
        ("http://host/x", "must be local, or a URL"),
        ("file://relative/dir", "three slashes and an absolute path"),
        ("file://localhost/dir", "three slashes and an absolute path"),
        ("file:///", "absolute directory"),
        ("file:///a/../b", "absolute directory"),
        ("file:///a?x=1", "it has none"),
        ("file:///a#b", "after '#'"),
        ("s3://", "needs the name of a bucket"),
        ("s3:///prefix", "needs the name of a bucket"),
        ("s3://b", "needs the name of a bucket"),
        ("s3://bucket:9000/x", "needs the name of a bucket"),
        ("s3://bucket/a//b", "without empty parts"),
        ("s3://bucket/../b", "without empty parts"),
        ("s3://bucket/%00", "without empty parts"),
        ("s3://bucket/" + "a" * 600, "512 characters"),
        ("s3://bucket?endpoint=minio", "endpoint must be the URL of a server"),
        ("s3://bucket?endpoint=http://h:0", "endpoint must be the URL of a server"),
        ("s3://bucket?region=a/b", "region must be a name"),
        ("s3://bucket?path_style=yes", "path_style must be true or false"),
        ("s3://bucket?region=a&region=b", "given twice"),
        ("s3://bucket?speed=1", "it has: endpoint, region, path_style"),
        ("s3://bucket?x", "not a URL"),
        ("s3://[bucket", "not a URL"),
        ("az://container?account=UPPER", "account must be"),
        ("gs://bucket?endpoint=http://h", "it has none"),
    ],
)
def test_what_is_wrong_is_named(name: str, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said) as caught:
        parse_store(name, "checkpointing.store")
    assert caught.value.field == "checkpointing.store"


@pytest.mark.parametrize(
    "name",
    [
        "s3://AKIA:hidden-value@bucket/x",
        "s3://hidden-value@bucket",
        "s3://bucket?secret_key=hidden-value",
        "s3://bucket?aws_access_key_id=hidden-value",
        "s3://bucket?session_token=hidden-value",
        "s3://bucket?endpoint=http://user:hidden-value@host",
        "s3://bucket?endpoint=http://host/?token%3Dhidden-value",
        "az://container?account_key=hidden-value",
        "az://container?sig=hidden-value",
        "gs://bucket?token=hidden-value",
        "file://user:hidden-value@host/x",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(
        InvalidSpec, match=r"must not hold credentials.*Give them to the nodes"
    ) as c:
        parse_store(name, "checkpointing.store")
    assert "hidden-value" not in str(c.value)


@given(st.text(max_size=100))
def test_any_text_is_a_store_or_refused(text: str) -> None:
    for name in (text, f"s3://{text}", f"file://{text}", f"s3://bucket/{text}", f"az://c?{text}"):
        try:
            url = parse_store(name, "store")
        except InvalidSpec:
            continue
        assert ".." not in url.prefix.split("/")
