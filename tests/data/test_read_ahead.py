"""What is read is what is stored, whatever is cached, hinted, dropped or failing at the time."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import read_ahead
from megatron_davinci.data.block_cache import BlockCache
from megatron_davinci.data.places import S3Path
from megatron_davinci.data.read_ahead import Reader, Remote
from megatron_davinci.errors import EnvironmentProblem

CONTENT = random.Random(5).randbytes(2500)
REMOTE = Remote(S3Path("bucket", "key"), "etag", len(CONTENT), "a" * 32)

spans = st.tuples(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT))).map(sorted)
actions = st.one_of(
    st.tuples(st.sampled_from(["read", "hint"]), spans),
    st.tuples(st.sampled_from(["let go", "lose the disk", "fail once"]), st.none()),
)


class Server:
    """Answers from memory; fails as often as `failures` says."""

    def __init__(self) -> None:
        self.failures = 0
        self.asked: list[tuple[int, int]] = []

    def get(self, remote: Remote, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        if self.failures:
            self.failures -= 1
            raise EnvironmentProblem("The server fails.")
        return CONTENT[start:stop]


def read(reader: Reader, start: int, stop: int) -> bytes:
    buffer = bytearray(b"?" * (stop - start))
    reader.read_into(REMOTE, start, memoryview(buffer))
    return bytes(buffer)


@given(
    script=st.lists(actions, max_size=15),
    block=st.sampled_from([64, 256, 1000, 4000]),
    limit=st.sampled_from([0, 600, 1 << 20]),
    largest=st.sampled_from([100, 1000, 1 << 20]),
)
@settings(max_examples=60)
def test_bytes_are_right_or_an_error_is_raised(tmp_path_factory, script, block, limit, largest):
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "_LARGEST", largest)
        patch.setattr(read_ahead, "_IDLE_SECONDS", 0.05)
        cache = BlockCache(tmp_path_factory.mktemp("c"), limit) if limit else None
        reader = Reader(server.get, cache, block)
        for action, span in script:
            if action == "read":
                failing = server.failures
                try:
                    assert read(reader, *span) == CONTENT[slice(*span)]
                except EnvironmentProblem:
                    assert failing
                    assert read(reader, *span) == CONTENT[slice(*span)]
            elif action == "hint":
                reader.will_need(REMOTE, span[0], span[1] - span[0])
            elif action == "let go":
                reader.let_go(REMOTE)
            elif action == "lose the disk" and cache is not None:
                cache._rest(OSError("for a minute"))
            elif action == "fail once" and not any(kind == "hint" for kind, _ in script):
                server.failures = 1
        server.failures = 0
        assert read(reader, 0, len(CONTENT)) == CONTENT


def test_who_waits_for_a_request_that_fails_hears_why(tmp_path):
    begun, go = Event(), Event()

    def get(remote: Remote, start: int, stop: int) -> bytes:
        begun.set()
        go.wait()
        raise EnvironmentProblem("The server fails.")

    reader = Reader(get, BlockCache(tmp_path, 1 << 20), 100)
    with ThreadPoolExecutor(3) as threads:
        reads = [threads.submit(read, reader, 0, 100)]
        begun.wait()
        reads += [threads.submit(read, reader, 10, 20) for _ in range(2)]
        go.set()
        for future in reads:
            with pytest.raises(EnvironmentProblem, match="The server fails"):
                future.result()
    assert reader._table == {}


def test_threads_ask_for_a_block_once_between_them(tmp_path):
    server = Server()
    reader = Reader(server.get, BlockCache(tmp_path, 1 << 20), 100)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            start = chance.randrange(len(CONTENT) - 100)
            if chance.random() < 0.5:
                reader.will_need(REMOTE, start, 100)
            assert read(reader, start, start + 100) == CONTENT[start : start + 100]

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    asked = Counter(block for start, stop in server.asked for block in range(start, stop, 100))
    assert set(asked.values()) == {1}
