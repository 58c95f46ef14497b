"""The census of a source: exact counts, whatever the blocks; damage is named, and the rest is counted."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import census as census_module
from megatron_davinci.data import lengths as lengths_module
from megatron_davinci.data.census import count_bits, take_census
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.lengths import Lengths, document_lengths
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.source import Source
from megatron_davinci.data.survey import make_manifest
from megatron_davinci.errors import DataError
from tests.data.s3_server import at, proxy, store

__all__ = ["at", "proxy", "store"]  # fixtures

SHORT = 1 << 16  # where lengths begins to count in pairs
some_lengths = st.lists(
    st.one_of(
        st.integers(0, 40),
        st.integers(SHORT - 3, SHORT + 3),
        st.sampled_from([2**k + d for k in (1, 7, 17, 30) for d in (-1, 0, 1)]),
        st.integers(0, 2**40),
    ),
    max_size=60,
)


def counted(values: list[int]) -> Lengths:
    lengths = Lengths()
    lengths.add(np.array(values, np.int64))
    return lengths


# ---- counting lengths ------------------------------------------------------------------------------------


@given(st.lists(some_lengths, max_size=4), st.integers(1, 100))
@settings(max_examples=80, deadline=None)
def test_counts_and_percentiles_are_those_of_the_sorted_list(blocks, percent):
    lengths, everything = Lengths(), sorted(value for block in blocks for value in block)
    for i, block in enumerate(blocks):
        if i % 2:
            lengths.merge(counted(block))
        else:
            lengths.add(np.array(block, np.int64))
    assert lengths.documents == len(everything)
    assert lengths.empty == everything.count(0)
    assert lengths.tokens == sum(everything)
    assert lengths.longest == max(everything, default=0)
    if not everything:
        assert lengths.percentile(percent) == 0
        return
    expected = int(np.percentile(everything, percent, method="inverted_cdf"))
    assert lengths.percentile(percent) == expected
    # In its own words: enough documents do not exceed it, and they would exceed anything shorter.
    assert 100 * sum(value <= expected for value in everything) >= percent * len(everything)
    assert 100 * sum(value < expected for value in everything) < percent * len(everything)


@given(some_lengths)
@settings(max_examples=80, deadline=None)
def test_bins_are_powers_of_two_without_gaps(values):
    bins = counted(values).bins()
    some = [value for value in values if value]
    assert bool(bins) == bool(some)
    for one in bins:
        assert one.first.bit_count() == 1 and one.last == 2 * one.first - 1
        inside = [value for value in some if one.first <= value <= one.last]
        assert (one.documents, one.tokens) == (len(inside), sum(inside))
    for one, following in itertools.pairwise(bins):
        assert following.first == one.last + 1
    if some:
        assert bins[0].first <= min(some) and max(some) <= bins[-1].last
        assert bins[0].documents and bins[-1].documents


def test_many_long_lengths_are_kept_as_pairs(monkeypatch):
    monkeypatch.setattr(lengths_module, "_WAITING", 64)
    lengths, values = Lengths(), np.random.default_rng(0).integers(SHORT, SHORT + 50, 3000)
    for block in np.split(values, 60):
        lengths.add(block)
        assert sum(part.shape[1] for part in lengths._waiting) <= 64
    assert lengths.documents == 3000 and lengths.tokens == values.sum()
    assert lengths._pairs().shape == (2, 50), "one for each length, however many documents"
    assert lengths.percentile(50) == np.percentile(values, 50, method="inverted_cdf")


def test_the_lengths_of_thousands_of_shards_are_not_walked_over_for_each(monkeypatch):
    class Walked(list):
        walks = 0

        def __iter__(self):
            Walked.walks += 1
            return super().__iter__()

    lengths = Lengths()
    lengths._waiting = Walked()
    for shard in range(40):
        one = Lengths()
        one.add(np.array([5] if shard % 2 else [SHORT + shard]))
        lengths.merge(one)
    assert len(lengths._waiting) == 20, "one for each shard that has something to keep"
    assert lengths.documents == 40 and Walked.walks <= 1


@given(st.binary(max_size=300))
def test_bits_are_counted(raw):
    assert count_bits(raw) == sum(byte.bit_count() for byte in raw)


# ---- reading them from an index --------------------------------------------------------------------------

documents_of_sequences = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=25)


def write_index(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedDatasetWriter(prefix, "uint16", overwrite=True) as writer:
        for sizes in documents:
            writer.add_document(np.arange(sum(sizes)), sizes)
    return prefix


@given(documents_of_sequences, st.integers(1, 7))
@settings(max_examples=120, deadline=None)
def test_lengths_do_not_depend_on_the_blocks(tmp_path_factory, documents, block):
    prefix = write_index(tmp_path_factory.getbasetemp() / "blocks", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths_module, "BLOCK", block)
        parts = list(document_lengths(prefix))
    assert all(len(part) <= block and part.dtype == np.int64 for part in parts)
    assert [int(length) for part in parts for length in part] == [sum(sizes) for sizes in documents]


def spoil(path: Path, offset: int, form: str, value: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, offset, value)
    path.write_bytes(raw)


DOCUMENTS = [[3, 2], [], [4], [1, 1, 1]]  # 6 sequences, 5 bounds, 12 tokens
BOUNDS_AT = 34 + 12 * 6


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (0, "<B", 0, "This is not a Megatron index."),
        (34 + 4 * 2, "<i", -4, "Sequence 2 has a negative length."),
        (34 + 4 * 2, "<i", 5, "13 tokens, the sum of the lengths in the index"),
        (BOUNDS_AT, "<q", 1, "The first document bound is wrong."),
        (BOUNDS_AT + 16, "<q", 1, "Document 1 ends before it begins."),
        (BOUNDS_AT + 16, "<q", 1 << 40, "Document 2 ends before it begins."),
        (BOUNDS_AT + 32, "<q", 5, "The last document bound is not the number of sequences."),
        (BOUNDS_AT + 32, "<q", 7, "The last document bound is not the number of sequences."),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 1 << 18])
def test_a_damaged_index_is_refused(tmp_path, monkeypatch, offset, form, value, said, block):
    monkeypatch.setattr(lengths_module, "BLOCK", block)
    prefix = write_index(tmp_path / "x", DOCUMENTS)
    assert sum(map(len, document_lengths(prefix))) == 4
    spoil(tmp_path / "x.idx", offset, form, value)
    with pytest.raises(DataError) as raised:
        list(document_lengths(prefix))
    if value == 1 << 40 and block == 1:
        said = "The last document bound"  # seen alone, it is too large before anything is smaller
    assert said in str(raised.value)
    assert str(tmp_path / "x.idx") in str(raised.value)


# ---- a source --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards with masks; the second has an empty document, the third is too short for a window of 32."""
    draw = np.random.default_rng(3)
    for k, sizes in enumerate(([50, 70, 3], [40, 0, 61], [20])):
        with IndexedDatasetWriter(tmp_path / f"part-{k}", "uint16", mask=True) as writer:
            for size in sizes:
                writer.add_document(draw.integers(0, 90, size), loss=draw.integers(0, 2, size))
    make_manifest(tmp_path, name="web", domain="general", vocab_size=100).save(tmp_path)
    return tmp_path


def loss_by_hand(folder: Path, shard: int, tokens: int) -> int:
    raw = (folder / f"part-{shard}.mask").read_bytes()[32:]
    return int(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[:tokens].sum())


@pytest.mark.parametrize("chunk", [1, 5, 1 << 22])
def test_a_source_is_counted(folder, monkeypatch, chunk):
    monkeypatch.setattr(census_module, "_CHUNK", chunk)
    found = take_census(folder)
    assert (found.tokens, found.documents, found.shard_tokens) == (244, 7, (123, 101, 20))
    assert (found.dtype.name, found.has_mask, found.read) == ("uint16", True, (0, 1, 2))
    assert found.problems == () and not found.is_sample
    assert found.loss_tokens == sum(loss_by_hand(folder, k, n) for k, n in enumerate(found.shard_tokens))
    assert (found.lengths.documents, found.lengths.empty, found.lengths.longest) == (7, 1, 70)
    assert found.lengths.percentile(50) == 40 and found.lengths.tokens == 244


@pytest.mark.parametrize("length", [1, 2, 19, 20, 32, 100, 121, 122])
def test_windows_and_lost_tokens_are_those_of_the_source(folder, length):
    found, source = take_census(folder), Source.open("web", folder, length)
    assert found.windows(length) == source.num_windows
    seen = set()
    for window in range(source.num_windows):
        shard, first = source.locate(window)
        seen |= {(shard, first + i) for i in range(length + 1)}
    assert found.lost_tokens(length) == source.num_tokens - len(seen)


def test_a_source_without_a_window_loses_all(folder):
    assert (take_census(folder).windows(123), take_census(folder).lost_tokens(123)) == (0, 244)


def test_a_bare_prefix(folder):
    found = take_census(folder / "part-1")
    assert found.manifest is None and (found.tokens, found.documents) == (101, 3)
    assert found.loss_tokens == loss_by_hand(folder, 1, 101)
    (folder / "part-1.mask").unlink()
    found = take_census(folder / "part-1")
    assert (found.has_mask, found.loss_tokens) == (False, 101)


def test_a_sample_is_spread_over_the_shards(folder):
    for count, shards in ((1, (0,)), (2, (0, 2)), (3, (0, 1, 2)), (9, (0, 1, 2))):
        found = take_census(folder, sample=count)
        assert found.read == shards and found.is_sample is (count < 3)
        assert found.tokens == 244, "what the manifest says is said of all shards"
        assert found.read_tokens == sum((123, 101, 20)[shard] for shard in shards)
        assert found.lengths.documents == sum((3, 3, 1)[shard] for shard in shards)


def test_other_shards_are_not_looked_at_for_a_sample(folder):
    (folder / "part-1.idx").unlink()
    assert take_census(folder, sample=2).problems == ()


def test_damage_in_one_shard_leaves_the_others(folder):
    (folder / "part-0.idx").write_bytes((folder / "part-0.idx").read_bytes()[:-1])
    (folder / "part-2.mask").unlink()
    found = take_census(folder)
    assert found.read == (1,) and found.lengths.documents == 3 and not found.is_sample
    assert found.loss_tokens == loss_by_hand(folder, 1, 101), "nothing of a shard that is damaged further on"
    first, second = map(str, found.problems)
    assert "counts do not match its size" in first and "part-0.idx" in first
    assert "lacks its mask" in second and "part-2.mask" in second


def test_a_shard_that_is_not_the_manifests(folder):
    manifest = Manifest.load(folder)
    shards = (manifest.shards[0].model_copy(update={"documents": 4}), *manifest.shards[1:])
    manifest.model_copy(update={"shards": shards}).save(folder)
    (problem,) = take_census(folder).problems
    assert "another number of documents than the manifest says" in str(problem)
    assert (problem.found, problem.expected) == ("3", "4")


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no source here"):
        take_census(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no manifest"):
        take_census(tmp_path)
    with IndexedDatasetWriter(tmp_path / "floats", "float32") as writer:
        writer.add_document([0.5, 1.5])
    with pytest.raises(DataError, match="holds no token ids"):
        take_census(tmp_path / "floats")
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document(np.arange(5))
    spoil(tmp_path / "x.idx", 34, "<i", -1)
    with pytest.raises(DataError, match="negative length"):
        take_census(tmp_path / "x")


def test_progress_comes_to_what_was_promised(folder):
    seen: list[tuple[int, int]] = []
    take_census(folder, threads=1, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    total = 7 * 12 + sum(tokens // 8 for tokens in (123, 101, 20))
    assert seen[-1][1] == total and abs(seen[-1][0] - total) <= 3, "a byte that is not full, for each mask"


def test_a_source_in_s3_is_counted_alike_and_not_cached(folder, at, store, tmp_path_factory):
    for path in folder.iterdir():
        store.put(f"web/{path.name}", path.read_bytes())
    there, here = take_census(at("web")), take_census(folder)
    assert there.loss_tokens == here.loss_tokens and there.lengths.bins() == here.lengths.bins()
    assert replace(there, place=here.place, lengths=here.lengths) == here
    cache = at("web").options.cache
    assert cache is not None and not any(path.is_file() for path in cache.rglob("*"))
    assert take_census(at("web/part-1")).documents == 3
