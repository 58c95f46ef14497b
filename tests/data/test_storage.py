"""Local files by range: whole, or an error that names the file and the bytes."""

from __future__ import annotations

import hashlib
import os
import threading

import numpy as np
import pytest

from megatron_davinci.data.storage import digest_of, open_blob, read_all, read_cached, read_range, size_of
from megatron_davinci.errors import DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.bin"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    return path


def test_a_range_is_the_bytes_of_the_file(file):
    content, blob = file.read_bytes(), open_blob(file)
    assert (blob.place, blob.size) == (file, 100_000)
    for offset, count in ((0, 10), (5, 0), (99_990, 10), (1234, 50_000)):
        buffer = bytearray(count)
        blob.read_into(offset, memoryview(buffer))
        assert buffer == content[offset : offset + count]
    blob.will_need(0, 100_000)
    assert read_all(file) == content
    assert read_range(file, 17, 4) == content[17:21]
    assert digest_of(file) == hashlib.sha256(content).hexdigest()
    assert size_of(file) == 100_000


def test_what_is_not_there(tmp_path):
    assert size_of(tmp_path / "none") is None
    assert size_of(tmp_path) is None, "a folder is no file"
    with pytest.raises(DataError, match=r"(?s)not there.*none"):
        open_blob(tmp_path / "none")


def test_a_file_that_shrinks_under_a_reader_is_an_error_and_not_a_signal(file):
    blob = open_blob(file)
    os.truncate(file, 60_000)
    buffer = bytearray(100)
    blob.read_into(59_900, memoryview(buffer))
    with pytest.raises(DataError) as caught:
        blob.read_into(59_950, memoryview(buffer))
    assert "some.bin, bytes 59,950 to 60,050" in str(caught.value)
    assert "an end at byte 60,000" in str(caught.value) and "100,000 bytes" in str(caught.value)


def test_reads_that_the_kernel_cuts_short_go_on(file, monkeypatch):
    whole = os.preadv

    def short(fd, buffers, offset):
        return whole(fd, [buffers[0][:7]], offset)

    blob = open_blob(file)
    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(100)
    blob.read_into(50, memoryview(buffer))
    assert buffer == file.read_bytes()[50:150]


def test_closing_does_not_disturb_who_reads(file):
    blob, stop, wrong = open_blob(file), threading.Event(), []
    content = file.read_bytes()

    def read():
        buffer = bytearray(1000)
        while not stop.is_set():
            blob.read_into(500, memoryview(buffer))
            if buffer != content[500:1500]:
                wrong.append(bytes(buffer))

    thread = threading.Thread(target=read)
    thread.start()
    blob.close()
    others = [open_blob(file) for _ in range(50)]
    stop.set()
    thread.join()
    assert not wrong and len(others) == 50


def test_descriptors_go_with_the_last_reference(file):
    before = len(os.listdir("/proc/self/fd"))
    blobs = [open_blob(file) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del blobs
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_cached_is_read_at_once_and_what_is_not_is_never_half_believed(file):
    content, blob = file.read_bytes(), open_blob(file)
    buffers = [bytearray(1000) for _ in range(4)]
    # A range past the end, and no file: read_into says what is wrong with them.
    fds, offsets = [blob.fd, blob.fd, blob.fd, -1], [500, 99_500, 7000, 0]
    missing = read_cached(fds, offsets, [memoryview(buffer) for buffer in buffers])
    assert {1, 3} <= set(missing) and missing == sorted(missing)
    for i in {0, 2} - set(missing):
        assert buffers[i] == content[offsets[i] : offsets[i] + 1000]
