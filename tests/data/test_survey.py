"""A manifest made of datasets that are there, and files held against a manifest: all that is wrong is said."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import scan
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.source import Source
from megatron_davinci.data.survey import find_prefixes, make_manifest
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.data.verify import verify_source
from megatron_davinci.errors import DataError
from tests.cli.screen import davinci

EOD = 9


def write(prefix: Path, docs: list[list[int]], dtype: object = "uint16", mask: bool = False) -> None:
    with IndexedDatasetWriter(prefix, dtype, mask=mask) as writer:
        for doc in docs:
            writer.add_document(doc)


def patch(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(bytes(content))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards that end their documents with token 9; the largest id is 70."""
    for name, docs in (
        ("web_00_document", [[1, 2, EOD], [70, EOD]]),
        ("web_01_document", [[], [3, 4, 5, EOD]]),
        ("web_02_document", [[6, EOD], [7, EOD], [8, EOD]]),
    ):
        write(tmp_path / "web" / name, docs)
    return tmp_path / "web"


class TestManifest:
    def test_says_what_is_there(self, folder):
        screen = davinci("data", "manifest", folder, "--domain", "general", "--eod-id", EOD)
        assert (screen.code, screen.err) == (0, "")
        assert "3 shards, 7 documents, 15 tokens of uint16, ids below 71" in screen.out
        manifest = Manifest.load(folder)
        assert (manifest.name, manifest.domain) == ("web", "general")
        assert (manifest.dtype, manifest.vocab_size, manifest.eod_id) == ("uint16", 71, EOD)
        assert manifest.tokenizer_sha256 is None and not manifest.has_mask
        assert [shard.prefix for shard in manifest.shards] == [f"web_0{k}_document" for k in range(3)]
        assert [(shard.tokens, shard.documents) for shard in manifest.shards] == [(5, 2), (4, 2), (6, 3)]
        for shard in manifest.shards:
            content = (folder / f"{shard.prefix}.bin").read_bytes()
            assert (shard.bin_bytes, shard.bin_sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert sorted(set(folder.iterdir()) - {folder / "manifest.json"}) == sorted(
            folder / f"web_0{k}_document{ending}" for k in range(3) for ending in (".bin", ".idx")
        )
        assert Source.open("web", folder, 3, verify_digests=True).num_windows == 3
        assert davinci("data", "verify", folder, "--deep").code == 0

    def test_is_the_one_that_writing_the_source_gives(self, tmp_path):
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": f"word {n} " * 9}) + "\n" for n in range(50)))
        train_bpe([texts], 260, tmp_path / "tokenizer")
        made = ("data", "tokenize", texts, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out")
        assert davinci(*made).code == 0
        written = Manifest.load(tmp_path / "out")
        again = ("data", "manifest", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer")
        assert "there already" in davinci(*again).refusal()
        assert davinci(*again, "--replace").code == 0
        assert Manifest.load(tmp_path / "out") == written
        assert written.tokenizer_sha256 == Tokenizer.load(tmp_path / "tokenizer").sha256
        assert written.eod_id == Tokenizer.load(tmp_path / "tokenizer").eod_id
        assert davinci(*again, "--replace", "--eod-id", "none").code == 0
        assert Manifest.load(tmp_path / "out").eod_id is None

    def test_shards_may_lie_deeper_and_in_an_order_of_ones_own(self, folder):
        parent = folder.parent
        prefixes = ["web/web_02_document", "./web/web_00_document"]
        assert davinci("data", "manifest", parent, *prefixes, "--name", "two").code == 0
        manifest = Manifest.load(parent)
        assert manifest.name == manifest.domain == "two"
        assert [shard.prefix for shard in manifest.shards] == ["web/web_02_document", "web/web_00_document"]
        assert Source.open("two", parent, 3).read(0).tolist() == [6, EOD, 7, EOD]

    def test_names_with_dots_are_found_and_files_beside_are_passed_by(self, tmp_path):
        write(tmp_path / "part.v1", [[1]])
        for name in ("x.bin.tmp-1-2", ".hidden.bin", "readme.md", "bin"):
            (tmp_path / name).touch()
        assert find_prefixes(tmp_path) == ["part.v1"]

    def test_an_empty_shard_is_a_shard_and_only_empty_ones_tell_no_vocabulary(self, tmp_path):
        write(tmp_path / "empty", [])
        with pytest.raises(DataError, match="no vocabulary can be told"):
            make_manifest(tmp_path)
        assert make_manifest(tmp_path, vocab_size=5).tokens == 0
        write(tmp_path / "full", [[4]])
        assert make_manifest(tmp_path).vocab_size == 5

    @given(
        shards=st.lists(st.lists(st.lists(st.integers(0, 200), max_size=30), max_size=9), min_size=1, max_size=3),
        dtype=st.sampled_from(["uint8", "uint16", "int32", "int64"]),
    )  # fmt: skip
    @settings(max_examples=25)
    def test_in_pieces_of_any_size(self, tmp_path_factory, shards, dtype):
        folder = tmp_path_factory.mktemp("s")
        for k, docs in enumerate(shards):
            write(folder / f"part-{k}", [[*doc, EOD] if doc else [] for doc in docs], dtype)
        with pytest.MonkeyPatch.context() as small:
            small.setattr(scan, "_CHUNK", 16)
            small.setattr(scan, "_BLOCK", 2)
            manifest = make_manifest(folder, vocab_size=201, eod_id=EOD)
            assert not any(verify_source(folder_with(folder, manifest), deep=True).problems)
            largest = max((max(*doc, EOD) for docs in shards for doc in docs if doc), default=None)
            if largest is not None:
                assert make_manifest(folder).vocab_size == largest + 1
        for k, docs in enumerate(shards):
            shard = manifest.shards[k]
            assert shard.tokens == sum(len(doc) + bool(doc) for doc in docs)
            assert shard.bin_sha256 == hashlib.sha256((folder / f"part-{k}.bin").read_bytes()).hexdigest()

    def test_progress_is_told_by_one_thread_at_a_time_and_ends_at_all_of_it(self, folder):
        busy, steps = Lock(), []

        def progress(done: int, total: int) -> None:
            assert busy.acquire(blocking=False)
            steps.append((done, total))
            busy.release()

        make_manifest(folder, threads=3, progress=progress).save(folder)
        assert steps == sorted(steps) and steps[-1] == (30, 30)
        steps.clear()
        (folder / "web_01_document.bin").unlink()  # what cannot be read is done with, too
        verify_source(folder, progress=progress)
        assert steps == sorted(steps) and steps[-1] == (30, 30)


def folder_with(folder: Path, manifest: Manifest) -> Path:
    manifest.save(folder)
    return folder


class TestManifestRefusals:
    def refused(self, folder: Path, *arguments: object) -> str:
        before = files(folder)
        text = davinci("data", "manifest", folder, *arguments).refusal()
        assert files(folder) == before
        return text

    def test_two_dtypes(self, folder):
        write(folder / "web_03_document", [[100000]], "int32")
        text = self.refused(folder)
        assert "Two shards of a source have different dtypes." in text
        assert f"{folder / 'web_00_document'}.idx" in text and f"{folder / 'web_03_document'}.idx" in text
        assert "uint16 in the first, int32 in the second" in text

    def test_values_that_are_no_ids(self, tmp_path):
        write(tmp_path / "f", [[0.5]], "float32")
        text = self.refused(tmp_path)
        assert "holds no token ids" in text and "f.idx, bytes 17 to 18" in text and "float32" in text

    def test_a_manifest_that_is_there_is_kept(self, folder):
        make_manifest(folder, name="first").save(folder)
        assert "there already" in self.refused(folder)
        assert davinci("data", "manifest", folder, "--replace", "--name", "second").code == 0
        assert Manifest.load(folder).name == "second"

    @pytest.mark.parametrize(
        "offset, raw, says",
        [
            (0, b"X", ("not a Megatron index", "bytes 0 to 9")),
            (9, b"\x02", ("unknown version", "bytes 9 to 17", "found:    2", "expected: 1")),
            (17, b"\x00", ("unknown dtype code", "bytes 17 to 18", "found:    0", "expected: 1 to 8")),
            (34, struct.pack("<i", 2), ("does not begin where", "byte offset 0", "byte offset 4")),
        ],
    )
    def test_a_damaged_index(self, folder, offset, raw, says):
        patch(folder / "web_01_document.idx", offset, raw)
        text = self.refused(folder)
        assert "web_01_document.idx" in text
        for words in says:
            assert words in text

    @pytest.mark.parametrize("change", [-2, -1, 1, 2])
    def test_a_token_file_that_was_cut_or_grew(self, folder, change):
        os.truncate(folder / "web_01_document.bin", 8 + change)
        text = self.refused(folder)
        assert "web_01_document.bin" in text and f"{8 + change} bytes" in text and "expected:" in text

    @pytest.mark.parametrize("ending, other", [(".bin", ".idx"), (".idx", ".bin")])
    def test_half_a_dataset(self, folder, ending, other):
        (folder / f"web_01_document{ending}").unlink()
        text = self.refused(folder)
        assert f"web_01_document{ending}" in text and f"though web_01_document{other} is there" in text

    def test_a_mask_that_only_one_has(self, folder):
        write(folder / "web_03_document", [[1, EOD]], mask=True)
        text = self.refused(folder)
        assert "lacks its mask" in text and "web_00_document.mask" in text

    @pytest.mark.parametrize(
        "offset, raw, where", [(8, b"\x07", "bytes 8 to 16"), (32, b"\xff", "bytes 32 to 33")]
    )
    def test_a_damaged_mask(self, tmp_path, offset, raw, where):
        write(tmp_path / "a", [[1, 2, 3]], mask=True)
        patch(tmp_path / "a.mask", offset, raw)
        assert f"a.mask, {where}" in self.refused(tmp_path)

    def test_a_token_outside_the_vocabulary(self, folder):
        text = self.refused(folder, "--vocab-size", 70)
        assert "web_00_document.bin, bytes 6 to 8, token 3" in text
        assert "found:    70" in text and "expected: 0 to 69" in text

    def test_a_negative_token(self, tmp_path):
        write(tmp_path / "a", [[1, -5]], "int32")
        text = self.refused(tmp_path)
        assert "a.bin, bytes 4 to 8, token 1" in text and "found:    -5" in text

    def test_a_document_that_ends_otherwise(self, folder):
        write(folder / "web_03_document", [[1, EOD], [2, 3], [4]])
        text = self.refused(folder, "--eod-id", EOD)
        assert "web_03_document.bin, bytes 6 to 8, token 3" in text
        assert "found:    3" in text and f"expected: {EOD}" in text
        assert davinci("data", "manifest", folder, "--eod-id", "none").code == 0

    @pytest.mark.parametrize(
        "arguments, says",
        [
            (["--vocab-size", 70000], "uint16 does not hold the ids of a vocabulary of 70,000"),
            (["--vocab-size", 0], "vocab_size: Input should be greater than 0"),
            (["--eod-id", 99, "--vocab-size", 80], "eod_id 99 is outside the vocabulary"),
            (["--eod-id", "-1"], "--eod-id"),
            (["--eod-id", "x"], "a token id, or none"),
            (["../web/web_00_document"], "a prefix is a path inside the manifest's folder"),
            (["web_00_document", "./web_00_document"], "web_00_document is listed 2 times"),
            (["web_07_document"], "web_07_document.idx"),
        ],
    )
    def test_impossible_wishes(self, folder, arguments, says):
        assert says in self.refused(folder, *arguments)

    def test_a_folder_with_nothing_in_it(self, tmp_path):
        assert "There is no dataset here." in self.refused(tmp_path)
        assert "not a folder" in self.refused(tmp_path / "nowhere")


class TestVerify:
    @pytest.fixture
    def source(self, folder):
        make_manifest(folder, vocab_size=100, eod_id=EOD).save(folder)
        return folder

    def refused(self, source: Path, *arguments: object) -> str:
        before = files(source)
        screen = davinci("data", "verify", source, *arguments)
        assert screen.code == 2 and "Traceback" not in screen.err and screen.out == ""
        assert files(source) == before
        return screen.err

    def test_a_source_that_is_whole_is_shown(self, source):
        write(source / "later", [[1]])
        screen = davinci("data", "verify", source)
        assert (screen.code, screen.err) == (0, "")
        for shown in ("web: 3 shards", "web_01_document", "15 tokens of uint16", "checked: sizes"):
            assert shown in screen.out
        assert "does not name them: later" in screen.out

    def test_a_swapped_file_of_the_same_size(self, source):
        write(source / "other", [[1, 2, EOD], [71, EOD]])
        os.replace(source / "other.bin", source / "web_00_document.bin")
        (source / "other.idx").unlink()
        text = self.refused(source)
        assert "1 problem in 1 of 3 shards" in text and "web_00_document.bin" in text
        found = hashlib.sha256((source / "web_00_document.bin").read_bytes()).hexdigest()
        assert f"found sha256 {found}" in text
        assert f"expected sha256 {Manifest.load(source).shards[0].bin_sha256}" in text

    def test_a_swapped_pair_of_the_same_size_even_so(self, source):
        write(source / "web_02_document2", [[6, EOD], [EOD, 7], [8, EOD]])
        for ending in (".bin", ".idx"):
            os.replace(source / f"web_02_document2{ending}", source / f"web_02_document{ending}")
        assert "its bytes differ" in self.refused(source)

    @pytest.mark.parametrize("known", [True, False])
    def test_an_index_with_another_bound_of_a_document(self, source, known):
        # Of sequences of one token each, so that bounds may lie elsewhere and all else adds up.
        with IndexedDatasetWriter(source / "more", "uint16") as writer:
            for _ in range(2):
                writer.add_document([1, EOD], [1, 1])
        manifest = make_manifest(source, vocab_size=100, eod_id=EOD)
        if not known:
            shards = tuple(shard.model_copy(update={"idx_sha256": None}) for shard in manifest.shards)
            manifest = manifest.model_copy(update={"shards": shards})
        manifest.save(source)
        assert ("idx_sha256" in (source / "manifest.json").read_text()) == known
        with open(source / "more.idx", "r+b") as file:
            file.seek(-16, os.SEEK_END)
            assert struct.unpack("<q", file.read(8)) == (2,)
            file.seek(-16, os.SEEK_END)
            file.write(struct.pack("<q", 3))
        if known:
            assert "more.idx" in self.refused(source)
            with pytest.raises(DataError, match=r"more.idx"):
                Source.open("web", source, 2, verify_digests=True)
        else:
            assert davinci("data", "verify", source).code == 0
            Source.open("web", source, 2, verify_digests=True)

    def test_all_that_is_wrong_is_listed(self, source):
        os.truncate(source / "web_00_document.bin", 8)
        patch(source / "web_01_document.idx", 0, b"X")
        patch(source / "web_01_document.bin", 0, b"\x07")
        for ending in (".bin", ".idx"):
            (source / f"web_02_document{ending}").unlink()
        text = self.refused(source)
        assert "6 problems in 3 of 3 shards" in text
        problems = [
            list(map(str, (p.what, p.where))) for shard in verify_source(source).problems for p in shard
        ]
        assert [(what.split(".")[0], Path(where.split(",")[0]).name) for what, where in problems] == [
            ("An index and its token file do not belong together, or one of them was cut", "web_00_document.bin"),
            ("A token file has another size than the manifest says", "web_00_document.bin"),
            ("This is not a Megatron index", "web_01_document.idx"),
            ("A file is not the one that the manifest describes: its bytes differ", "web_01_document.bin"),
            ("An indexed dataset lacks one of its two files", "web_02_document.idx"),
            ("A token file is not there", "web_02_document.bin"),
        ]  # fmt: skip
        for what, where in problems:
            assert what in text and where in text

    def test_the_index_of_another_token_file(self, source):
        (source / "web_01_document.idx").write_bytes((source / "web_02_document.idx").read_bytes())
        text = self.refused(source)
        assert "web_01_document.bin" in text and "found 8 bytes" in text
        assert "expected 12 bytes, the sum of the lengths in web_01_document.idx" in text

    def test_a_grown_pair(self, source):
        with IndexedDatasetWriter(source / "web_01_document", "uint16", overwrite=True) as writer:
            writer.add_document([3, 4, 5, EOD, EOD])
        text = self.refused(source)
        assert "found 10 bytes" in text and "expected 8 bytes" in text
        assert "found 1 documents" in text and "expected 2 documents" in text

    def test_another_dtype(self, source):
        with IndexedDatasetWriter(source / "web_01_document", "int16", overwrite=True) as writer:
            writer.add_document([])
            writer.add_document([3, 4, 5, EOD])
        text = self.refused(source)
        assert "1 problem " in text and "web_01_document.idx, bytes 17 to 18" in text
        assert "found int16" in text and "expected uint16" in text

    def test_masks(self, tmp_path):
        for name in ("a", "b", "c"):
            write(tmp_path / name, [[1, 2, 3]], mask=True)
        make_manifest(tmp_path).save(tmp_path)
        assert davinci("data", "verify", tmp_path).code == 0
        patch(tmp_path / "a.mask", 32, b"\x05")
        os.truncate(tmp_path / "b.mask", 32)
        (tmp_path / "c.mask").unlink()
        text = self.refused(tmp_path)
        assert "3 problems in 3 of 3 shards" in text
        assert f"its bytes differ.\n              where {tmp_path / 'a.mask'}" in text
        assert "b.mask, bytes 32 to 33" in text and "c.mask" in text

    def test_a_mask_that_the_manifest_does_not_name(self, source):
        write(source / "x", [[1, 2, 3, EOD]], mask=True)
        os.replace(source / "x.mask", source / "web_01_document.mask")
        text = self.refused(source)
        assert "training would not use it" in text and "web_01_document.mask" in text

    def test_deep_looks_at_the_tokens(self, source):
        manifest = Manifest.load(source)
        Manifest(**{**dict(manifest), "vocab_size": 10}).save(source)
        assert davinci("data", "verify", source).code == 0
        text = self.refused(source, "--deep")
        assert "1 problem in 1 of 3 shards" in text and "web_00_document.bin, bytes 6 to 8, token 3" in text
        Manifest(**{**dict(manifest), "eod_id": 5}).save(source)
        assert davinci("data", "verify", source).code == 0
        assert "3 problems in 3 of 3 shards" in self.refused(source, "--deep")

    def test_without_a_manifest(self, folder, tmp_path):
        assert "has no manifest" in self.refused(folder)
        assert "has no manifest" in self.refused(folder / "web_00_document")
        (folder / "manifest.json").write_text("{")
        assert "manifest is wrong" in self.refused(folder)


def test_an_error_in_one_shard_ends_the_others_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_CHUNK", 2)
    write(tmp_path / "a", [[200]])
    for name in ("b", "c", "d"):
        write(tmp_path / name, [np.zeros(5000, int).tolist()])
    seen: list[int] = []
    with pytest.raises(DataError, match="outside the vocabulary"):
        make_manifest(tmp_path, vocab_size=100, threads=1, progress=lambda done, _: seen.append(done))
    assert len(seen) < 5000
