"""A mask says which tokens carry loss, a bit a token; one that does not fit its tokens does not open."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.mask import (
    MaskWriter,
    byte_range,
    check_padding,
    mask_blocks,
    mask_bytes,
    mask_path,
    read_mask_header,
    unpack,
)
from megatron_davinci.errors import DataError, EnvironmentProblem

flags = st.lists(st.lists(st.integers(0, 1), max_size=40), max_size=12)


def write(prefix: Path, documents: list[list[int]]) -> IndexedDatasetWriter:
    with IndexedDatasetWriter(prefix, "uint16", mask=True) as writer:
        for loss in documents:
            writer.add_document(np.arange(len(loss)), loss=loss)
    return writer


def bits(prefix: Path, start: int, count: int) -> list[int]:
    """As a reader of windows does it: one range of the file, then its bits."""
    offset, nbytes = byte_range(start, count)
    raw = mask_path(prefix).read_bytes()[offset : offset + nbytes]
    assert len(raw) == nbytes
    row = np.full(count, 7, np.uint8)
    unpack(raw, start, count, row)
    return row.tolist()


@given(documents=flags, data=st.data())
@settings(max_examples=60)
def test_what_is_written_is_read_from_any_token_on(tmp_path_factory, documents, data):
    prefix = tmp_path_factory.mktemp("m") / "part.v1"
    written = write(prefix, documents).written
    every = [flag for loss in documents for flag in loss]
    read_mask_header(prefix, len(every))
    check_padding(prefix, len(every))
    start = data.draw(st.integers(0, len(every)))
    count = data.draw(st.integers(0, len(every) - start))
    assert bits(prefix, start, count) == every[start : start + count]
    assert [flag for block in mask_blocks(prefix, len(every)) for flag in block] == every
    content = prefix.with_name("part.v1.mask").read_bytes()
    assert len(content) == mask_bytes(len(every)) == 32 + -(-len(every) // 8)
    assert written.mask_sha256 == hashlib.sha256(content).hexdigest()


def test_the_bytes_are_the_formats():
    # Token 0 is the lowest bit: 1,0,0,0,0,0,0,1 and then 1,1.
    path = Path(os.devnull)
    assert mask_path(path.with_name("a.b")).name == "a.b.mask"
    assert byte_range(0, 8) == (32, 1) and byte_range(7, 2) == (32, 2) and byte_range(16, 1) == (34, 1)


def test_the_file_is_a_header_and_a_bit_a_token(tmp_path):
    write(tmp_path / "a", [[1, 0, 0, 0, 0, 0, 0, 1], [1, 1]])
    header = struct.pack("<8sQQQ", b"DVMASK\x00\x00", 1, 10, 0)
    assert (tmp_path / "a.mask").read_bytes() == header + bytes([0b10000001, 0b00000011])


def test_the_blocks_of_a_mask_may_be_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_davinci.data.mask._BLOCK", 24)
    loss = np.random.default_rng(0).integers(0, 2, 101)
    write(tmp_path / "a", [loss.tolist()])
    blocks = list(mask_blocks(tmp_path / "a", 101))
    assert [len(block) for block in blocks] == [24, 24, 24, 24, 5]
    assert np.concatenate(blocks).tolist() == loss.tolist()


class TestWriting:
    def test_without_flags_every_token_of_a_document_counts(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "a", "int32", mask=True) as writer:
            writer.add_document([5, 6, 7])
            writer.add_document([8, 9], loss=[False, True])
            writer.add_document([], loss=[])
        assert bits(tmp_path / "a", 0, 5) == [1, 1, 1, 0, 1]

    def test_without_a_mask_there_is_no_file_and_no_digest(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
            writer.add_document([5, 6, 7])
        assert writer.written.mask_sha256 is None
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]

    @pytest.mark.parametrize(
        "loss, says",
        [
            ([1, 1], "shape [2]"),
            ([1, 1, 1, 1], "shape [3]"),
            ([[1, 1, 1]], "shape [1, 3]"),
            ([0.5, 1.0, 1.0], "float64"),
            ([1, 2, 1], "document 1, token 1"),
            ([1, 1, -1], "document 1, token 2"),
            ([], "shape [0]"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused_and_the_rest_stays_good(self, tmp_path, loss, says):
        with IndexedDatasetWriter(tmp_path / "a", "int32", mask=True) as writer:
            writer.add_document([1, 2], loss=[0, 1])
            with pytest.raises(DataError, match="loss flag") as caught:
                writer.add_document([3, 4, 5], loss=loss)
            writer.add_document([6], loss=np.array([True]))
        assert says in str(caught.value)
        assert writer.written.tokens == 3
        assert bits(tmp_path / "a", 0, 3) == [0, 1, 1]

    def test_a_writer_without_a_mask_takes_no_flags(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
            with pytest.raises(DataError, match="mask=True"):
                writer.add_document([1], loss=[1])
            writer.add_document([1])

    def test_a_block_that_raises_leaves_nothing(self, tmp_path):
        def fail() -> None:
            with IndexedDatasetWriter(tmp_path / "a", "int32", mask=True) as writer:
                writer.add_document([1, 2, 3])
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("good", [0, 1, 2])
    def test_a_disk_that_is_full_at_the_end_leaves_nothing(self, tmp_path, monkeypatch, good):
        # The .bin, the .mask and the .idx are each flushed to the disk; the one after `good` of them fails.
        calls = iter(range(99))

        def full(_: int) -> None:
            if next(calls) >= good:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            write(tmp_path / "a", [[1, 0]])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("ending", [".mask", ".idx"])
    def test_a_name_that_cannot_be_given_leaves_nothing(self, tmp_path, monkeypatch, ending):
        replace = os.replace

        def refuse(source: Path, target: Path) -> None:
            if target.name.endswith(ending):
                raise OSError(errno.EIO, "Input/output error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(EnvironmentProblem, match="Input/output error"):
            write(tmp_path / "a", [[1, 0]])
        assert list(tmp_path.iterdir()) == []

    def test_a_dataset_that_is_replaced_does_not_keep_the_old_mask(self, tmp_path):
        write(tmp_path / "a", [[1, 0]])
        with IndexedDatasetWriter(tmp_path / "a", "uint16", overwrite=True) as writer:
            writer.add_document([1, 2])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]

    def test_a_mask_that_lies_there_alone_is_not_taken_for_the_new_dataset_s(self, tmp_path):
        write(tmp_path / "a", [[1, 0]])
        (tmp_path / "a.bin").unlink()
        (tmp_path / "a.idx").unlink()
        with pytest.raises(DataError, match=r"(?s)there already.*a\.mask"):
            IndexedDatasetWriter(tmp_path / "a", "uint16")

    def test_a_mask_is_none_until_it_is_finished(self, tmp_path):
        writer = MaskWriter(tmp_path / "a.mask")
        writer.add(np.ones(9, np.uint8))
        writer.close()
        with pytest.raises(DataError, match="not a loss mask"):
            read_mask_header(tmp_path / "a", 9)


class TestDamageDoesNotOpen:
    @pytest.fixture
    def prefix(self, tmp_path):
        write(tmp_path / "a", [[1, 0, 1], [1, 1, 1, 1, 0], [1, 1, 1]])
        read_mask_header(tmp_path / "a", 11)
        return tmp_path / "a"

    @pytest.mark.parametrize(
        "offset, raw, where, found, expected",
        [
            (0, b"MMIDIDX\x00", "bytes 0 to 8", "MMIDIDX", "DVMASK"),
            (8, struct.pack("<Q", 2), "bytes 8 to 16", "2", "1"),
            (16, struct.pack("<Q", 12), "bytes 16 to 24", "12 tokens", "11 tokens, those of a.bin"),
            (24, b"\x01", "bytes 24 to 32", "x01", "x00"),
        ],
    )
    def test_in_the_header(self, prefix, offset, raw, where, found, expected):
        path = mask_path(prefix)
        content = bytearray(path.read_bytes())
        content[offset : offset + len(raw)] = raw
        path.write_bytes(bytes(content))
        with pytest.raises(DataError) as caught:
            read_mask_header(prefix, 11)
        assert f"{path}, {where}" in str(caught.value.where)
        assert found in str(caught.value.found) and expected in str(caught.value.expected)

    @pytest.mark.parametrize("change", [-1, 1, 100])
    def test_in_the_size(self, prefix, change):
        os.truncate(mask_path(prefix), 34 + change)
        with pytest.raises(DataError, match="wrong size") as caught:
            read_mask_header(prefix, 11)
        assert f"{34 + change} bytes" in str(caught.value) and "34 bytes for 11 tokens" in str(caught.value)

    @pytest.mark.parametrize("size", [0, 7, 8, 31])
    def test_in_a_header_that_was_cut(self, prefix, size):
        os.truncate(mask_path(prefix), size)
        with pytest.raises(DataError, match=r"a\.mask, bytes 0 to"):
            read_mask_header(prefix, 11)

    def test_the_mask_of_another_token_file(self, prefix):
        with pytest.raises(DataError, match="another number of tokens") as caught:
            read_mask_header(prefix, 10)
        assert "11 tokens" in str(caught.value) and "10 tokens, those of a.bin" in str(caught.value)

    def test_after_the_last_token(self, prefix):
        check_padding(prefix, 11)
        path = mask_path(prefix)
        content = bytearray(path.read_bytes())
        content[-1] |= 0b00001000
        path.write_bytes(bytes(content))
        with pytest.raises(DataError, match=r"bytes 33 to 34(?s:.)*0b00001111"):
            check_padding(prefix, 11)

    def test_that_is_not_there(self, prefix):
        mask_path(prefix).unlink()
        with pytest.raises(DataError, match=r"(?s)lacks its mask.*a\.mask"):
            read_mask_header(prefix, 11)
