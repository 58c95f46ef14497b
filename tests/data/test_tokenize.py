"""JSONL to a source: every document and its end, in order, or nothing at all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data import encode_part, fast_bpe, tokenize
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.tokenize import tokenize_jsonl
from megatron_davinci.data.tokenizer import EOD, Tokenizer, train_bpe
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem
from tests.cases import cases
from tests.data.tokenizing import documents, write_jsonl

TEXTS = [f"document {n}: " + "abc " * (n % 7) for n in range(40)] + ["数据 \n x", f"it says {EOD}."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(
        train_bpe([write_jsonl(folder / "a.jsonl", [{"text": t} for t in TEXTS])], 270, folder)
    )


@pytest.fixture(autouse=True)
def few_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders are compared on all hard strings in test_fast_bpe.py."""
    monkeypatch.setattr(tokenize, "nasty_texts", lambda tokenizer: ["e\u0301"])


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])


def test_each_document_is_its_tokens_and_one_end(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = tokenize_jsonl([jsonl], tokenizer, tmp_path / "out", "web", "general")
    found = documents(tmp_path / "out", manifest)
    assert found == [[*ids.tolist(), tokenizer.eod_id] for ids in tokenizer.encode_batch(TEXTS)]
    assert all(ids.count(tokenizer.eod_id) == 1 for ids in found)
    assert [tokenizer.decode(ids[:-1]) for ids in found] == TEXTS


def test_the_manifest_says_what_was_written(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = tokenize_jsonl([jsonl], tokenizer, tmp_path / "out", "web", "general")
    assert manifest == Manifest.load(tmp_path / "out")
    assert (manifest.name, manifest.domain, manifest.dtype) == ("web", "general", "uint16")
    assert (manifest.vocab_size, manifest.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.documents == len(TEXTS)
    assert manifest.tokens == sum(map(len, tokenizer.encode_batch(TEXTS))) + len(TEXTS)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "shard-00000.bin", "shard-00000.idx"}


@given(
    shard_tokens=st.integers(20, 400),
    batch=st.integers(1, 9),
    characters=st.integers(1, 80),
    piece=st.integers(30, 900),
)
@cases(8)
def test_shards_batches_and_pieces_change_nothing_but_the_shards(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    shard_tokens: int,
    batch: int,
    characters: int,
    piece: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    parts = [write_jsonl(folder / f"{n}.jsonl", [{"text": t} for t in TEXTS[n::2][:8]]) for n in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_part, "BATCH_DOCUMENTS", batch)
        patch.setattr(encode_part, "BATCH_CHARACTERS", characters)
        patch.setattr(tokenize, "PIECE_BYTES", piece)
        manifest = tokenize_jsonl(
            parts, tokenizer, folder / "out", "web", "general", shard_tokens=shard_tokens
        )
    expected = [
        [*ids.tolist(), tokenizer.eod_id] for n in range(2) for ids in tokenizer.encode_batch(TEXTS[n::2][:8])
    ]
    assert documents(folder / "out", manifest) == expected
    for shard, following in zip(manifest.shards, manifest.shards[1:]):
        assert shard.documents == 1 or shard.tokens <= shard_tokens
        first = IndexedDataset(folder / "out" / following.prefix)[0]
        assert shard.tokens + len(first) > shard_tokens


def test_progress_counts_the_bytes_of_all_inputs(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_part, "BATCH_DOCUMENTS", 10)
    parts = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in TEXTS]) for n in range(2)]
    parts[1].write_text(parts[1].read_text() + "\n\n")
    seen: list[tuple[int, int]] = []
    tokenize_jsonl(
        parts, tokenizer, tmp_path / "out", "web", "general", progress=lambda *so_far: seen.append(so_far)
    )
    assert seen == sorted(seen)
    assert len(seen) >= 8
    total = sum(path.stat().st_size for path in parts)
    assert {so_far[1] for so_far in seen} == {total} == {seen[-1][0]}


def test_blank_lines_and_empty_texts_are_no_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('\n{"text": "a"}\n   \n{"text": ""}\n{"text": " "}')
    manifest = tokenize_jsonl([tmp_path / "in.jsonl"], tokenizer, tmp_path / "out", "web", "general")
    assert [tokenizer.decode(ids) for ids in documents(tmp_path / "out", manifest)] == [f"a{EOD}", f" {EOD}"]


def test_another_field_can_hold_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": 3, "body": "b"}])
    manifest = tokenize_jsonl([path], tokenizer, tmp_path / "out", "web", "general", text_field="body")
    assert manifest.documents == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"txt": "a"}', "no field 'text'"),
        (b'{"text": null}', "not a string"),
        (b'{"text": ["a"]}', "not a string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud83d"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(
    tokenizer: Tokenizer, tmp_path: Path, line: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encode_part, "BATCH_DOCUMENTS", 1
    )  # the first document is on disk when the fault is met
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        tokenize_jsonl([path], tokenizer, tmp_path / "out", "web", "general")
    assert caught.value.where == f"{path}:3"
    assert len(str(caught.value)) < 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_domain_is_an_error(tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="'science' has no documents"):
        tokenize_jsonl([path], tokenizer, tmp_path / "out", "papers", "science")
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_input_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        tokenize_jsonl([tmp_path / "no.jsonl"], tokenizer, tmp_path / "out", "web", "general")
    assert caught.value.where == tmp_path / "no.jsonl"
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_place_is_left_alone(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tokenize_jsonl([jsonl], tokenizer, out, "web", "general")  # an empty folder is no obstacle
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="taken"):
        tokenize_jsonl([jsonl], tokenizer, out, "web", "general")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_for_a_place_is_followed(
    jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, there: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "web").mkdir()
    (tmp_path / "out").symlink_to(disk / "web")
    manifest = tokenize_jsonl([jsonl], tokenizer, tmp_path / "out", "web", "general")
    assert Manifest.load(tmp_path / "out") == manifest
    assert (tmp_path / "out").is_symlink() and [path.name for path in disk.iterdir()] == ["web"]


def test_a_mounted_disk_is_no_place_and_is_refused_before_anything_is_made(
    jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize.os.path, "ismount", lambda path: path == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="mounted"):
        tokenize_jsonl([jsonl], tokenizer, tmp_path / "out", "web", "general")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


@pytest.mark.parametrize("name", ["", "\udcff"])
def test_a_name_that_no_manifest_takes_is_refused_before_anything_is_made(
    jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="cannot have this manifest"):
        tokenize_jsonl([jsonl], tokenizer, tmp_path / "out", name, "general")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_shard_holds_at_least_a_token(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        tokenize_jsonl([jsonl], tokenizer, tmp_path / "out", "web", "general", shard_tokens=0)


def test_a_large_vocabulary_is_stored_in_32_bits(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    large = Tokenizer(70_000, tokenizer.eod_id, tokenizer.sha256, tokenizer._backend, tokenizer.content)
    manifest = tokenize_jsonl([jsonl], large, tmp_path / "out", "web", "general")
    assert np.dtype(manifest.dtype).itemsize == 4


class Wrong:
    """gigatoken, but for one id."""

    name = "gigatoken 0.0"

    def __init__(self, tokenizer: Tokenizer, wrong: int) -> None:
        self._reference, self._wrong = fast_bpe.ReferenceEncoder(tokenizer), wrong

    def encode(self, texts: list[str]) -> fast_bpe.Encoded:
        ids, lengths = self._reference.encode(texts)
        return fast_bpe.Encoded(np.where(ids == self._wrong, 0, ids).astype(np.uint32), lengths)


@pytest.mark.parametrize(
    ("text", "found"), [("ab~c", "in.jsonl, 2 from 0 on, character 2"), ("abc", "built-in string 0")]
)
def test_an_encoder_that_is_wrong_once_is_not_used_and_one_line_says_where(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str
) -> None:
    monkeypatch.setattr(tokenize, "nasty_texts", lambda tokenizer: ["~"])
    (tilde,) = tokenizer.encode_batch(["~"])[0].tolist()
    choose = fast_bpe.choose
    monkeypatch.setattr(
        tokenize,
        "choose",
        lambda t, backend="auto": choose(t, backend) if backend == "tokenizers" else (Wrong(t, tilde), None),
    )
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}, {"text": text}])
    said: list[str] = []
    made = tokenize.tokenize([path], tokenizer, tmp_path / "out", "web", "d", say=said.append)
    assert made.encoder.startswith("tokenizers ")
    (line,) = said
    assert found in line and f"id 0 against {tilde}" in line and "tokenizers" in line and "\n" not in line
    assert documents(tmp_path / "out", made.manifest) == [
        [*ids.tolist(), tokenizer.eod_id] for ids in tokenizer.encode_batch(["x", text])
    ]
    with pytest.raises(DataError, match="reference's ids"):
        tokenize.tokenize([path], tokenizer, tmp_path / "two", "web", "d", backend="gigatoken")
    assert not (tmp_path / ".two.tokenizing").exists()


def test_an_encoder_that_cannot_be_taken_is_said_in_one_line(
    jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    said: list[str] = []
    made = tokenize.tokenize([jsonl], tokenizer, tmp_path / "out", "web", "d", say=said.append)
    assert made.encoder.startswith("tokenizers ")
    assert len(said) == 1 and "gigatoken is not installed" in said[0] and "\n" not in said[0]
    with pytest.raises(EnvironmentProblem, match="gigatoken is not installed"):
        tokenize.tokenize([jsonl], tokenizer, tmp_path / "two", "web", "d", backend="gigatoken")
