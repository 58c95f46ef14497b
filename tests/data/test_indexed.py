"""Indexed datasets: what is written is read, by us and by Megatron-Core; what is damaged does not open."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.indexed import IndexedDataset, dtype_for_vocab
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.merge import merge_datasets
from megatron_davinci.errors import DataError, EnvironmentProblem

INTEGERS = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]

# A document is a list of sequences; no sequence at all and empty sequences are both legal in the format.
documents = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), max_size=3), max_size=8)


def write(prefix: Path, docs: list[list[list[int]]], dtype: object = np.int32) -> IndexedDatasetWriter:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for doc in docs:
            writer.add_document(
                [t for sequence in doc for t in sequence], [len(sequence) for sequence in doc]
            )
    return writer


def write_and_raise(prefix: Path, **options: bool) -> None:
    with IndexedDatasetWriter(prefix, np.int32, **options) as writer:
        writer.add_document([9])
        raise RuntimeError


def write_document(prefix: Path, dtype: object, *arguments: object) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        writer.add_document(*arguments)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write(tmp_path / "a", [[[1, 2, 3]], [[4, 5], [6]], [[7]]])
    return tmp_path / "a"


def patch(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(bytes(content))


class TestWhatIsWrittenIsRead:
    @given(docs=documents, dtype=st.sampled_from(INTEGERS))
    @settings(max_examples=60, deadline=None)
    def test_sequences_documents_and_counts(self, tmp_path_factory, docs, dtype):
        prefix = tmp_path_factory.mktemp("d") / "part.v1"  # a dot in the name is no ending
        written = write(prefix, docs, dtype).written
        dataset = IndexedDataset(prefix)
        flat = [sequence for doc in docs for sequence in doc]
        assert [list(sequence) for sequence in dataset] == flat
        assert len(dataset) == len(flat) == written.sequences
        assert dataset.dtype == np.dtype(dtype)
        assert list(dataset.sequence_lengths) == [len(sequence) for sequence in flat]
        assert np.diff(dataset.document_indices).tolist() == [len(doc) for doc in docs]
        assert dataset.num_tokens == written.tokens == sum(map(len, flat))
        content = prefix.with_name("part.v1.bin").read_bytes()
        assert written.bin_bytes == len(content)
        assert written.bin_sha256 == hashlib.sha256(content).hexdigest()

    def test_flat_reads_cross_sequences_and_copy_nothing(self, pair):
        dataset = IndexedDataset(pair)
        tokens = dataset.tokens(2, 4)
        assert tokens.tolist() == [3, 4, 5, 6]
        assert not tokens.flags.owndata and not tokens.flags.writeable

    def test_a_read_past_the_end_is_an_error_not_a_short_array(self, pair):
        dataset = IndexedDataset(pair)
        for start, count in ((5, 3), (-1, 2), (8, 0)):
            with pytest.raises(DataError, match="past the end"):
                dataset.tokens(start, count)
        assert dataset[-1].tolist() == [7]
        with pytest.raises(IndexError):
            dataset[4]


@pytest.fixture(scope="module")
def megatron():
    pytest.importorskip("torch")
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write_theirs(megatron, prefix: Path, docs: list[list[list[int]]], dtype: type) -> None:
    import torch

    kind = torch.float64 if np.dtype(dtype).kind == "f" else torch.int64
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for doc in docs:
        builder.add_document(
            torch.tensor([t for sequence in doc for t in sequence], dtype=kind),
            [len(sequence) for sequence in doc],
        )
    builder.finalize(f"{prefix}.idx")


def same_bytes(one: Path, other: Path) -> bool:
    return all(Path(f"{one}{e}").read_bytes() == Path(f"{other}{e}").read_bytes() for e in (".bin", ".idx"))


# Documents of one sequence and of several, of none at all ([]), and of empty ones ([0] long).
DOCUMENTS = [[[1, 2, 3]], [], [[4], [], [5, 6]], [[]], [[0]], [[127] * 50], [[], []]]


class TestMegatronCore:
    @pytest.mark.parametrize("dtype", [*INTEGERS, np.float32, np.float64])
    def test_both_write_the_same_bytes_and_read_each_other(self, tmp_path, megatron, dtype):
        docs = DOCUMENTS
        write(tmp_path / "ours", docs, dtype)
        write_theirs(megatron, tmp_path / "theirs", docs, dtype)
        assert same_bytes(tmp_path / "ours", tmp_path / "theirs")

        theirs_of_ours = megatron.IndexedDataset(str(tmp_path / "ours"))
        ours_of_theirs = IndexedDataset(tmp_path / "theirs")
        assert ours_of_theirs.dtype == dtype and theirs_of_ours.index.dtype == dtype
        sequences = [sequence for doc in docs for sequence in doc]
        assert [theirs_of_ours[i].tolist() for i in range(len(theirs_of_ours))] == sequences
        assert [sequence.tolist() for sequence in ours_of_theirs] == sequences
        assert theirs_of_ours.document_indices.tolist() == ours_of_theirs.document_indices.tolist()
        assert theirs_of_ours.sequence_lengths.tolist() == ours_of_theirs.sequence_lengths.tolist()

    @given(docs=documents, dtype=st.sampled_from([*INTEGERS, np.float32, np.float64]))
    @settings(max_examples=40)
    def test_whatever_the_documents(self, tmp_path_factory, megatron, docs, dtype):
        folder = tmp_path_factory.mktemp("d")
        write(folder / "ours", docs, dtype)
        write_theirs(megatron, folder / "theirs", docs, dtype)
        assert same_bytes(folder / "ours", folder / "theirs")

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_floats_are_rounded_alike_and_may_be_anything(self, tmp_path, megatron, dtype):
        docs = [[[0.1, -1e-30, float("nan"), float("inf"), float("-inf")]], [[1 / 3, -0.0]]]
        write(tmp_path / "ours", docs, dtype)
        write_theirs(megatron, tmp_path / "theirs", docs, dtype)
        assert same_bytes(tmp_path / "ours", tmp_path / "theirs")
        assert IndexedDataset(tmp_path / "theirs")[1].tolist() == np.array([1 / 3, -0.0], dtype).tolist()

    def test_beyond_2_to_the_31_tokens(self, tmp_path, megatron):
        # Sparse files of 5 sequences of 2^29 tokens: offsets pass 2^31 tokens and 2^32 bytes. Merging two of
        # them goes through what writes every index of ours.
        for name, sequences in (("one", 3), ("two", 2), ("theirs", 5)):
            (tmp_path / f"{name}.bin").touch()
            os.truncate(tmp_path / f"{name}.bin", sequences << 30)
            with megatron._IndexWriter(str(tmp_path / f"{name}.idx"), np.uint16) as writer:
                writer.write([1 << 29] * sequences, None, [0, 1, sequences])
        for name, offset in (("two", (1 << 30) + 14), ("theirs", (4 << 30) + 14)):
            with open(tmp_path / f"{name}.bin", "r+b") as file:
                file.seek(offset)
                file.write(b"\x39\x30")
        merged = merge_datasets([tmp_path / "one", tmp_path / "two"], tmp_path / "ours")
        assert merged.tokens == 5 << 29 > 1 << 31

        with megatron._IndexWriter(str(tmp_path / "theirs.idx"), np.uint16) as writer:
            writer.write([1 << 29] * 5, None, [0, 1, 3, 4, 5])
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
        sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("ours", "theirs")]
        assert sizes == [5 << 30, 5 << 30]
        ours, theirs = IndexedDataset(tmp_path / "theirs"), megatron.IndexedDataset(str(tmp_path / "ours"))
        assert ours.num_tokens == 5 << 29
        assert ours[4][7] == ours.tokens((4 << 29) + 7, 1)[0] == theirs.get(4, 7, 1)[0] == 12345
        assert ours[4][8] == theirs.get(4, 8, 1)[0] == 0

    def test_a_multimodal_file_opens(self, tmp_path, megatron):
        import torch

        builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32, multimodal=True)
        builder.add_document(torch.tensor([1, 2, 3]), [2, 1], [0, 1])
        builder.finalize(str(tmp_path / "m.idx"))
        assert [s.tolist() for s in IndexedDataset(tmp_path / "m")] == [[1, 2], [3]]


class TestDamageDoesNotOpen:
    # Offsets for 4 sequences and 3 documents: lengths at 34, pointers at 50, bounds at 82, end at 114.
    @pytest.mark.parametrize(
        "offset, raw, says",
        [
            (0, b"X", "bytes 0 to 9"),
            (9, struct.pack("<Q", 2), "bytes 9 to 17"),
            (17, b"\x09", "bytes 17 to 18"),
            (17, b"\x00", "bytes 17 to 18"),
            (18, struct.pack("<Q", 5), "bytes 18 to 34"),
            (18, struct.pack("<Q", 2**64 - 1), "bytes 18 to 34"),
            (34, struct.pack("<i", 2), "Sequence 1 does not begin"),
            (46, struct.pack("<i", 2), "do not belong together"),
            (38, struct.pack("<i", -2), "bytes 38 to 42"),
            (50, struct.pack("<q", 4), "bytes 50 to 58"),
            (66, struct.pack("<q", -20), "bytes 66 to 74"),
            (82, struct.pack("<q", 1), "first document bound"),
            (98, struct.pack("<q", 0), "Document 1 ends before"),
            (106, struct.pack("<q", 3), "bytes 106 to 114"),
        ],
    )
    def test_in_the_index(self, pair, offset, raw, says):
        IndexedDataset(pair)
        patch(pair.with_suffix(".idx"), offset, raw)
        with pytest.raises(DataError, match=says) as caught:
            IndexedDataset(pair)
        assert "a.idx" in str(caught.value) and caught.value.expected is not None

    @pytest.mark.parametrize("ending", [".bin", ".idx"])
    @pytest.mark.parametrize("change", [-4, -1, +1, +8])
    def test_in_a_size(self, pair, ending, change):
        path = pair.with_suffix(ending)
        os.truncate(path, path.stat().st_size + change)
        with pytest.raises(DataError):
            IndexedDataset(pair)

    @pytest.mark.parametrize("cut", [0, 8, 33])
    def test_in_a_header(self, pair, cut):
        os.truncate(pair.with_suffix(".idx"), cut)
        with pytest.raises(DataError, match="bytes 0 to"):
            IndexedDataset(pair)

    @pytest.mark.parametrize("ending", [".bin", ".idx"])
    def test_in_a_pair(self, pair, ending):
        pair.with_suffix(ending).unlink()
        with pytest.raises(DataError, match="lacks one of its two files"):
            IndexedDataset(pair)

    def test_the_index_of_another_token_file(self, pair, tmp_path):
        write(tmp_path / "b", [[[1, 2, 3]], [[4, 5], [6]], [[7, 8]]])
        os.replace(tmp_path / "b.idx", tmp_path / "a.idx")
        with pytest.raises(DataError, match="do not belong together"):
            IndexedDataset(pair)


class TestWritingIsAllOrNothing:
    def test_a_block_that_raises_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError):
            write_and_raise(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_what_was_written_is_told_when_it_is_all_there(self, tmp_path):
        writer = IndexedDatasetWriter(tmp_path / "a", "int32")
        with writer, pytest.raises(DataError, match="when its writer's block has ended"):
            _ = writer.written

    def test_an_existing_dataset_is_kept_unless_it_may_be_replaced(self, pair):
        with pytest.raises(DataError, match="there already"):
            IndexedDatasetWriter(pair, "int32")
        with pytest.raises(RuntimeError):
            write_and_raise(pair, overwrite=True)
        assert IndexedDataset(pair).num_tokens == 7
        with IndexedDatasetWriter(pair, "int32", overwrite=True) as writer:
            writer.add_document([9])
        assert IndexedDataset(pair)[0].tolist() == [9]
        assert sorted(p.name for p in pair.parent.iterdir()) == ["a.bin", "a.idx"]

    @pytest.mark.parametrize("value", [-1, 65536, 2**63, 2**70])
    def test_a_token_that_does_not_fit_is_refused_and_the_rest_stays_good(self, tmp_path, value):
        with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
            writer.add_document([1, 65535])
            with pytest.raises(DataError, match="document 1"):
                writer.add_document([5, value])
            writer.add_document(np.array([2], np.uint64))
        assert [s.tolist() for s in IndexedDataset(tmp_path / "a")] == [[1, 65535], [2]]

    @pytest.mark.parametrize("bad", [[1.5], [[1, 2]], np.array([True]), ["a"]])
    def test_what_is_no_list_of_ids_is_refused(self, tmp_path, bad):
        with (
            pytest.raises(DataError, match="not a list of token ids"),
            IndexedDatasetWriter(tmp_path / "a", "i4") as w,
        ):
            w.add_document(bad)

    @pytest.mark.parametrize("lengths", [[1], [2, 1], [3, -1], [2**31]])
    def test_lengths_that_do_not_add_up_are_refused(self, tmp_path, lengths):
        with pytest.raises(DataError, match="lengths"):
            write_document(tmp_path / "a", "i4", [1, 2], lengths)

    @pytest.mark.parametrize("dtype", ["float16", "uint32", "uint64", "bool", "complex64"])
    def test_only_dtypes_of_the_format(self, tmp_path, dtype):
        with pytest.raises(DataError, match=rf"(?s){dtype}.*uint8, int8, int16, int32"):
            IndexedDatasetWriter(tmp_path / "a", dtype)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "values, says",
        [
            ([1.0, 1e39], "found:    1e+39"),
            ([1, (1 << 24) + 1], "at most 16,777,216"),
            ([1, -(1 << 30)], "at most 16,777,216"),
            (["a", "b"], "numbers of shape"),
        ],
    )
    def test_a_value_that_a_float_does_not_hold_is_refused(self, tmp_path, values, says):
        with IndexedDatasetWriter(tmp_path / "a", "float32") as writer:
            writer.add_document([1 << 24, 0])
            with pytest.raises(DataError, match=r"document 1") as caught:
                writer.add_document(values)
        assert says in str(caught.value)
        assert IndexedDataset(tmp_path / "a")[0].tolist() == [1 << 24, 0]

    @pytest.fixture
    def small_files_only(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))

        def lift() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        yield lift
        lift()

    @pytest.mark.usefixtures("small_files_only")
    def test_a_write_that_the_system_refuses_is_reported_and_leaves_nothing(self, tmp_path):
        with pytest.raises(EnvironmentProblem, match="writing tokens failed") as caught:
            write_document(tmp_path / "a", "int64", np.zeros(1 << 20, np.int64))
        assert "File too large" in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_caller_that_goes_on_after_a_failed_write_gets_no_dataset(self, tmp_path, small_files_only):
        def go_on() -> None:
            with IndexedDatasetWriter(tmp_path / "a", "int64") as writer:
                with suppress(EnvironmentProblem):
                    writer.add_document(np.zeros(1 << 20, np.int64))
                small_files_only()
                writer.add_document([1])

        with pytest.raises(EnvironmentProblem, match="writing tokens failed"):
            go_on()
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_is_full_at_the_end_leaves_nothing(self, tmp_path, monkeypatch):
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            write_document(tmp_path / "a", "i4", [1])
        assert list(tmp_path.iterdir()) == []


def test_the_narrowest_dtype_for_a_vocabulary():
    assert [dtype_for_vocab(n).name for n in (0, 65535, 65536, 2**31 - 1)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]
    for impossible in (-1, 2**31):
        with pytest.raises(DataError):
            dtype_for_vocab(impossible)
