"""A source numbers its windows across shards, opens what it needs, and checks what it reads."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import open_shards as open_shards_module
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError


def make(folder: Path, sizes: list[int], dtype: str = "uint16", vocab_size: int = 1000) -> Path:
    """Shards of `sizes` tokens; token `j` of shard `k` is `100 * k + j % 100`."""
    shards = []
    for k, size in enumerate(sizes):
        with IndexedDatasetWriter(folder / f"part-{k}", dtype) as writer:
            writer.add_document(100 * k + np.arange(size) % 100)
        shards.append(Shard.of(f"part-{k}", writer.written))
    Manifest(
        name="s",
        domain="d",
        dtype=dtype,
        vocab_size=vocab_size,
        eod_id=None,
        tokenizer_sha256=None,
        shards=tuple(shards),
    ).save(folder)
    return folder


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), S=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_windows_are_the_contract(tmp_path_factory, sizes, S):
    folder = make(tmp_path_factory.mktemp("s"), sizes)
    expected = [(shard, i * S) for shard, size in enumerate(sizes) for i in range(max(0, (size - 1) // S))]
    if not expected:
        with pytest.raises(DataError, match="too small for one window"):
            Source.open("s", folder, S)
        return
    source = Source.open("s", folder, S)
    assert source.num_windows == len(expected)
    assert source.num_tokens == sum(sizes)
    assert [source.locate(window) for window in range(source.num_windows)] == expected
    for window, (shard, offset) in enumerate(expected):
        assert source.read(window).tolist() == [100 * shard + j for j in range(offset, offset + S + 1)]
    for window in (-1, len(expected)):
        with pytest.raises(DataError, match="no such window"):
            source.read(window)


def test_neighbours_share_one_token_so_that_no_label_is_lost(tmp_path):
    source = Source.open("s", make(tmp_path, [25]), 8)
    labels = np.concatenate([source.read(window)[1:] for window in range(source.num_windows)])
    assert labels.tolist() == list(range(1, 25))


def test_a_source_too_small_says_what_it_has_and_what_it_needs(tmp_path):
    with pytest.raises(DataError) as caught:
        Source.open("maths", make(tmp_path, [8, 5]), 8)
    assert "13 tokens in 2 shards, at most 8 in one" in str(caught.value)
    assert "9 tokens (sequence_length + 1)" in str(caught.value)
    empty = make(tmp_path / "empty", [])
    with pytest.raises(DataError, match="too small"):
        Source.open("maths", empty, 8)


@pytest.mark.parametrize("S", [0, -1])
def test_a_window_has_a_label(tmp_path, S):
    with pytest.raises(DataError, match="at least one label"):
        Source.open("maths", make(tmp_path, [8]), S)


def test_opening_touches_no_shard(tmp_path):
    make(tmp_path, [20, 20, 20])
    (tmp_path / "part-1.bin").unlink()
    source = Source.open("s", tmp_path, 8)
    assert source.read(0)[0] == 0 and source.read(4)[0] == 200
    with pytest.raises(DataError, match="lacks one of its two files"):
        source.read(2)


def test_many_shards_need_few_open_files(tmp_path, monkeypatch):
    source = Source.open("s", make(tmp_path, [9] * 9), 8)
    pool = open_shards_module.OpenShards()
    monkeypatch.setattr(pool, "limit", 2)
    monkeypatch.setattr(open_shards_module, "open_shards", pool)
    before = len(os.listdir("/proc/self/fd"))
    kept = source.read(0)
    for window in range(9):
        assert source.read(window)[0] == 100 * window
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2
    assert kept.tolist() == list(range(9)), "a window outlives its shard's place among the open ones"


class TestReadingInto:
    @pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
    def test_a_row_gets_the_window_whatever_its_dtype(self, tmp_path, dtype):
        source = Source.open("s", make(tmp_path, [20, 30, 5, 17]), 8, vocab_size=1000)
        rows = np.full((source.num_windows, 9), 999, dtype)
        for window in reversed(range(source.num_windows)):
            source.will_need(window)
            source.read_into(window, rows[window])
            assert rows[window].tolist() == source.read(window).tolist()

    def test_checks_the_vocabulary(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
            writer.add_document([0] * 12 + [150] + [0] * 17)
        source = Source.open("s", tmp_path / "x", 8, vocab_size=120)
        with pytest.raises(DataError, match=r"(?s)bytes 24 to 26.*150"):
            source.read_into(1, np.empty(9, np.uint16))

    def test_a_shard_that_shrinks_is_an_error_that_names_it(self, tmp_path):
        source = Source.open("s", make(tmp_path, [20]), 8)
        row = np.empty(9, np.uint16)
        source.read_into(0, row)
        os.truncate(tmp_path / "part-0.bin", 20)
        with pytest.raises(DataError, match=r"(?s)shorter.*part-0\.bin, bytes 16 to 34"):
            source.read_into(1, row)
        with pytest.raises(DataError, match=r"(?s)shorter.*part-0\.bin, bytes 16 to 34"):
            source.read(1)
        os.truncate(tmp_path / "part-0.bin", 10)
        with pytest.raises(DataError, match="an end at byte 10\n"):
            source.read(1)

    def test_in_another_process_it_opens_its_own_files(self, tmp_path):
        source = Source.open("s", make(tmp_path, [20, 20]), 8)
        source.read(3)
        sent = pickle.loads(pickle.dumps(source))
        assert len(pickle.dumps(source)) < 2000, "no shard travels"
        assert sent.read(3).tolist() == source.read(3).tolist()
        assert sent.fingerprint == source.fingerprint


class TestMask:
    def make(self, folder: Path) -> np.ndarray:
        """Two shards, and what each of their tokens carries: [tokens of both] uint8."""
        generator, loss, shards = np.random.default_rng(1), [], []
        for k, size in enumerate((37, 30)):
            flags = generator.integers(0, 2, size)
            with IndexedDatasetWriter(folder / f"part-{k}", "uint16", mask=True) as writer:
                writer.add_document(np.arange(size), loss=flags)
            shards.append(Shard.of(f"part-{k}", writer.written))
            loss.append(flags)
        fields = {
            "domain": "d",
            "dtype": "uint16",
            "vocab_size": 99,
            "eod_id": None,
            "tokenizer_sha256": None,
        }
        Manifest(name="s", shards=tuple(shards), **fields).save(folder)
        return np.concatenate(loss)

    def test_a_label_carries_loss_where_its_token_does(self, tmp_path):
        loss = self.make(tmp_path)
        source = Source.open("s", tmp_path, 5, verify_digests=True)
        assert source.has_mask
        row = np.empty(5, np.uint8)
        for window in range(source.num_windows):
            shard, first = source.locate(window)
            source.read_mask_into(window, row)
            labels = first + 1 + 37 * shard + np.arange(5)
            assert row.tolist() == loss[labels].tolist()

    def test_a_bare_prefix_finds_its_mask(self, tmp_path):
        self.make(tmp_path)
        whole, bare = Source.open("s", tmp_path, 5), Source.open("s", tmp_path / "part-0", 5)
        rows = np.empty((2, 5), np.uint8)
        whole.read_mask_into(3, rows[0])
        bare.read_mask_into(3, rows[1])
        assert rows[0].tolist() == rows[1].tolist()
        (tmp_path / "part-0.mask").unlink()
        assert Source.open("s", tmp_path / "part-0", 5).fingerprint != bare.fingerprint

    def test_without_one_every_label_carries_loss(self, tmp_path):
        source, row = Source.open("s", make(tmp_path, [20]), 8), np.zeros(8, np.uint8)
        source.read_mask_into(1, row)
        assert not source.has_mask and row.all()

    def test_a_mask_that_went_missing_is_no_mask_of_ones(self, tmp_path):
        self.make(tmp_path)
        (tmp_path / "part-1.mask").unlink()
        source = Source.open("s", tmp_path, 5)
        source.read(0)
        with pytest.raises(DataError, match=r"(?s)lacks its mask.*part-1\.mask"):
            source.read(source.num_windows - 1)

    def test_other_bytes_of_the_same_size(self, tmp_path):
        self.make(tmp_path)
        content = bytearray((tmp_path / "part-0.mask").read_bytes())
        content[33] ^= 4
        (tmp_path / "part-0.mask").write_bytes(content)
        with pytest.raises(DataError, match=r"(?s)bytes differ.*part-0\.mask"):
            Source.open("s", tmp_path, 5, verify_digests=True)


class TestAgainstTheManifest:
    def test_another_size(self, tmp_path):
        make(tmp_path, [20])
        with IndexedDatasetWriter(tmp_path / "part-0", "uint16", overwrite=True) as writer:
            writer.add_document(np.zeros(21, int))
        with pytest.raises(DataError, match="another size") as caught:
            Source.open("s", tmp_path, 8).read(0)
        assert "21 tokens, 42 bytes" in str(caught.value) and "20 tokens, 40 bytes" in str(caught.value)

    def test_another_dtype(self, tmp_path):
        make(tmp_path, [20])
        with IndexedDatasetWriter(tmp_path / "part-0", "int16", overwrite=True) as writer:
            writer.add_document(np.zeros(20, int))
        with pytest.raises(DataError, match="another dtype"):
            Source.open("s", tmp_path, 8).read(0)

    def test_the_index_of_another_shard(self, tmp_path):
        make(tmp_path, [20])
        with IndexedDatasetWriter(tmp_path / "other", "uint16") as writer:
            writer.add_document(np.zeros(9, int))
            writer.add_document(np.zeros(11, int))
        (tmp_path / "other.idx").rename(tmp_path / "part-0.idx")
        with pytest.raises(DataError, match=r"(?s)part-0\.idx, bytes 26 to 34.*2 documents.*1 documents"):
            Source.open("s", tmp_path, 8).read(0)

    def test_an_index_that_was_zeroed_is_found_when_it_is_read(self, tmp_path):
        make(tmp_path, [20])
        index = tmp_path / "part-0.idx"
        index.write_bytes(index.read_bytes()[:34] + bytes(len(index.read_bytes()) - 34))
        Source.open("s", tmp_path, 8).read(0)  # no window depends on it
        with pytest.raises(DataError, match=r"(?s)do not belong together.*part-0"):
            Source.open("s", tmp_path, 8, verify_digests=True)

    def test_other_bytes_of_the_same_size(self, tmp_path):
        make(tmp_path, [20, 20])
        Source.open("s", tmp_path, 8, verify_digests=True)
        with IndexedDatasetWriter(tmp_path / "part-1", "uint16", overwrite=True) as writer:
            writer.add_document(np.zeros(20, int))
        with pytest.raises(DataError, match=r"(?s)bytes differ.*part-1\.bin"):
            Source.open("s", tmp_path, 8, verify_digests=True)


class TestVocabulary:
    def test_a_source_made_for_a_larger_one_does_not_open(self, tmp_path):
        make(tmp_path, [20], vocab_size=500)
        Source.open("s", tmp_path, 8, vocab_size=500)
        with pytest.raises(DataError, match="larger vocabulary"):
            Source.open("s", tmp_path, 8, vocab_size=499)

    @pytest.mark.parametrize("dtype, token", [("uint16", 150), ("int32", -1), ("int32", 120)])
    def test_a_token_outside_is_found_when_its_window_is_read(self, tmp_path, dtype, token):
        with IndexedDatasetWriter(tmp_path / "x", dtype) as writer:
            tokens = np.zeros(30, int)
            tokens[12] = token
            writer.add_document(tokens)
        source = Source.open("s", tmp_path / "x", 8, vocab_size=120)
        source.read(0)
        first = 12 * np.dtype(dtype).itemsize
        with pytest.raises(DataError, match=f"bytes {first} to"):
            source.read(1)
        source.read(2)


class TestBarePrefix:
    def test_is_a_source_of_one_shard(self, tmp_path):
        make(tmp_path, [20])
        bare, whole = Source.open("s", tmp_path / "part-0", 8), Source.open("s", tmp_path, 8)
        assert bare.num_windows == whole.num_windows == 2
        assert bare.read(1).tolist() == whole.read(1).tolist()
        assert bare.fingerprint != whole.fingerprint

    def test_has_a_fingerprint_of_its_size(self, tmp_path):
        make(tmp_path, [20, 20, 21])
        a, b, c = (Source.open("s", tmp_path / f"part-{k}", 8).fingerprint for k in range(3))
        assert a == b != c

    def test_has_no_digest_to_verify(self, tmp_path):
        make(tmp_path, [20])
        with pytest.raises(DataError, match="no digest to verify"):
            Source.open("s", tmp_path / "part-0", 8, verify_digests=True)

    def test_of_numbers_that_are_no_tokens_is_refused(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "x", "float32") as writer:
            writer.add_document(np.linspace(0, 1, 30))
        with pytest.raises(DataError, match=r"(?s)no token ids.*float32"):
            Source.open("s", tmp_path / "x", 8)

    def test_that_is_not_there_says_what_a_path_may_be(self, tmp_path):
        with pytest.raises(DataError, match=r"neither a folder nor nothing\.bin"):
            Source.open("s", tmp_path / "nothing", 8)
        with pytest.raises(DataError, match="has no manifest"):
            Source.open("s", tmp_path, 8)
