"""Merging gives the bytes that Megatron-Core's builder gives, or nothing."""

from __future__ import annotations

import errno
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import indexed
from megatron_davinci.data import merge as merging
from megatron_davinci.data.indexed import HEADER, MAGIC, VERSION, IndexedDataset
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.mask import mask_blocks
from megatron_davinci.data.merge import merge_datasets
from megatron_davinci.errors import DataError, EnvironmentProblem
from tests.cli.screen import davinci

# Datasets of documents of sequences; any of the three may be empty.
datasets = st.lists(
    st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3), max_size=6),
    min_size=1,
    max_size=4,
)


def write(prefix: Path, docs: list[list[list[int]]], dtype: object = "uint16", mask: bool = False) -> Path:
    with IndexedDatasetWriter(prefix, dtype, mask=mask) as writer:
        for doc in docs:
            tokens = [t for sequence in doc for t in sequence]
            # A token carries loss if it is odd, so that a shifted mask shows.
            loss = [t % 2 for t in tokens] if mask else None
            writer.add_document(tokens, [len(sequence) for sequence in doc], loss)
    return prefix


def patch(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(bytes(content))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a", [[[1, 2, 3]], [[4]]]), write(tmp_path / "b", [[[5], [6, 7]]])]


@pytest.fixture(scope="module")
def megatron():
    pytest.importorskip("torch")
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    with pytest.MonkeyPatch.context() as patch:
        # Its builder collects garbage after every dataset, which takes longer than all else here.
        patch.setattr(module.gc, "collect", lambda: 0)
        yield module


def merge_theirs(megatron, prefixes: list[Path], out: Path, dtype: type, multimodal: bool = False) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{out}.bin", dtype=dtype, multimodal=multimodal)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{out}.idx")


class TestAsMegatronCore:
    @given(docs=datasets, dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.float32]))
    @settings(max_examples=20)
    def test_byte_for_byte(self, tmp_path_factory, megatron, docs, dtype):
        folder = tmp_path_factory.mktemp("m")
        prefixes = [write(folder / f"part-{k}", some, dtype) for k, some in enumerate(docs)]
        merged = merge_datasets(prefixes, folder / "ours")
        merge_theirs(megatron, prefixes, folder / "theirs", dtype)
        for ending in (".bin", ".idx"):
            assert (folder / f"ours{ending}").read_bytes() == (folder / f"theirs{ending}").read_bytes()
        every = [sequence for some in docs for doc in some for sequence in doc]
        assert [sequence.tolist() for sequence in IndexedDataset(folder / "ours")] == every
        assert (merged.tokens, merged.sequences) == (sum(map(len, every)), len(every))
        assert (merged.documents, merged.has_mask) == (sum(map(len, docs)), False)
        assert merged.bin_bytes == (folder / "ours.bin").stat().st_size

    def test_in_blocks_smaller_than_any_index(self, tmp_path, megatron, monkeypatch):
        docs = [[[t] * (t % 3) for t in range(1, 8)] for _ in range(5)]
        prefixes = [write(tmp_path / f"part-{k}", docs) for k in range(3)]
        monkeypatch.setattr(merging, "_BLOCK", 4)
        monkeypatch.setattr(merging, "_COPY", 16)
        steps: list[int] = []
        merge_datasets(prefixes, tmp_path / "ours", progress=steps.append)
        merge_theirs(megatron, prefixes, tmp_path / "theirs", np.uint16)
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
        assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
        assert steps == sorted(steps) and steps[-1] == (tmp_path / "ours.bin").stat().st_size

    def test_with_the_modes_of_multimodal_sequences(self, tmp_path, megatron):
        import torch

        for name, modes in (("a", [0, 1]), ("b", [1, 0])):
            builder = megatron.IndexedDatasetBuilder(
                str(tmp_path / f"{name}.bin"), dtype=np.int32, multimodal=True
            )
            builder.add_document(torch.tensor([1, 2, 3]), [2, 1], modes)
            builder.finalize(str(tmp_path / f"{name}.idx"))
        prefixes = [tmp_path / "a", tmp_path / "b"]
        merge_datasets(prefixes, tmp_path / "ours")
        merge_theirs(megatron, prefixes, tmp_path / "theirs", np.int32, multimodal=True)
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
        assert megatron.IndexedDataset(str(tmp_path / "ours"), multimodal=True)[2][1] == 1
        # An empty dataset lacks no mode; one with sequences does.
        write(tmp_path / "empty", [], np.int32)
        merge_datasets([*prefixes, tmp_path / "empty"], tmp_path / "more")
        write(tmp_path / "plain", [[[1]]], np.int32)
        with pytest.raises(DataError, match=r"(?s)have modes.*plain has not \(2 of 3 have\)"):
            merge_datasets([*prefixes, tmp_path / "plain"], tmp_path / "none")
        assert list(tmp_path.glob("*none*")) == []


def test_memory_does_not_grow_with_the_index(tmp_path, monkeypatch):
    # 200,000 one-token documents: 4 MB of index for each input, in blocks of some kilobytes.
    count = 200_000
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(count))
        with open(tmp_path / f"{name}.idx", "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, 1, count, count + 1))
            file.write(np.ones(count, "<i4").tobytes())
            file.write(np.arange(count, dtype="<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
    monkeypatch.setattr(merging, "_BLOCK", 1000)
    monkeypatch.setattr(indexed, "_BLOCK", 1000)
    tracemalloc.start()
    try:
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(IndexedDataset(tmp_path / "out")) == 2 * count
    assert peak < 1 << 20


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_where_the_kernel_does_not_copy_the_bytes_are_the_same(tmp_path, pair, monkeypatch, refused):
    def refuse(*_: int) -> int:
        if refused is None:
            return 0
        raise OSError(refused, "no")

    merge_datasets(pair, tmp_path / "one")
    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(merging, "_READ", 3)
    merge_datasets(pair, tmp_path / "other")
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "other.bin").read_bytes()


def test_holes_between_tokens_are_zeros(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, [[[0] * (1 << 17)]], "int32")
        os.truncate(tmp_path / f"{name}.bin", 0)
        os.truncate(tmp_path / f"{name}.bin", 1 << 19)
        patched = {3: 7, 1 << 16: 8} if name == "a" else {(1 << 17) - 9: 9}
        with open(tmp_path / f"{name}.bin", "r+b") as file:
            for token, value in patched.items():
                file.seek(4 * token)
                file.write(struct.pack("<i", value))
    # Once with a hole at the end of the last, and once with data there.
    for names, expected in (
        ("ab", {3: 7, 1 << 16: 8, (1 << 18) - 9: 9}),
        ("ba", {(1 << 17) - 9: 9, (1 << 17) + 3: 7, (1 << 17) + (1 << 16): 8}),
    ):
        merge_datasets([tmp_path / name for name in names], tmp_path / names)
        taken = (tmp_path / f"{names}.bin").stat().st_blocks * 512  # before it is mapped, which fills a tmpfs
        tokens = IndexedDataset(tmp_path / names).tokens(0, 1 << 18)
        assert {int(at): int(tokens[at]) for at in np.flatnonzero(tokens)} == expected
        assert taken < 1 << 17  # of 2^20 bytes


class TestMasks:
    @given(docs=datasets)
    @settings(max_examples=20)
    def test_are_merged_with_their_tokens(self, tmp_path_factory, docs):
        folder = tmp_path_factory.mktemp("m")
        prefixes = [write(folder / f"part-{k}", some, mask=True) for k, some in enumerate(docs)]
        merged = merge_datasets(prefixes, folder / "out")
        assert merged.has_mask
        tokens = IndexedDataset(folder / "out").tokens(0, merged.tokens)
        mask = [flag for block in mask_blocks(folder / "out", merged.tokens) for flag in block]
        assert mask == (tokens % 2).tolist()

    def test_that_only_some_have_are_refused(self, tmp_path, pair):
        write(tmp_path / "c", [[[8]]], mask=True)
        before = files(tmp_path)
        with pytest.raises(DataError) as caught:
            merge_datasets([*pair, tmp_path / "c"], tmp_path / "out")
        assert "Only some of the datasets have a mask." in str(caught.value)
        assert "c has a mask, a has not (1 of 3 have)" in str(caught.value)
        assert files(tmp_path) == before

    @pytest.mark.parametrize("offset, raw", [(0, b"X"), (16, b"\x02"), (32, b"\xff")])
    def test_that_are_damaged_are_refused(self, tmp_path, offset, raw):
        prefixes = [write(tmp_path / name, [[[1, 2, 3]]], mask=True) for name in ("a", "b")]
        patch(tmp_path / "b.mask", offset, raw)
        before = files(tmp_path)
        with pytest.raises(DataError, match=r"b\.mask, bytes"):
            merge_datasets(prefixes, tmp_path / "out")
        assert files(tmp_path) == before


class TestRefusals:
    """Through the command: what it says, and that nothing is left behind."""

    def refused(self, folder: Path, out: Path, *prefixes: Path) -> str:
        before = files(folder)
        text = davinci("data", "merge", out, *prefixes).refusal()
        assert files(folder) == before
        return text

    @pytest.mark.parametrize("out", ["", ".", "/", "s3://bucket/out"])
    def test_a_result_that_is_no_local_path(self, tmp_path, pair, monkeypatch, out):
        monkeypatch.chdir(tmp_path)
        self.refused(tmp_path, out, *pair)

    def test_two_dtypes(self, tmp_path, pair):
        write(tmp_path / "wide", [[[70000]]], "int32")
        text = self.refused(tmp_path, tmp_path / "out", *pair, tmp_path / "wide")
        assert "different dtypes" in text
        assert f"{tmp_path / 'a'}.idx, bytes 17 to 18" in text
        assert f"{tmp_path / 'wide'}.idx, bytes 17 to 18" in text
        assert "uint16 in the first, int32 in the second" in text

    @pytest.mark.parametrize(
        "offset, raw, says",
        [
            (0, b"X", ("not a Megatron index", "bytes 0 to 9", "MMIDIDX")),
            (9, b"\x02", ("unknown version", "bytes 9 to 17", "found:    2", "expected: 1")),
            (17, b"\x09", ("unknown dtype code", "bytes 17 to 18", "found:    9", "expected: 1 to 8")),
            (34, b"\x07", ("does not begin where", "b.idx, bytes", "byte offset 2", "byte offset 14")),
        ],
    )
    def test_a_damaged_index(self, tmp_path, pair, offset, raw, says):
        patch(tmp_path / "b.idx", offset, raw)
        text = self.refused(tmp_path, tmp_path / "out", *pair)
        assert "b.idx" in text
        for words in says:
            assert words in text

    @pytest.mark.parametrize("change", [-2, -1, 1, 2])
    def test_a_token_file_that_was_cut_or_grew(self, tmp_path, pair, change):
        os.truncate(tmp_path / "b.bin", 6 + change)
        text = self.refused(tmp_path, tmp_path / "out", *pair)
        assert "b.bin" in text and f"{6 + change} bytes" in text and "expected:" in text

    def test_the_index_of_another_token_file(self, tmp_path, pair):
        (tmp_path / "b.idx").write_bytes((tmp_path / "a.idx").read_bytes())
        text = self.refused(tmp_path, tmp_path / "out", *pair)
        assert "b.bin" in text and "found:    6 bytes" in text and "8 bytes, the sum of the lengths" in text

    def test_a_dataset_that_is_not_there(self, tmp_path, pair):
        assert "c.idx" in self.refused(tmp_path, tmp_path / "out", *pair, tmp_path / "c")

    @pytest.mark.parametrize("taken", ["a", "b"])
    def test_a_place_that_is_taken(self, tmp_path, pair, taken):
        text = self.refused(tmp_path, tmp_path / taken, *pair)
        assert "there already" in text and f"{taken}.idx" in text

    def test_nothing_to_merge(self, tmp_path):
        with pytest.raises(DataError, match="nothing to merge"):
            merge_datasets([], tmp_path / "out")
        assert "usage:" in davinci("data", "merge", tmp_path / "out").refusal()
        assert list(tmp_path.iterdir()) == []


class TestFailures:
    def test_a_full_disk_leaves_nothing(self, tmp_path, pair, monkeypatch):
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        before = files(tmp_path)
        for call in ("copy_file_range", "fsync", "replace"):
            with monkeypatch.context() as patched:
                patched.setattr(os, call, full)
                with pytest.raises(EnvironmentProblem, match="disk is full: merging datasets failed"):
                    merge_datasets(pair, tmp_path / "out")
            assert files(tmp_path) == before

    def test_ctrl_c_leaves_nothing(self, tmp_path, pair):
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        before = files(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            merge_datasets(pair, tmp_path / "out", progress=interrupt)
        assert files(tmp_path) == before

    @pytest.mark.parametrize("cut", ["b.bin", "b.idx"])
    def test_an_input_that_is_cut_meanwhile(self, tmp_path, pair, cut):
        def shorten(_: int) -> None:
            os.truncate(tmp_path / cut, 4)

        names = set(files(tmp_path))
        with pytest.raises(DataError, match=rf"(?s)changed while it was merged.*{cut}"):
            merge_datasets(pair, tmp_path / "out", progress=shorten)
        assert set(files(tmp_path)) == names


def test_the_command_says_what_came_of_it(tmp_path, pair):
    screen = davinci("data", "merge", tmp_path / "deep" / "out", *pair)
    assert (screen.code, screen.err) == (0, "")
    assert "2 datasets, 3 documents, 7 tokens" in screen.out
    assert IndexedDataset(tmp_path / "deep" / "out").tokens(0, 7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out.bin", "out.idx"]
