"""The C++ of `csrc/cpu`: built where it can be, right to the byte, and not missed where it is not there."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data import native
from megatron_davinci.data.native import PATH, SWITCH, Library, library
from megatron_davinci.data.permutation import HALF_ROUNDS, permute, permute_by_numpy, radices, round_keys
from megatron_davinci.errors import EnvironmentProblem
from tests.cases import cases

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = (sysconfig.get_config_var("CXX") or "c++").split()[0]

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")
needs_library = pytest.mark.skipif(not PATH.exists(), reason=f"needs {PATH.name}, which was not built")


@pytest.fixture
def fresh():
    """Let `library` decide anew, here and for whoever comes after."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(scope="module")
def built() -> Library:
    return Library(PATH)


@needs_compiler
def test_it_is_built_where_there_is_a_compiler():
    assert PATH.exists(), "make setup builds it"
    newest = max(source.stat().st_mtime for source in SOURCES.iterdir())
    assert PATH.stat().st_mtime >= newest, "it is older than its sources: make setup builds it again"
    Library(PATH)


@needs_compiler
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cpp")), ids=lambda path: path.name)
def test_the_compiler_has_nothing_to_say(source, tmp_path):
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    done = subprocess.run(
        [COMPILER, *flags, "-c", str(source), "-o", str(tmp_path / "o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class TestWhichIsUsed:
    @needs_library
    def test_the_library_is_where_it_is_there(self, fresh, monkeypatch, caplog):
        monkeypatch.delenv(SWITCH, raising=False)
        with caplog.at_level(logging.DEBUG, "megatron_davinci.data.native"):
            assert isinstance(library(), Library) and library() is library()
        assert [record.getMessage() for record in caplog.records] == [f"data is read by {PATH}"], "once"

    def test_python_is_where_it_is_not(self, fresh, monkeypatch, tmp_path, caplog):
        monkeypatch.delenv(SWITCH, raising=False)
        monkeypatch.setattr(native, "PATH", tmp_path / "_cpu.so")
        with caplog.at_level(logging.DEBUG, "megatron_davinci.data.native"):
            assert library() is None
        assert "data is read by Python" in caplog.text and "_cpu.so" in caplog.text

    def test_nothing_is_looked_for_when_it_is_switched_off(self, fresh, monkeypatch):
        monkeypatch.setenv(SWITCH, "0")
        assert library() is None

    def test_that_it_is_missing_is_an_error_for_who_asks_for_it(self, fresh, monkeypatch, tmp_path):
        monkeypatch.setenv(SWITCH, "1")
        monkeypatch.setattr(native, "PATH", tmp_path / "_cpu.so")
        with pytest.raises(EnvironmentProblem, match=rf"(?s){SWITCH}=1.*_cpu\.so.*compiler"):
            library()

    @needs_library
    def test_one_that_is_older_than_the_package_is_not_called(self, fresh, monkeypatch):
        monkeypatch.delenv(SWITCH, raising=False)
        monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
        assert library() is None
        with pytest.raises(OSError, match="interface"):
            Library(PATH)

    def test_neither_is_another_library(self):
        import _ctypes

        with pytest.raises(OSError, match="another library"):
            Library(Path(_ctypes.__file__))

    @needs_library
    def test_a_call_lets_go_of_the_interpreter_lock(self, built):
        keeps_it = ctypes.PyDLL(None).PyLong_FromLong._flags_
        assert keeps_it & ~built._read._flags_ and built._read._flags_ == built._permute._flags_

    def test_importing_the_data_room_loads_nothing(self):
        code = (
            "import megatron_davinci.data, megatron_davinci.data.loader as _; "
            "print('_cpu' in open('/proc/self/maps').read())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


@needs_library
class TestReads:
    @pytest.fixture(scope="class")
    def content(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)

    @pytest.fixture
    def fd(self, tmp_path, content):
        path = tmp_path / "some.bin"
        path.write_bytes(content.tobytes())
        fd = os.open(path, os.O_RDONLY)
        yield fd
        os.close(fd)

    @pytest.fixture(scope="class")
    def kept(self, tmp_path_factory, content):
        path = tmp_path_factory.mktemp("kept") / "some.bin"
        path.write_bytes(content.tobytes())
        with open(path, "rb") as file:
            yield file.fileno()

    @cases(60)
    @given(data=st.data())
    def test_rows_are_the_files_bytes_and_their_largest_token_is_known(self, built, kept, content, data):
        dtype = np.dtype(data.draw(st.sampled_from(["u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8"])))
        width = data.draw(st.integers(1, 300))
        tokens = np.full((9, width), 77, dtype)
        rows = np.array(data.draw(st.lists(st.integers(0, 8), max_size=9, unique=True)), np.int64)
        last = len(content) - width * dtype.itemsize
        offsets = np.array([data.draw(st.integers(0, last)) for _ in rows], np.int64)
        wait = data.draw(st.booleans())
        got, highest = built.read_windows(np.full(len(rows), kept), offsets, tokens, rows, wait=wait)
        for row, offset, count, most in zip(rows, offsets, got, highest, strict=True):
            if not wait and count != width * dtype.itemsize:
                continue  # the kernel had dropped it
            raw = content[offset : offset + width * dtype.itemsize].tobytes()
            assert tokens[row].tobytes() == raw
            assert most == np.frombuffer(raw, f"u{dtype.itemsize}").max()
        untouched = np.setdiff1d(np.arange(9), rows)
        assert (tokens[untouched] == 77).all()

    def test_what_went_wrong_is_said_of_each(self, built, fd, content):
        closed = os.dup(fd)
        os.close(closed)
        tokens = np.zeros((5, 50), np.uint16)
        offsets = np.array([0, 99_950, 100_000, 0, 0])
        fds = np.array([fd, fd, fd, closed, -1])
        for wait in (False, True):
            got, highest = built.read_windows(fds, offsets, tokens, np.arange(5), wait=wait)
            if not wait and got[0] == -errno.EOPNOTSUPP:
                continue  # a tmpfs reads only by waiting
            assert got.tolist() == [100, 50, 0, -errno.EBADF, -errno.EBADF]
            assert highest[0] > 0 and (highest[1:] == 0).all()
        got, _ = built.read_windows(fds[:1], np.array([-5]), tokens, np.arange(1), wait=True)
        assert got.tolist() == [-errno.EINVAL]

    def test_no_rows(self, built):
        nothing = np.empty(0, np.int64)
        got, highest = built.read_windows(nothing, nothing, np.empty((0, 5), np.uint16), nothing, wait=True)
        assert len(got) == len(highest) == 0

    def test_what_is_not_in_memory_is_read_by_waiting_and_not_half_believed(self, built, tmp_path):
        content = np.random.default_rng(1).integers(0, 60_000, 1 << 20).astype(np.uint16)
        path = tmp_path / "large.bin"
        with open(path, "wb") as file:
            file.write(content.tobytes())
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(path, "rb") as file:
            offsets = np.arange(0, 2 << 20, 8192)[:-1]
            rows = np.arange(len(offsets))
            tokens = np.zeros((len(rows), 4097), np.uint16)
            fds = np.full(len(rows), file.fileno())
            got, _ = built.read_windows(fds, offsets, tokens, rows, wait=False)
            expected = np.lib.stride_tricks.sliding_window_view(content, 4097)[::4096]
            whole = got == 8194
            assert np.array_equal(tokens[whole], expected[whole])
            left = np.flatnonzero(~whole)
            got, highest = built.read_windows(fds[left], offsets[left], tokens, rows[left], wait=True)
            assert (got == 8194).all() and np.array_equal(tokens, expected)
            assert np.array_equal(highest, expected[left].max(1))

    def test_offsets_beyond_four_billion(self, built, tmp_path):
        path, far = tmp_path / "sparse.bin", 5 * 2**32 + 6
        with open(path, "wb") as file:
            file.seek(far)
            file.write(b"\x01\x02\x03\x04")
        with open(path, "rb") as file:
            tokens = np.zeros((1, 2), np.uint16)
            got, highest = built.read_windows(
                np.array([file.fileno()]), np.array([far]), tokens, np.arange(1), wait=True
            )
        assert tokens.tobytes() == b"\x01\x02\x03\x04" and (got[0], highest[0]) == (4, 0x0403)

    def test_memory_that_is_not_the_rows_is_never_written(self, built, fd):
        one, tokens = np.zeros(1, np.int64), np.zeros((4, 6), np.uint16)
        for rows in ([4], [-1]):
            with pytest.raises(ValueError, match="rows must be 0 to 3"):
                built.read_windows(one + fd, one, tokens, np.array(rows), wait=True)
        frozen = tokens.copy()
        frozen.flags.writeable = False
        for wrong in (frozen, tokens[:, :3], tokens[0]):
            with pytest.raises(ValueError, match="contiguous, writable matrix"):
                built.read_windows(one + fd, one, wrong, one, wait=True)
        with pytest.raises(ValueError, match="2 files and 1 offsets for 1 rows"):
            built.read_windows(np.zeros(2, int), one, tokens, one, wait=True)
        with pytest.raises(ValueError, match="16 bytes"):
            built.read_windows(one + fd, one, np.zeros((1, 2), complex), one, wait=True)
        assert not tokens.any()


@needs_library
class TestShuffle:
    @cases(60)
    @given(data=st.data())
    def test_the_numbers_are_those_of_numpy(self, built, data):
        sizes = data.draw(
            st.lists(
                st.integers(0, 62).flatmap(lambda bits: st.integers(1, 1 << bits)), min_size=1, max_size=5
            )
        )
        seed = data.draw(st.integers(0, 2**63))
        a, b = np.array([radices(size) for size in sizes], np.int64).T
        keys = np.array([round_keys(seed, "web", epoch) for epoch in range(len(sizes))], np.uint64).T
        generator = np.random.default_rng(seed % 2**32)
        which = generator.integers(0, len(sizes), 200)
        positions = np.array([generator.integers(0, sizes[i]) for i in which])
        given = positions, which, np.array(sizes), a, b, keys
        expected = permute_by_numpy(*given)
        assert np.array_equal(built.permute(*given), expected)
        assert np.array_equal(permute(*given), expected)

    def test_what_is_no_permutation_is_refused(self, built):
        def call(positions=(0,), which=(0,), sizes=(6,), a=(3,), b=(2,), keys=None):
            keys = np.zeros((HALF_ROUNDS, len(sizes)), np.uint64) if keys is None else keys
            return built.permute(*map(np.array, (positions, which, sizes, a, b)), keys)

        assert len(call()) == 1 and len(call((), ())) == 0
        for wrong in ({"positions": (6,)}, {"positions": (-1,)}, {"which": (1,)}, {"which": (-1,)}):
            with pytest.raises(ValueError, match="element 0 is out of range"):
                call(**wrong)
        for wrong in ({"a": (2,)}, {"b": (0,)}, {"a": (-3,), "b": (-2,)}, {"a": (2**31 + 1,)}):
            with pytest.raises(ValueError, match="a permutation is out of range"):
                call(**wrong)
        for wrong in ({"which": (0, 0)}, {"a": (3, 3)}, {"keys": np.zeros((HALF_ROUNDS - 1, 1), np.uint64)}):
            with pytest.raises(ValueError, match="different lengths"):
                call(**wrong)
