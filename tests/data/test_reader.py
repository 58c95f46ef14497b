"""Windows read many at once, by C++ or by Python: the same rows, the same errors, from whatever is in memory."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data import IndexedDatasetWriter, Manifest, NativeLoader, Shard, Source
from megatron_davinci.data.native import PATH, SWITCH, library
from megatron_davinci.data.reader import Rows, WindowReader
from megatron_davinci.data.storage import LocalBlob
from megatron_davinci.errors import DataError, DavinciError, EnvironmentProblem
from tests.cases import cases
from tests.data.text import batches_of, same

S, VOCABULARY = 8, 250
DTYPES = ("uint8", "uint16", "int16", "int32", "int64")
needs_library = pytest.mark.skipif(not PATH.exists(), reason=f"needs {PATH.name}, which was not built")
forms = pytest.mark.parametrize("native", [pytest.param(True, marks=needs_library), False])


@pytest.fixture(autouse=True)
def _switch(monkeypatch):
    """Whatever the environment says, the reader's own argument decides."""
    monkeypatch.delenv(SWITCH, raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


def make(
    folder: Path, dtype: str, sizes: list[int], *, mask: bool = False, bad: tuple[int, ...] = ()
) -> Source:
    """Shards of `sizes` tokens; tokens number `bad`, counted over all shards, are outside the vocabulary."""
    tokens = np.random.default_rng(sum(sizes)).integers(0, VOCABULARY, sum(sizes))
    tokens[list(bad)] = VOCABULARY
    shards = []
    for k, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        with IndexedDatasetWriter(folder / f"part-{k}", dtype, mask=mask) as writer:
            writer.add_document(part, loss=part % 2 if mask else None)
        shards.append(Shard.of(f"part-{k}", writer.written))
    Manifest(
        name=folder.name,
        domain="d",
        dtype=dtype,
        vocab_size=VOCABULARY,
        eod_id=None,
        tokenizer_sha256=None,
        shards=tuple(shards),
    ).save(folder)
    return Source.open(folder.name, folder, S, vocab_size=VOCABULARY)


def rows_of(sources: list[Source], places: list[tuple[int, int]], dtype: str, mask: bool = False) -> Rows:
    """Rows for windows of sources, filled with what no token is."""
    source, window = np.array(places, np.int64).reshape(-1, 2).T
    tokens = np.frombuffer(bytearray(b"\xab") * (len(places) * (S + 1) * np.dtype(dtype).itemsize), dtype)
    tokens = tokens.reshape(-1, S + 1)
    memory = [memoryview(row).cast("B") for row in tokens]
    return Rows(source, window, tokens, memory, np.full((len(places), S), 0xAB, np.uint8) if mask else None)


@contextmanager
def reading(sources: list[Source], native: bool, threads: int = 1):
    reader = WindowReader(sources, threads, native=native)
    assert (reader._library is not None) is native
    yield reader
    reader.close()


def read(reader: WindowReader, rows: Rows) -> Rows:
    reader.begin(rows).finish()
    return rows


def said(reader: WindowReader, rows: Rows) -> tuple[type, str]:
    with pytest.raises(DavinciError) as caught:
        read(reader, rows)
    return type(caught.value), str(caught.value)


def drop(folder: Path) -> None:
    """Have the kernel forget the token files, as far as it will."""
    for file in folder.rglob("*.bin"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    """One of each dtype, in shards of few and of no windows; half of them with a mask."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        dtype: make(folder / dtype, dtype, [30, 3, 9, 80, 17 + k], mask=k % 2 == 0)
        for k, dtype in enumerate(DTYPES)
    }


@forms
@cases(60)
@given(data=st.data())
def test_rows_are_the_windows_whoever_reads_them(sources, native, data):
    names = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3, unique=True))
    chosen = [sources[name] for name in names]
    windows = [(k, w) for k, source in enumerate(chosen) for w in range(source.num_windows)]
    places = data.draw(st.lists(st.sampled_from(windows), max_size=40))
    dtype = data.draw(st.sampled_from(["uint16", "int32", "int64"]))
    rows = rows_of(chosen, places, dtype, mask=data.draw(st.booleans()))
    with reading(chosen, native, data.draw(st.integers(1, 3))) as reader:
        # Fewer files than a batch lies in may be open.
        reader.most_open = data.draw(st.sampled_from([1, 2, 100]))
        if data.draw(st.booleans()):
            for source in chosen:
                drop(source.shard_place(0).parent)
        read(reader, rows)
    row, mask = np.empty(S + 1, dtype), np.empty(S, np.uint8)
    for k, (source, window) in enumerate(places):
        chosen[source].read_into(window, row)
        assert np.array_equal(rows.tokens[k], row)
        if rows.mask is not None:
            chosen[source].read_mask_into(window, mask)
            assert np.array_equal(rows.mask[k], mask)


@forms
def test_what_was_dropped_is_read_by_waiting(tmp_path, native):
    source = make(tmp_path / "one", "int32", [4000, 5000])
    places = [(0, window) for window in range(source.num_windows)]
    for threads in (1, 4):
        drop(tmp_path)
        with reading([source], native, threads) as reader:
            tokens = read(reader, rows_of([source], places, "int32")).tokens
        assert np.array_equal(tokens, [source.read(window) for _, window in places])


@forms
def test_of_a_row_that_is_not_filled_nothing_is_believed(sources, native):
    chosen = [sources["uint8"]]  # is cast, so that no row can be filled at once
    with reading(chosen, native) as reader:
        rows = rows_of(chosen, [(0, 0), (0, 1)], "int32")
        highest = np.full(2, 9, np.uint64)
        missing = reader.read_cached(rows, reader.place(rows.source, rows.window), highest)
    assert missing.tolist() == [0, 1] and highest.tolist() == [0, 0]


@needs_library
def test_the_library_waits_too(tmp_path, monkeypatch):
    source = make(tmp_path / "one", "uint16", [200])
    places = [(0, 3), (0, 20), (0, 1)]
    with reading([source], True) as reader:
        expected = read(reader, rows_of([source], places, "uint16")).tokens
        waits, read_windows = [], reader._library.read_windows

        def watched(*arguments, wait):
            waits.append(wait)
            return read_windows(*arguments, wait=wait)

        monkeypatch.setattr(reader, "_library", SimpleNamespace(read_windows=watched))
        monkeypatch.setattr(reader, "read_cached", lambda rows, places, highest: np.arange(len(highest)))
        monkeypatch.setattr(LocalBlob, "read_into", lambda *_: pytest.fail("Python read a local file"))
        assert np.array_equal(read(reader, rows_of([source], places, "uint16")).tokens, expected)
    assert waits == [True]


@needs_library
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_the_first_row_outside_the_vocabulary_is_named_whoever_finds_it(tmp_path, order):
    # Two windows are wrong, in one source that is read straight and in one that is cast on the way.
    straight = make(tmp_path / "straight", "int32", [81], bad=(3 * S + 5, 6 * S + 2))
    cast = make(tmp_path / "cast", "uint16", [81], bad=(S + 1,))
    both = [straight, cast]
    places = [[(0, 3), (0, 6), (0, 0)][k] for k in order]
    messages = set()
    for native, cold in itertools.product((True, False), (True, False)):
        if cold:
            drop(tmp_path)
        with reading(both, native) as reader:
            messages.add(said(reader, rows_of(both, places, "int32")))
            kind, text = said(reader, rows_of(both, [(0, 0), (1, 1)], "int32"))
            assert kind is DataError and "Source cast" in text
            read(reader, rows_of(both, [(0, 0), (1, 0), (0, 9)], "int32"))
    ((kind, text),) = messages
    first = 3 * S + 5 if order.index(0) < order.index(1) else 6 * S + 2
    assert (
        kind is DataError
        and f"bytes {4 * first} to {4 * first + 4}" in text
        and f"found:    {VOCABULARY}" in text
    )


@forms
def test_a_negative_token_is_outside_the_vocabulary(tmp_path, native):
    with IndexedDatasetWriter(tmp_path / "one", "int32") as writer:
        writer.add_document(np.array([*range(12), -3, *range(12)]))
    for vocab_size in (VOCABULARY, None):
        source = Source.open("one", tmp_path / "one", S, vocab_size=vocab_size)
        with reading([source], native) as reader:
            if vocab_size is None:
                assert read(reader, rows_of([source], [(0, 1)], "int32")).tokens.min() == -3
            else:
                kind, text = said(reader, rows_of([source], [(0, 0), (0, 1)], "int32"))
                assert kind is DataError and "found:    -3" in text and "bytes 48 to 52" in text


@needs_library
def test_a_file_that_shrinks_is_the_same_error_whoever_reads(tmp_path):
    messages, file = set(), tmp_path / "one" / "part-1.bin"
    make(tmp_path / "one", "uint16", [200, 200])
    content = file.read_bytes()
    for native, threads in itertools.product((True, False), (1, 2)):
        file.write_bytes(content)
        source = Source.open("one", tmp_path / "one", S)
        with reading([source], native, threads) as reader:
            read(reader, rows_of([source], [(0, 0), (0, 30)], "uint16"))
            os.truncate(file, 101)
            # Byte 101 lies in the shard's window 6; all of window 5 is still there.
            first = int(source.window_ends[0]) + 6
            read(reader, rows_of([source], [(0, 0), (0, first - 1)], "uint16"))
            after = [(0, window) for window in range(first, source.num_windows)]
            messages.add(said(reader, rows_of([source], after[::-1], "uint16")))
    ((kind, text),) = messages
    assert kind is DataError
    for words in ("shorter than it was", "part-1.bin, bytes 96 to 114", "an end at byte 101"):
        assert words in text


@needs_library
def test_a_file_that_cannot_be_read_is_the_same_error_whoever_reads(tmp_path):
    source = make(tmp_path / "one", "uint16", [200])
    messages = set()
    for native in (True, False):
        with reading([source], native) as reader:
            read(reader, rows_of([source], [(0, 0)], "uint16"))
            (blob,) = reader._near.values()
            fd, blob.fd = blob.fd, 1 << 20  # which is open for nobody
            try:
                messages.add(said(reader, rows_of([source], [(0, 3), (0, 2)], "uint16")))
            finally:
                blob.fd = fd
    ((kind, text),) = messages
    assert kind is EnvironmentProblem
    assert "cannot be read" in text and f"bytes {2 * 2 * S} to" in text and "Bad file descriptor" in text


@forms
def test_windows_far_into_a_file(tmp_path, native, monkeypatch):
    source = make(tmp_path / "one", "int64", [S + 1])
    far = 24 << 30
    with reading([source], native) as reader:
        rows = rows_of([source], [(0, 0)], "int64")
        near = reader.place(rows.source, rows.window)
        read(reader, rows)
        with open(tmp_path / "one" / "part-0.bin", "r+b") as file:  # all that lies between is a hole
            file.seek(far)
            file.write(np.arange(S + 1).tobytes())
        monkeypatch.setattr(reader, "place", lambda source, window: near._replace(offset=near.offset + far))
        assert read(reader, rows).tokens[0].tolist() == list(range(S + 1))


@forms
def test_a_window_that_is_not_there_and_no_windows_at_all(sources, native):
    chosen = [sources["uint16"]]
    with reading(chosen, native) as reader:
        kind, text = said(reader, rows_of(chosen, [(0, 0), (0, 10_000)], "uint16"))
        assert kind is DataError and "no such window" in text
        read(reader, rows_of(chosen, [], "uint16"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_without_the_library_reads_the_same(tmp_path, workers, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")  # workers learn of it by their environment
    batches = batches_of(tmp_path, dtypes=("uint16", "int32"), mask=True)
    with NativeLoader(batches, workers=workers, prefetch_steps=2) as loader:
        for ns in (np.arange(30), np.arange(30, 37)):
            assert same(loader.take(ns), batches.read(ns))
    assert library() is None
