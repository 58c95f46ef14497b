"""Integers out of memory: in their order, whatever lies in the file, and none once the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data import spool
from megatron_davinci.data.indexed import read_header
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.spool import Spool
from megatron_davinci.errors import EnvironmentProblem


@given(
    st.sampled_from("iq"), st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9)), st.integers(1, 9)
)
def test_what_was_put_in_comes_out_in_its_order_and_again(
    tmp_path_factory: pytest.TempPathFactory, typecode: str, given_: list[list[int]], block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_BLOCK", block)
        kept = Spool(typecode, tmp_path_factory.getbasetemp())
        for values in given_:
            kept.extend(values)
        for _ in range(2):
            blocks = list(kept.blocks())
            assert all(0 < len(one) <= block and one.dtype == np.dtype(typecode) for one in blocks)
            assert [n for one in blocks for n in one.tolist()] == [n for values in given_ for n in values]
        kept.close()
    assert len(kept) == sum(map(len, given_))


def test_an_index_of_many_blocks_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([3, 0, 1, 2, 0, 5], np.int64)

    def write(name: str) -> bytes:
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(7):
                writer.add_documents(np.arange(11, dtype=np.uint16), lengths)
                writer.add_document(np.arange(4, dtype=np.uint16), [1, 3])
        return (tmp_path / f"{name}.idx").read_bytes()

    whole = write("whole")
    monkeypatch.setattr(spool, "_BLOCK", 5)
    assert write("parted") == whole
    assert read_header(tmp_path / "parted").document_bounds == 7 * 7 + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "parted.bin",
        "parted.idx",
        "whole.bin",
        "whole.idx",
    ]


def test_a_full_disk_under_the_index_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(spool, "_BLOCK", 5)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **how: Full())
    with IndexedDatasetWriter(tmp_path / "kept", np.uint16) as writer:
        writer.add_document([1, 2])

    def write() -> None:
        with IndexedDatasetWriter(tmp_path / "shard", np.uint16) as writer:
            for _ in range(9):
                writer.add_document([1, 2])

    with pytest.raises(EnvironmentProblem, match="disk"):
        write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.bin", "kept.idx"]
