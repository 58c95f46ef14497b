"""What is said of a window and of a document is what their files hold."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.documents import DocumentIndex
from megatron_davinci.data.explain import Explainer, excerpt, find_shard, printable, shard_windows
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.data.source import Source
from megatron_davinci.errors import ConfigError, DataError

# A document as the lengths of its sequences: some have none, some have several, some of them empty.
documents = st.lists(st.integers(0, 9), max_size=3)
shards = st.lists(documents, max_size=12)


def make(folder: Path, content: list[list[list[int]]], dtype: str = "uint16") -> Path:
    """Shards of documents of sequences; tokens count up from 0 in each shard."""
    entries = []
    for k, lengths in enumerate(content):
        with IndexedDatasetWriter(folder / f"part-{k}", dtype) as writer:
            first = 0
            for sequences in lengths:
                writer.add_document(np.arange(first, first + sum(sequences)), lengths=sequences)
                first += sum(sequences)
        entries.append(Shard.of(f"part-{k}", writer.written))
    Manifest(
        name="s", domain="d", dtype=dtype, vocab_size=30_000, eod_id=None, tokenizer_sha256=None,
        shards=tuple(entries),
    ).save(folder)  # fmt: skip
    return folder


def spans(prefix: Path) -> list[tuple[int, int]]:
    """Where each document lies, counted from the whole index: first token and tokens."""
    dataset = IndexedDataset(prefix)
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    bounds = ends[dataset.document_indices]
    return [(int(a), int(b - a)) for a, b in itertools.pairwise(bounds)]


@given(content=shards)
@settings(max_examples=40)
def test_a_document_is_found_by_each_of_its_tokens(tmp_path_factory, content):
    prefix = make(tmp_path_factory.mktemp("s"), [content]) / "part-0"
    index, expected = DocumentIndex(prefix), spans(prefix)
    assert len(index) == len(content) == len(expected)
    assert [index.span(number)[1:] for number in range(len(index))] == expected
    for number, (first, tokens) in enumerate(expected):
        for token in range(first, first + tokens):
            assert index.at(token).number == number
    whole = [number for number, (_, tokens) in enumerate(expected) if tokens]
    assert [document.number for document in index.between(0, index.num_tokens)] == whole
    for number in (-1, len(index)):
        with pytest.raises(DataError, match="no such document"):
            index.span(number)


@given(
    content=st.lists(shards, min_size=1, max_size=3),
    S=st.integers(1, 7),
    dtype=st.sampled_from(["uint16", "int32"]),
)
@settings(max_examples=40)
def test_windows_and_documents_are_the_files(tmp_path_factory, content, S, dtype):
    folder = make(tmp_path_factory.mktemp("s"), content, dtype)
    if all(sum(map(sum, lengths)) <= S for lengths in content):
        return
    source = Source.open("s", folder, S)
    explainer = Explainer({"s": source})
    touched: dict[tuple[int, int], list[int]] = {}
    for window in range(source.num_windows):
        facts = explainer.window("s", window)
        first, end = facts.byte_range
        in_file = np.frombuffer(Path(facts.bin).read_bytes()[first:end], dtype)
        assert in_file.tolist() == facts.tokens.tolist() == source.read(window).tolist()
        assert facts.token_range == (int(in_file[0]), int(in_file[-1]) + 1), "tokens count up in a shard"
        assert [p.first for p in facts.pieces] == [0, *(p.end for p in facts.pieces[:-1])]
        assert facts.pieces[-1].end == S + 1
        expected = spans(facts.prefix)
        for piece in facts.pieces:
            document = piece.document
            assert (document.first_token, document.tokens) == expected[document.number]
            assert document.first_token <= facts.first_token + piece.first
            assert facts.first_token + piece.end <= document.end_token
            touched.setdefault((facts.shard, document.number), []).append(window)
    for shard, lengths in enumerate(content):
        for number in range(len(lengths)):
            found = explainer.document("s", shard, number)
            assert list(found.windows) == touched.get((shard, number), [])


@given(content=st.lists(shards, min_size=1, max_size=5), S=st.integers(1, 5))
@settings(max_examples=25)
def test_the_windows_of_a_shard(tmp_path_factory, content, S):
    if all(sum(map(sum, lengths)) <= S for lengths in content):
        return
    source = Source.open("s", make(tmp_path_factory.mktemp("s"), content), S)
    for shard in range(len(content)):
        expected = [w for w in range(source.num_windows) if source.locate(w).shard == shard]
        assert list(shard_windows(source, shard)) == expected


def test_a_look_up_reads_little_of_a_large_index(tmp_path, monkeypatch):
    """A million documents of a sparse shard: some thirty blocks of the 20 MB that their index has."""
    count, tokens = 1_000_000, 7
    with open(tmp_path / "x.idx", "wb") as file:
        file.write(
            b"MMIDIDX\0\0"
            + np.uint64(1).tobytes()
            + bytes([8])
            + np.array([count, count + 1], "<u8").tobytes()
        )
        np.full(count, tokens, "<i4").tofile(file)
        (np.arange(count, dtype="<i8") * tokens * 2).tofile(file)
        np.arange(count + 1, dtype="<i8").tofile(file)
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(2 * tokens * count)
    index, read = DocumentIndex(tmp_path / "x"), []
    real = index._pointers._blob.read_into
    monkeypatch.setattr(
        index._pointers._blob, "read_into", lambda at, buffer: (read.append(len(buffer)), real(at, buffer))
    )
    assert index.at(4_999_999) == (714_285, 4_999_995, 7)
    assert sum(read) < 200_000
    assert len(index.between(3_500_000, 3_504_097)) == 586


class TestDamage:
    def damaged(self, tmp_path, at: int, value: int) -> Explainer:
        make(tmp_path, [[[10], [10], [10]]])
        source = Source.open("s", tmp_path, 8)
        with open(tmp_path / "part-0.idx", "r+b") as file:
            file.seek(at)
            file.write(np.int64(value).tobytes())
        return Explainer({"s": source})

    POINTERS, BOUNDS = 34 + 4 * 3, 34 + 12 * 3

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (POINTERS + 8, 21),  # inside a token
            (POINTERS + 8, 10**9),
            (POINTERS + 8, -2),
            (POINTERS, 40),
            (BOUNDS, 2),
            (BOUNDS + 8, 50),
            (BOUNDS + 8, -1),
            (BOUNDS + 16, 0),
        ],
    )
    def test_an_index_that_contradicts_itself(self, tmp_path, at, value):
        explainer = self.damaged(tmp_path, at, value)
        with pytest.raises(DataError, match=r"(?s)An index contradicts itself.*part-0\.idx"):
            [explainer.window("s", window) for window in range(3)]

    def test_an_index_that_is_gone(self, tmp_path):
        make(tmp_path, [[[10], [10]]])
        explainer = Explainer({"s": Source.open("s", tmp_path, 8)})
        (tmp_path / "part-0.idx").unlink()
        with pytest.raises(DataError, match="lacks one of its two files"):
            explainer.document("s", 0, 0)


def test_documents_that_no_window_has(tmp_path):
    source = Source.open("s", make(tmp_path, [[[9], [0], [4]], [[3]]]), 8)
    explainer = Explainer({"s": source})
    assert list(explainer.document("s", 0, 0).windows) == [0]
    assert list(explainer.document("s", 0, 1).windows) == [], "it is empty"
    assert list(explainer.document("s", 0, 2).windows) == [], "it lies behind the last window"
    assert list(explainer.document("s", 1, 0).windows) == [], "its shard has no window"


def test_a_document_that_begins_with_a_window_is_predicted_in_the_one_before(tmp_path):
    source = Source.open("s", make(tmp_path, [[[8], [8], [8]]]), 8)
    assert list(Explainer({"s": source}).document("s", 0, 1).windows) == [0, 1]


def test_labels_that_carry_loss_are_counted(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "uint16", mask=True) as writer:
        writer.add_document(np.arange(17), loss=[0] * 6 + [1] * 11)
    explainer = Explainer({"s": Source.open("s", tmp_path / "x", 8)})
    # Window 0 predicts tokens 1 to 8, of which 6, 7 and 8 carry loss.
    assert [explainer.window("s", window).loss_labels for window in (0, 1)] == [3, 8]
    plain = Explainer({"s": Source.open("s", make(tmp_path / "plain", [[[17]]]), 8)})
    assert plain.window("s", 0).loss_labels is None


def test_a_shard_by_number_or_name(tmp_path):
    source = Source.open("s", make(tmp_path, [[[9]], [[9]]]), 8)
    assert [find_shard(source, text) for text in ("0", "1", "part-0", "part-1")] == [0, 1, 0, 1]
    for text in ("2", "-1", "part", "²", ""):
        with pytest.raises(ConfigError, match="no such shard"):
            find_shard(source, text)


class TestText:
    @given(st.text(max_size=60))
    def test_nothing_that_a_terminal_obeys_comes_through(self, text):
        for lines in (False, True):
            shown = printable(text, lines=lines)
            kept = [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")]
            assert set(kept) <= set("\u200c\u200d" + ("\n\t" if lines else ""))

    def test_what_is_escaped_can_be_read(self):
        assert printable("a\x1b[31m\r\n\u202eb\x9b\x7f") == r"a\x1b[31m\r\n\u202eb\x9b\x7f"
        assert printable("a\tb\n\x00", lines=True) == "a\tb\n\\x00"
        assert printable("żółw 漢字 👩‍🔬 می‌روم") == "żółw 漢字 👩‍🔬 می‌روم"

    def test_an_excerpt_has_both_ends(self):
        assert excerpt("abcdefgh", 3, 2) == ("abc", "gh")
        assert excerpt("abcde", 3, 2) == ("abcde", "")
        assert excerpt("", 3, 2) == ("", "")
