"""Objects in S3 read like local files: the same bytes, few requests, and an error rather than a wrong byte."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from botocore.loaders import create_loader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_davinci.data import block_cache, read_ahead, s3
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.places import S3Options, S3Path, place
from megatron_davinci.data.s3 import S3Blob
from megatron_davinci.data.source import Source
from megatron_davinci.data.storage import digest_of, open_blob, read_all, size_of
from megatron_davinci.errors import DataError, EnvironmentProblem
from tests.data.s3_server import (
    BUCKET,
    KEYS,
    at,
    cut_short,
    fine,
    half_then_never,
    hang_up,
    header,
    never,
    proxy,
    refuse,
    store,
)
from tests.data.test_source import make

__all__ = ["at", "proxy", "store"]  # fixtures

CONTENT = random.Random(3).randbytes(12_345)


@pytest.fixture(scope="module", autouse=True)
def _objects(store):
    store.put("x.bin", CONTENT)
    store.put("empty", b"")


@pytest.fixture(scope="module", autouse=True)
def _models_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", lru_cache(create_loader))
        yield


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    # Between attempts, ours and botocore's.
    monkeypatch.setattr(s3, "_pause", lambda attempt: None)
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0
    )


def read(blob: S3Blob, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    blob.read_into(start, memoryview(buffer))
    return bytes(buffer)


def settle(blob: S3Blob, done=lambda reader: not reader._ahead) -> None:
    """Wait until what was hinted is on disk."""
    reader = s3._connection(blob._remote.place.options).reader
    for _ in range(2000):
        if done(reader):
            return
        time.sleep(0.005)
    raise AssertionError("the hints are never done")


def process(blob: S3Path, code: str) -> subprocess.Popen:
    """Another process that runs `code` with a `blob` and `read` of its own."""
    begin = f"""
import os, random
from pathlib import Path
from megatron_davinci.data.places import S3Options, S3Path
from megatron_davinci.data.s3 import S3Blob

def read(start, stop):
    buffer = bytearray(stop - start)
    blob.read_into(start, memoryview(buffer))
    return bytes(buffer)

CONTENT = random.Random(3).randbytes(12_345)
blob = S3Blob(S3Path({blob.bucket!r}, {blob.key!r}, S3Options(
    endpoint_url={blob.options.endpoint_url!r}, cache=Path({str(blob.options.cache)!r}), block_bytes=1000,
    cache_bytes=1 << 20)))
"""
    return subprocess.Popen(
        [sys.executable, "-c", begin + textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **KEYS},
    )


ranges = st.tuples(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT))).map(sorted)


class TestBytes:
    @given(
        spans=st.lists(st.tuples(ranges, st.booleans()), min_size=1, max_size=8),
        block_bytes=st.sampled_from([64, 1000, 4096, 20_000]),
        cache_bytes=st.sampled_from([0, 3000, 1 << 20]),
    )
    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_equal_the_files_whatever_is_read_and_hinted(self, at, spans, block_bytes, cache_bytes):
        blob = S3Blob(at("x.bin", block_bytes=block_bytes, cache_bytes=cache_bytes))
        for (start, stop), hinted in spans:
            if hinted:
                blob.will_need(start, stop - start)
            assert read(blob, start, stop) == CONTENT[start:stop]

    def test_fill_arrays_too(self, at):
        row = np.zeros(500, "<u2")
        S3Blob(at("x.bin")).read_into(1000, row.data.cast("B"))
        assert row.tobytes() == CONTENT[1000:2000]

    def test_of_many_threads(self, at):
        blob = S3Blob(at("x.bin", cache_bytes=5 * 1004 + 16))

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                start = chance.randrange(len(CONTENT))
                stop = chance.randrange(start, min(len(CONTENT), start + 2500)) + 1
                if chance.random() < 0.5:
                    blob.will_need(start, stop - start)
                assert read(blob, start, stop) == CONTENT[start:stop]

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))

    def test_of_the_seam(self, at):
        assert size_of(at("x.bin")) == len(CONTENT)
        assert size_of(at("nothing")) is None
        assert size_of(S3Path("no-such-bucket", "x.bin", at("x").options)) is None
        assert read_all(at("x.bin")) == CONTENT
        assert read_all(at("empty")) == b""
        blob = open_blob(at("x.bin"))
        assert (blob.size, blob.place) == (len(CONTENT), at("x.bin"))
        blob.close()

    def test_past_the_end_are_refused_before_anything_is_asked(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        with pytest.raises(DataError, match=r"(?s)ends before.*bytes 12,000 to 13,000.*12,345 bytes"):
            read(blob, 12_000, 13_000)
        with pytest.raises(DataError, match="ends before"):
            read(blob, -1, 10)
        assert proxy.gets() == []


class TestRequests:
    def test_windows_of_one_block_cost_one(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        for start in range(2000, 3000, 100):
            read(blob, start, start + 100)
        assert proxy.gets() == [(2000, 2999)]

    def test_neighbouring_blocks_are_asked_for_together(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        read(blob, 3500, 3600)
        read(blob, 500, 6500)
        assert proxy.gets()[0] == (3000, 3999)
        assert sorted(proxy.gets()[1:]) == [(0, 2999), (4000, 6999)]

    def test_the_last_block_ends_with_the_object(self, at, proxy):
        assert read(S3Blob(at("x.bin")), 12_300, 12_345) == CONTENT[12_300:]
        assert proxy.gets() == [(12_000, 12_344)]

    def test_no_request_is_larger_than_what_a_retry_may_cost(self, at, proxy, monkeypatch):
        monkeypatch.setattr(read_ahead, "_LARGEST", 4000)
        assert read_all(at("x.bin")) == CONTENT
        assert sorted(proxy.gets()) == [(0, 3999), (4000, 7999), (8000, 11_999), (12_000, 12_344)]
        proxy.requests.clear()
        assert read_all(at("x.bin", cache_bytes=0)) == CONTENT
        assert sorted(proxy.gets()) == [(0, 3999), (4000, 7999), (8000, 11_999), (12_000, 12_344)]

    def test_a_hint_and_its_reads_cost_one(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        blob.will_need(5000, 100)
        blob.will_need(5100, 100)
        assert read(blob, 5000, 5200) == CONTENT[5000:5200]
        settle(blob)
        blob.will_need(5300, 100)
        assert s3._connection(blob._remote.place.options).reader._ahead == {}, "it is on disk"
        assert read(blob, 5300, 5400) == CONTENT[5300:5400]
        assert proxy.gets() == [(5000, 5999)]

    def test_a_hint_returns_at_once_and_a_read_waits_for_what_is_on_its_way(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        proxy.gate.clear()
        blob.will_need(0, 3000)
        with ThreadPoolExecutor(3) as threads:
            reads = [threads.submit(read, blob, start, start + 500) for start in (0, 700, 2400)]
            while not proxy.gets():
                time.sleep(0.002)
            assert not any(future.done() for future in reads)
            proxy.gate.set()
            assert [future.result() for future in reads] == [
                CONTENT[:500],
                CONTENT[700:1200],
                CONTENT[2400:2900],
            ]
        assert proxy.gets() == [(0, 2999)]

    def test_a_reader_does_not_stand_behind_hints_that_have_not_begun(self, at, proxy, monkeypatch):
        monkeypatch.setattr(read_ahead, "THREADS", 1)
        blob = S3Blob(at("x.bin"))
        proxy.gate.clear()
        blob.will_need(0, 10)
        while not proxy.gets():
            time.sleep(0.002)
        blob.will_need(5000, 10)
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(read, blob, 5000, 5010)
            while len(proxy.gets()) < 2:
                time.sleep(0.002)
            proxy.gate.set()
            assert reading.result() == CONTENT[5000:5010]
        settle(blob)
        assert proxy.gets() == [(0, 999), (5000, 5999)]

    def test_another_process_and_another_run_find_the_blocks(self, at, proxy):
        proxy.gate.clear()
        code = "assert read(100, 5100) == CONTENT[100:5100]"
        both = [process(at("x.bin"), code) for _ in range(2)]
        while sum(request.method == "HEAD" for request in proxy.requests) < 2:
            time.sleep(0.01)
        time.sleep(0.05)  # for the second to come to its turn; the outcome does not hang on it
        proxy.gate.set()
        assert [one.wait(60) for one in both] == [0, 0]
        read(S3Blob(at("x.bin", attempts=3)), 0, 6000)
        assert proxy.gets() == [(0, 5999)]

    def test_a_damaged_block_is_fetched_again(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        read(blob, 0, 3000)
        (path,) = at("x").options.cache.glob("blocks-1/*/00000001")
        path.write_bytes(bytes(path.stat().st_size))
        assert read(blob, 0, 3000) == CONTENT[:3000]
        assert proxy.gets() == [(0, 2999), (1000, 1999)]

    def test_another_version_has_blocks_of_its_own(self, at, store):
        for version in (b"a" * 3000, b"b" * 3000):
            store.put("versions", version)
            assert read(S3Blob(at("versions")), 10, 2010) == version[:2000]


class TestWithoutACache:
    def test_a_request_is_for_the_very_bytes(self, at, proxy):
        blob = S3Blob(at("x.bin", cache_bytes=0))
        assert read(blob, 123, 4567) == CONTENT[123:4567]
        assert read(blob, 123, 4567) == CONTENT[123:4567]
        assert proxy.gets() == [(123, 4566)] * 2
        assert not at("x").options.cache.exists()

    def test_a_hint_is_kept_in_memory_until_it_is_read(self, at, proxy):
        blob = S3Blob(at("x.bin", cache_bytes=0))
        blob.will_need(123, 1000)
        settle(blob, lambda reader: all(fetch.held for fetch in reader._ahead))
        assert read(blob, 123, 1123) == CONTENT[123:1123]
        assert proxy.gets() == [(123, 1122)]
        reader = s3._connection(blob._remote.place.options).reader
        assert (reader._table, reader._ahead, reader._ahead_bytes) == ({}, {}, 0)

    def test_hints_that_nobody_reads_stay_within_a_bound(self, at, proxy, monkeypatch):
        monkeypatch.setattr(read_ahead, "_AHEAD", 2000)
        blob = S3Blob(at("x.bin", cache_bytes=0))
        reader = s3._connection(blob._remote.place.options).reader
        for start in range(0, 12_000, 500):
            blob.will_need(start, 500)
            settle(blob, lambda reader: all(fetch.held for fetch in reader._ahead))
            assert reader._ahead_bytes == min(start + 500, 2000)
        assert len(proxy.gets()) == 24
        proxy.gate.clear()
        for start in range(0, 12_000, 600):
            blob.will_need(start, 600)
        under_way = [(fetch.start, fetch.stop) for fetch in reader._ahead]
        assert under_way == [(0, 600), (600, 1200), (1200, 1800)], "and is not dropped for more of it"
        assert reader._ahead_bytes == 1800
        proxy.gate.set()
        blob.close()
        assert (reader._table, reader._ahead_bytes) == ({}, 0)
        assert read(blob, 0, 600) == CONTENT[:600]

    def test_a_disk_that_fails_is_one(self, at, proxy, caplog, monkeypatch):
        monkeypatch.setattr(block_cache, "_said", set())
        at("x").options.cache.write_bytes(b"a file where the folder should be")
        blob = S3Blob(at("x.bin"))
        assert read(blob, 0, 3000) == CONTENT[:3000]
        assert read(blob, 1500, 1600) == CONTENT[1500:1600]
        assert proxy.gets()[1:] == [(1500, 1599)], "what cannot be kept is not fetched"
        blob.will_need(5100, 100)
        settle(blob, lambda reader: all(fetch.held for fetch in reader._ahead))
        assert read(blob, 5100, 5200) == CONTENT[5100:5200]
        assert proxy.gets()[2:] == [(5100, 5199)]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "cannot be used" in caplog.text


class TestWhatGoesWrongOnce:
    """And is tried again: the bytes are right, and nobody hears of it."""

    @pytest.mark.parametrize(
        "spoil",
        [
            refuse(503, "SlowDown"),
            refuse(500, "InternalError"),
            refuse(429, "TooManyRequests"),
            cut_short,
            hang_up,
            never,
            half_then_never,
        ],
        ids=lambda spoil: spoil.__qualname__.partition(".")[0],
    )
    @pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
    def test_is_no_error(self, at, proxy, spoil, cache_bytes):
        # A busy machine may be late as well, so there are attempts to spare.
        blob = S3Blob(at("x.bin", cache_bytes=cache_bytes, read_timeout_seconds=0.5, attempts=6))
        proxy.spoils.append(spoil)
        assert read(blob, 100, 2100) == CONTENT[100:2100]
        assert len(proxy.gets()) >= 2
        assert not proxy.spoils

    def test_a_hint_that_fails_is_the_readers_to_try_again(self, at, proxy):
        blob = S3Blob(at("x.bin"))
        proxy.spoils.extend([refuse(503, "SlowDown")] * 2)
        blob.will_need(0, 1000)
        settle(blob)
        assert len(proxy.gets()) == 2
        assert read(blob, 0, 1000) == CONTENT[:1000]


class TestErrors:
    """Each says which object and bytes, what the server said, and what to do; nothing is cached of it."""

    def fails(self, at, proxy, spoil, kind, **options):
        blob = S3Blob(at("x.bin", **options))
        proxy.always = spoil
        with pytest.raises(kind) as caught:
            read(blob, 100, 2100)
        assert "s3://bucket/x.bin, bytes 0 to 3,000" in str(caught.value.where)
        assert caught.value.do
        assert list(at("x").options.cache.glob("blocks-1/*/*")) == []
        proxy.always = fine
        again = S3Blob(at("x.bin")) if options else blob
        assert read(again, 100, 2100) == CONTENT[100:2100], "the next reader tries anew"
        return str(caught.value)

    @pytest.mark.parametrize(
        "spoil, said",
        [
            (refuse(403, "AccessDenied", "Access Denied"), ["refused access", "HTTP 403 AccessDenied: Access"]),
            (refuse(403, "InvalidAccessKeyId"), ["does not know the credentials", "said by the test"]),
            (refuse(403, "SignatureDoesNotMatch"), ["signature", "secret key"]),
            (refuse(403, "RequestTimeTooSkewed"), ["clock"]),
            (refuse(400, "ExpiredToken"), ["have expired", "renew"]),
            (refuse(503, "SlowDown", "Slower"), ["overloaded", "HTTP 503 SlowDown: Slower", "2 attempts"]),
            (refuse(500, "InternalError"), ["failing", "HTTP 500", "2 attempts"]),
            (refuse(501, "NotImplemented"), ["refused a request", "HTTP 501"]),
            (hang_up, ["connection broke", "2 attempts"]),
            (cut_short, ["connection broke", "1500 bytes", "2 attempts"]),
            (header("Content-Range", "bytes 5-6/7"), ["the range that was asked for", "bytes 5-6/7"]),
            (header("Content-Range", None), ["the whole object"]),
        ],
    )  # fmt: skip
    def test_of_the_environment(self, at, proxy, spoil, said):
        message = self.fails(at, proxy, spoil, EnvironmentProblem)
        assert [part for part in said if part not in message] == [], message

    @pytest.mark.parametrize("spoil", [never, half_then_never])
    def test_a_server_that_says_nothing(self, at, proxy, spoil):
        message = self.fails(at, proxy, spoil, EnvironmentProblem, read_timeout_seconds=0.5, attempts=3)
        assert "did not answer in time" in message
        assert "bytes within 0.5 s, 3 attempts" in message

    @pytest.mark.parametrize("spoil", [refuse(404, "NoSuchKey"), refuse(404, "NoSuchBucket")])
    def test_an_object_that_is_gone(self, at, proxy, spoil):
        blob = S3Blob(at("x.bin"))
        proxy.always = spoil
        with pytest.raises(DataError, match=r"(?s)not there.*s3://bucket/x\.bin.*HTTP 404 NoSuch"):
            read(blob, 0, 10)

    def test_an_object_that_is_replaced_is_never_mixed(self, at, proxy, store):
        store.put("replaced", b"a" * 5000)
        for options in ({}, {"cache_bytes": 0}):
            blob = S3Blob(at("replaced", **options))
            assert read(blob, 0, 1000) == b"a" * 1000
            store.put("replaced", b"b" * 5000)
            with pytest.raises(DataError, match="changed while it was being read") as caught:
                read(blob, 2000, 2500)
            assert "HTTP 412 PreconditionFailed" in caught.value.found
            assert "ETag" in caught.value.expected
            store.put("replaced", b"a" * 5000)

    def test_nor_by_a_server_that_does_not_know_if_match(self, at, proxy):
        message = self.fails(at, proxy, header("ETag", '"another"'), DataError)
        assert 'found:    ETag "another"' in message

    def test_on_opening(self, at, proxy):
        with pytest.raises(DataError, match=r"(?s)not there.*s3://bucket/nothing.*check the bucket"):
            S3Blob(at("nothing"))
        for spoil, kind, said in (
            (refuse(403, "AccessDenied"), EnvironmentProblem, "HTTP 403: Forbidden"),
            (refuse(400, "ExpiredToken"), EnvironmentProblem, "HTTP 400: Bad Request"),
            (refuse(503, "SlowDown"), EnvironmentProblem, "overloaded"),
            (header("ETag", None), EnvironmentProblem, "gives no ETag"),
        ):
            proxy.always = spoil
            with pytest.raises(kind, match=said):
                S3Blob(at("x.bin"))
            if said != "gives no ETag":
                with pytest.raises(kind, match=said):
                    size_of(at("x.bin"))

    def test_no_server(self, at, proxy):
        proxy.server.shutdown()
        proxy.server.server_close()
        with pytest.raises(EnvironmentProblem, match=f"(?s)cannot be reached.*{proxy.url}"):
            S3Blob(at("x.bin"))

    def test_no_credentials(self, at, monkeypatch):
        for name in KEYS:
            monkeypatch.delenv(name)
        with pytest.raises(EnvironmentProblem, match=r"(?s)no credentials.*AWS_ACCESS_KEY_ID"):
            S3Blob(at("x.bin"))
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(EnvironmentProblem, match=r"(?s)cannot be set up.*nobody"):
            S3Blob(at("x.bin", attempts=3))

    def test_a_bucket_of_an_impossible_name(self, at):
        with pytest.raises(DataError, match=r"(?s)no address.*s3://a b/x"):
            S3Blob(S3Path("a b", "x", at("x").options))

    def test_an_impossible_endpoint(self, at):
        with pytest.raises(EnvironmentProblem, match=r"(?s)cannot be set up.*no url"):
            S3Blob(S3Path(BUCKET, "x", S3Options(endpoint_url="no url")))

    def test_no_boto3(self, at, monkeypatch):
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(EnvironmentProblem, match=r"pip install 'megatron-davinci\[s3\]'"):
            S3Blob(at("x.bin", attempts=4))


def test_the_environment_names_the_endpoint_too(at, proxy, monkeypatch, tmp_path):
    # By name: buckets of a server that is given by number are never part of the host.
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url.replace("127.0.0.1", "localhost"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert read(S3Blob(S3Path(BUCKET, "x.bin", S3Options(attempts=7))), 0, 10) == CONTENT[:10]
    assert [request.path for request in proxy.requests] == ["/bucket/x.bin"] * 2, "the bucket is in the path"
    assert list((tmp_path / "home" / "megatron-davinci" / "s3").glob("blocks-1/*/00000000"))


@pytest.mark.parametrize("cache", [None, "~nobody-of-this-name/cache"])
def test_a_cache_in_a_home_that_nobody_knows_is_no_folder_of_that_name(
    at, store, monkeypatch, tmp_path, cache
):
    def unknown(path):
        return path

    store.put("a", b"abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", unknown)  # as where a user has neither HOME nor an entry
    with pytest.raises(EnvironmentProblem, match="cannot be told where") as caught:
        read_all(at("a", cache=None if cache is None else Path(cache)))
    assert caught.value.where == "data.s3.cache" and list(tmp_path.iterdir()) == []
    assert read_all(at("a", cache=None, cache_bytes=0)) == b"abc"


def test_a_forked_process_reads_on_by_itself(at, proxy):
    # Apart from this process, whose threads a fork had better not meet.
    code = """
        blob.will_need(0, 1000)
        assert read(0, 1000) == CONTENT[:1000]
        child = os.fork()
        if not child:
            os._exit(0 if read(5000, 6000) == CONTENT[5000:6000] else 1)
        blob.will_need(3000, 1000)
        assert read(3000, 4000) == CONTENT[3000:4000]
        assert os.waitpid(child, 0)[1] == 0
        assert read(5000, 6000) == CONTENT[5000:6000]
    """
    assert process(at("x.bin"), code).wait(60) == 0
    assert sorted(proxy.gets()) == [(0, 999), (3000, 3999), (5000, 5999)]


def test_an_ending_process_waits_for_no_hint(at, proxy):
    proxy.gate.clear()
    assert process(at("x.bin"), "blob.will_need(0, 12_000)").wait(60) == 0
    assert proxy.requests


class TestSources:
    @pytest.fixture
    def folder(self, tmp_path, store):
        folder = make(tmp_path / "web", [900, 35, 1200], "uint16")
        for path in folder.iterdir():
            store.put(f"corpus/web/{path.name}", path.read_bytes())
        return folder

    def test_are_those_of_the_disk(self, folder, at, proxy):
        local, remote = Source.open("web", folder, 32), Source.open("web", at("corpus/web"), 32)
        assert remote.fingerprint == local.fingerprint
        assert (remote.num_windows, remote.num_tokens) == (local.num_windows, local.num_tokens)
        row = np.empty(33, np.uint16)
        for window in range(local.num_windows):
            remote.will_need(window)
            assert remote.locate(window) == local.locate(window)
            assert remote.read(window).tolist() == local.read(window).tolist()
            remote.read_into(window, row)
            assert row.tolist() == local.read(window).tolist()
        with pytest.raises(DataError, match=r"(?s)too small.*s3://bucket/corpus/web"):
            Source.open("web", at("corpus/web"), 5000)

    def test_of_a_bare_prefix_too(self, folder, at):
        local, remote = Source.open("s", folder / "part-0", 32), Source.open("s", at("corpus/web/part-0"), 32)
        assert remote.fingerprint == local.fingerprint
        assert remote.read(3).tolist() == local.read(3).tolist()
        with pytest.raises(DataError, match="neither a folder nor"):
            Source.open("s", at("corpus/web/part-9"), 32)

    def test_are_checked_against_the_manifests_digests(self, folder, at, store):
        Source.open("web", at("corpus/web"), 32, verify_digests=True)
        assert digest_of(at("corpus/web/part-0.bin")) == digest_of(folder / "part-0.bin")
        store.put("corpus/web/part-2.bin", bytes(2400))
        with pytest.raises(DataError, match=r"(?s)bytes differ.*s3://bucket/corpus/web/part-2\.bin"):
            Source.open("web", at("corpus/web"), 32, verify_digests=True)

    def test_a_cut_shard_is_found_when_it_is_opened(self, folder, at, store):
        store.put("corpus/web/part-2.bin", bytes(2398))
        source = Source.open("web", at("corpus/web"), 32)
        with pytest.raises(DataError, match=r"(?s)s3://bucket/corpus/web/part-2\.bin"):
            source.read(source.num_windows - 1)

    def test_indexed_datasets(self, folder, at):
        local, remote = IndexedDataset(folder / "part-0"), IndexedDataset(at("corpus/web/part-0"))
        assert len(remote) == len(local)
        assert remote.dtype == local.dtype
        assert all(np.array_equal(remote[i], local[i]) for i in range(len(local)))
        assert np.array_equal(remote.tokens(17, 300), local.tokens(17, 300))

    def test_their_spelling_is_enough(self, folder, proxy, tmp_path):
        options = S3Options(endpoint_url=proxy.url, cache=tmp_path / "cache", attempts=2)
        source = Source.open("web", place("s3://bucket/corpus/web", options), 32)
        assert source.read(0).tolist() == Source.open("web", folder, 32).read(0).tolist()
