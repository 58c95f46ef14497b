"""The cache gives back what was stored or nothing, never holds more than its bound, and is shared by processes."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import block_cache
from megatron_davinci.data.block_cache import BlockCache

ONE, TWO = "1" * 32, "2" * 32
CHUNK = 1 << 14


def content(block: int, nbytes: int) -> bytes:
    return random.Random(block).randbytes(nbytes)


def read(cache: BlockCache, stored: str, block: int, nbytes: int, start: int = 0, stop: int | None = None):
    """The bytes, or None where the cache does not have them."""
    buffer = bytearray((nbytes if stop is None else stop) - start)
    return bytes(buffer) if cache.read_into(stored, block, nbytes, start, memoryview(buffer)) else None


def used(folder: Path) -> int:
    """Bytes of every file in the folder, whatever it is."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # evicted by another process just now
            continue
    return total


def blocks(folder: Path) -> dict[int, Path]:
    return {int(path.name, 16): path for path in folder.glob("blocks-1/*/????????")}


def age(path: Path, seconds: float) -> None:
    at = path.stat().st_mtime - seconds
    os.utime(path, (at, at))


@given(data=st.data(), nbytes=st.integers(1, 3 * CHUNK + 5))
@settings(max_examples=60)
def test_any_part_of_a_block_reads_as_it_was_stored(tmp_path_factory, data, nbytes):
    cache = BlockCache(tmp_path_factory.mktemp("c"), 1 << 20)
    whole = content(7, nbytes)
    assert read(cache, ONE, 7, nbytes) is None
    assert not cache.holds(ONE, 7)
    assert cache.store(ONE, 7, whole)
    assert cache.holds(ONE, 7)
    start = data.draw(st.integers(0, nbytes - 1))
    stop = data.draw(st.integers(start + 1, nbytes))
    assert read(cache, ONE, 7, nbytes, start, stop) == whole[start:stop]
    assert read(cache, ONE, 8, nbytes) is None
    assert read(cache, TWO, 7, nbytes) is None


class TestDamage:
    @pytest.fixture
    def stored(self, tmp_path):
        cache = BlockCache(tmp_path, 1 << 20)
        cache.store(ONE, 0, content(0, 2 * CHUNK))
        return cache, blocks(tmp_path)[0]

    @pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 7])
    def test_of_one_bit_is_found_and_the_block_dropped(self, stored, at):
        cache, path = stored
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
        assert read(cache, ONE, 0, 2 * CHUNK) is None
        assert not path.exists()
        assert cache.store(ONE, 0, content(0, 2 * CHUNK))
        assert read(cache, ONE, 0, 2 * CHUNK) == content(0, 2 * CHUNK)

    @pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 7, 2 * CHUNK + 9])
    def test_of_the_length_too(self, stored, size):
        cache, path = stored
        os.truncate(path, size)
        assert read(cache, ONE, 0, 2 * CHUNK) is None
        assert not path.exists()

    @pytest.mark.parametrize("stored_as, block", [(TWO, 0), (ONE, 1)])
    def test_is_a_block_under_anothers_name(self, stored, stored_as, block):
        cache, path = stored
        other = path.parents[1] / stored_as / f"{block:08x}"
        other.parent.mkdir(exist_ok=True)
        path.rename(other)
        assert read(cache, stored_as, block, 2 * CHUNK) is None

    def test_elsewhere_in_the_block_costs_a_window_nothing(self, stored):
        cache, path = stored
        raw = bytearray(path.read_bytes())
        raw[CHUNK] ^= 1
        path.write_bytes(raw)
        assert read(cache, ONE, 0, 2 * CHUNK, 10, 500) == content(0, 2 * CHUNK)[10:500]


class TestBound:
    @given(
        sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
        limit=st.integers(0, 12_000),
    )
    @settings(max_examples=40)
    def test_holds_after_every_write(self, tmp_path_factory, sizes, limit):
        folder = tmp_path_factory.mktemp("c")
        for block, nbytes in enumerate(sizes):
            kept = BlockCache(folder, limit).store(ONE, block, content(block, nbytes))
            assert used(folder) <= limit
            assert kept == (read(BlockCache(folder, limit), ONE, block, nbytes) is not None)

    def test_is_used_well(self, tmp_path):
        cache = BlockCache(tmp_path, 20 * 1004 + 16)
        for block in range(100):
            assert cache.store(ONE, block, content(block, 1000))
            assert used(tmp_path) >= min(block + 1, 17) * 1004

    def test_evicts_what_was_not_used_for_longest(self, tmp_path):
        cache = BlockCache(tmp_path, 10 * 1004 + 16)
        for block in range(10):
            cache.store(ONE, block, content(block, 1000))
            age(blocks(tmp_path)[block], 1000 - block)
        for block in (0, 1, 4):
            assert read(cache, ONE, block, 1000, 5, 9)
        cache.store(ONE, 10, content(10, 1000))
        # 2, 3 and 5 went: room for one, and for a tenth of the bound more.
        assert set(blocks(tmp_path)) == {0, 1, 4, 6, 7, 8, 9, 10}

    def test_a_smaller_one_is_kept_from_the_next_write_on(self, tmp_path):
        for block in range(10):
            BlockCache(tmp_path, 1 << 20).store(ONE, block, content(block, 1000))
        smaller = BlockCache(tmp_path, 3500)
        smaller.store(TWO, 0, content(0, 1000))
        assert used(tmp_path) <= 3500
        assert read(smaller, TWO, 0, 1000) == content(0, 1000)

    def test_survives_a_lost_ledger(self, tmp_path):
        cache = BlockCache(tmp_path, 5 * 1004 + 16)
        for block in range(20):
            (tmp_path / "blocks-1" / "ledger").unlink(missing_ok=True)
            cache.store(ONE, block, content(block, 1000))
            assert used(tmp_path) <= 5 * 1004 + 16

    def test_survives_a_ledger_that_says_too_little(self, tmp_path):
        cache = BlockCache(tmp_path, 5 * 1004 + 16)
        for block in range(5):
            cache.store(ONE, block, content(block, 1000))
        long_ago = block_cache._LEDGER.pack(0, 0.0)
        (tmp_path / "blocks-1" / "ledger").write_bytes(long_ago)
        cache.store(ONE, 5, content(5, 1000))
        assert used(tmp_path) <= 5 * 1004 + 16

    def test_what_others_keep_in_the_folder_is_left_alone(self, tmp_path):
        mine = [
            tmp_path / "letter.txt",
            tmp_path / "blocks-1" / "notes" / "00000001",
            tmp_path / ONE / "00000000",
        ]
        for path in mine:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
        cache = BlockCache(tmp_path, 2100)
        for block in range(10):
            assert cache.store(ONE, block, content(block, 1000))
        assert all(path.read_bytes() == b"mine" for path in mine)


def test_remains_of_a_dead_process_are_removed(tmp_path):
    cache = BlockCache(tmp_path, 4 * 1004 + 16)
    cache.store(ONE, 0, content(0, 1000))
    remains = blocks(tmp_path)[0].with_name("tmp-99999-00000001")
    remains.write_bytes(b"half of a block")
    for block in range(1, 6):
        cache.store(ONE, block, content(block, 1000))
    assert not remains.exists()


def test_a_process_killed_while_it_writes_leaves_no_block(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from megatron_davinci.data import block_cache
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        block_cache.BlockCache(Path({str(tmp_path)!r}), 5000).store({ONE!r}, 0, bytes(1000))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -9
    cache = BlockCache(tmp_path, 5000)
    assert read(cache, ONE, 0, 1000) is None
    for block in range(8):
        assert cache.store(ONE, block, content(block, 1000)), "the dead process holds no lock"
        assert used(tmp_path) <= 5000
    assert list(tmp_path.rglob("tmp-*")) == []


def test_threads_may_do_everything_at_once(tmp_path):
    limit = 30 * 1004 + 16
    cache = BlockCache(tmp_path, limit)

    def work(seed: int) -> int:
        chance, hits = random.Random(seed), 0
        for _ in range(150):
            block = chance.randrange(60)
            found = read(cache, ONE, block, 1000)
            assert found in (None, content(block, 1000))
            hits += found is not None
            cache.store(ONE, block, content(block, 1000))
            assert used(tmp_path) <= limit
        return hits

    with ThreadPoolExecutor(4) as threads:
        assert all(hits > 0 for hits in threads.map(work, range(4)))


def test_processes_too(tmp_path):
    limit = 20 * 1004 + 16
    code = f"""
        import sys
        from pathlib import Path
        from tests.data.test_block_cache import BlockCache, ONE, content, random, read, used
        folder, chance, hits = Path({str(tmp_path)!r}), random.Random(sys.argv[1]), 0
        cache = BlockCache(folder, {limit})
        for _ in range(150):
            block = chance.randrange(40)
            found = read(cache, ONE, block, 1000)
            assert found in (None, content(block, 1000))
            hits += found is not None
            assert cache.store(ONE, block, content(block, 1000))
            assert used(folder) <= {limit}
        assert hits
    """
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(seed)], cwd=root)
        for seed in range(2)
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert used(tmp_path) <= limit


class TestABadDisk:
    @pytest.fixture(autouse=True)
    def _anew(self, monkeypatch):
        monkeypatch.setattr(block_cache, "_said", set())

    def test_that_is_full_is_said_once_and_nothing_half_written_stays(self, tmp_path, monkeypatch, caplog):
        def full(fd, raw):
            raise OSError(errno.ENOSPC, "No space left on device")

        cache = BlockCache(tmp_path, 1 << 20)
        monkeypatch.setattr(block_cache, "_write_wholly", full)
        with caplog.at_level(logging.WARNING):
            assert not cache.store(ONE, 0, bytes(1000))
            assert not cache.accepts(1000)
            assert not BlockCache(tmp_path, 1 << 20).store(ONE, 1, bytes(1000))
        assert blocks(tmp_path) == {}
        assert list(tmp_path.rglob("tmp-*")) == []
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "No space left on device" in caplog.text and "data.s3.cache" in caplog.text
        monkeypatch.undo()
        monkeypatch.setattr(block_cache, "_REST_SECONDS", 0)
        cache._rest_until = 0.0
        assert cache.store(ONE, 0, bytes(1000)), "it is tried again later"

    def test_whose_folder_cannot_be_made(self, tmp_path, caplog):
        (tmp_path / "file").write_bytes(b"")
        cache = BlockCache(tmp_path / "file" / "cache", 1 << 20)
        assert not cache.store(ONE, 0, bytes(1000))
        assert read(cache, ONE, 0, 1000) is None
        with cache.turn(ONE, 0):
            pass
        assert caplog.text.count("cannot be used") == 1

    def test_a_folder_that_is_removed_meanwhile_is_made_again(self, tmp_path):
        cache = BlockCache(tmp_path / "cache", 1 << 20)
        for _ in range(2):
            assert cache.store(ONE, 0, bytes(1000))
            assert read(cache, ONE, 0, 1000) == bytes(1000)
            shutil.rmtree(tmp_path / "cache")
            assert read(cache, ONE, 0, 1000) is None

    def test_also_if_that_happens_while_it_is_waited_for(self, tmp_path, monkeypatch):
        cache, flock = BlockCache(tmp_path / "cache", 1 << 20), block_cache.fcntl.flock

        def clear(fd: int, how: int) -> None:
            monkeypatch.undo()
            shutil.rmtree(tmp_path / "cache")
            flock(fd, how)

        monkeypatch.setattr(block_cache.fcntl, "flock", clear)
        assert cache.store(ONE, 0, bytes(1000))
        assert block_cache._LEDGER.unpack((tmp_path / "cache/blocks-1/ledger").read_bytes())[0] == 1004


def test_one_process_at_a_time_has_its_turn_at_a_block(tmp_path):
    code = f"""
        import sys
        from pathlib import Path
        from megatron_davinci.data.block_cache import BlockCache
        cache = BlockCache(Path({str(tmp_path)!r}), 1 << 20)
        with cache.turn({ONE!r}, 1):
            print("elsewhere", flush=True)
        with cache.turn({ONE!r}, 0):
            print("stored" if cache.holds({ONE!r}, 0) else "missing", flush=True)
    """
    cache = BlockCache(tmp_path, 1 << 20)
    with cache.turn(ONE, 0):
        other = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout.readline() == "elsewhere\n", "another block's turn is free"
        cache.store(ONE, 0, bytes(1000))
    assert other.communicate()[0] == "stored\n"
    with BlockCache(tmp_path, 1 << 20).turn(ONE, 0):
        pass


def test_a_process_that_is_forked_while_a_block_is_stored_locks_nobody_out(tmp_path):
    code = f"""
        import os
        from pathlib import Path
        from megatron_davinci.data.block_cache import BlockCache
        cache, replace = BlockCache(Path({str(tmp_path)!r}), 1 << 20), os.replace
        ends = os.pipe()
        def fork_now(old, new):
            os.replace = replace
            if os.fork() == 0:
                os.close(ends[1])
                os.read(ends[0], 1)  # until the parent has ended
                os._exit(0)
            replace(old, new)
        os.replace = fork_now
        assert cache.store({ONE!r}, 0, bytes(1000))
        assert cache.store({ONE!r}, 1, bytes(1000))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == 0


def test_a_ledger_that_stays_locked_is_a_disk_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "_PATIENCE_SECONDS", 0.02)
    cache = BlockCache(tmp_path, 1 << 20)
    with BlockCache(tmp_path, 1 << 20)._locked():
        assert not cache.store(ONE, 0, bytes(1000))
    assert not cache.holds(ONE, 0)


def test_nobody_waits_for_a_turn_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "_PATIENCE_SECONDS", 0.05)
    code = f"""
        from pathlib import Path
        from megatron_davinci.data.block_cache import BlockCache
        with BlockCache(Path({str(tmp_path)!r}), 1 << 20).turn({ONE!r}, 0):
            print("held", flush=True)
            input()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with BlockCache(tmp_path, 1 << 20).turn(ONE, 0):
        pass
    other.communicate("\n")
    assert other.returncode == 0
