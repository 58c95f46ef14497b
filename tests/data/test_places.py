"""Where data lies: local paths and addresses of objects, told apart by their spelling."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from megatron_davinci.data.indexed import bin_path, idx_path
from megatron_davinci.data.places import S3Options, S3Path, inside, local_path, place
from megatron_davinci.errors import DataError


def test_a_path_is_local_unless_it_says_otherwise():
    assert place("data/web") == place(Path("data/web")) == Path("data/web")
    assert place("/mnt/s3:/web") == Path("/mnt/s3:/web")
    assert place("s3://corpus/v1/web/") == S3Path("corpus", "v1/web")


def test_an_object_has_the_manners_of_a_path():
    prefix = place("s3://corpus/v1/web_text.document")
    assert str(bin_path(prefix)) == "s3://corpus/v1/web_text.document.bin"
    assert idx_path(prefix) == S3Path("corpus", "v1/web_text.document.idx")
    assert (prefix.name, str(prefix.parent)) == ("web_text.document", "s3://corpus/v1")
    assert str(place("s3://corpus") / "manifest.json") == "s3://corpus/manifest.json"
    assert inside(place("s3://corpus/v1"), "a/b") == S3Path("corpus", "v1/a/b")
    assert inside(Path("v1"), "a/b") == Path("v1/a/b")


def test_how_to_reach_it_goes_along():
    options = S3Options(endpoint_url="http://localhost:9000", cache_bytes=0)
    prefix = place("s3://corpus/web", options)
    for derived in (
        prefix / "x",
        prefix.with_name("y"),
        bin_path(prefix),
        pickle.loads(pickle.dumps(prefix)),
    ):
        assert derived.options == options
    assert place(place("s3://corpus/web"), options).options == options
    assert place("s3://corpus/web") == prefix, "the same object, however it is reached"


@pytest.mark.parametrize(
    "address", ["s3://", "s3:///key", "s3://corpus//web", "s3://corpus/a/../b", "s3://corpus/./a"]
)
def test_an_address_of_nothing_is_refused(address):
    with pytest.raises(DataError, match="no address of an object"):
        place(address)


def test_another_kind_of_address_says_what_there_is():
    with pytest.raises(DataError, match=r"(?s)gs://corpus/web.*s3://BUCKET/KEY"):
        place("gs://corpus/web")


@pytest.mark.parametrize("nothing", ["", "a\0b"])
def test_what_is_no_path_is_refused(nothing):
    with pytest.raises(DataError, match="This is no path"):
        place(nothing)


@pytest.mark.parametrize("prefix", [Path("."), Path("/")])
def test_a_prefix_has_a_name(prefix):
    for beside in (bin_path, idx_path):
        with pytest.raises(DataError, match="names no dataset"):
            beside(prefix)


@pytest.mark.parametrize("address", ["s3://bucket/key", S3Path("bucket", "key")])
def test_a_local_path_is_never_made_of_an_address(address):
    with pytest.raises(DataError, match=r"(?s)local files only.*s3://bucket/key"):
        local_path(address)
    assert local_path("a/b") == Path("a/b")
