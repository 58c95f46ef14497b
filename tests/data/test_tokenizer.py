"""The tokenizer: trained in Qwen2's manner, the same each time, and deaf to special tokens in text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.tokenizer import EOD, QWEN2_SPLIT, Tokenizer, train_bpe
from megatron_davinci.errors import ConfigError, DataError

VOCAB = 330
TEXTS = [
    f"The {word} of {number} tokens isn't what we've counted: café, 数据, \U0001f642.\n\n    return x{number}"
    for number, word in enumerate(["order", "mixture", "window", "shard", "stage", "curriculum"] * 20)
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe([corpus], VOCAB, tmp_path_factory.mktemp("tokenizer") / "new")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def edited(folder: Path, out: Path, **changes: Any) -> Path:
    """A copy of the tokenizer with other fields in its JSON."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content.update(changes)
    out.mkdir(exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def test_the_vocabulary_is_the_size_that_was_asked_for_and_ends_with_the_end_of_document(
    tokenizer: Tokenizer, folder: Path
) -> None:
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.eod_id == VOCAB - 1
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert [token["content"] for token in content["added_tokens"]] == [EOD]
    assert content["normalizer"] == {"type": "NFC"}


def test_training_again_gives_the_same_bytes(corpus: Path, folder: Path, tmp_path: Path) -> None:
    again = train_bpe([corpus], VOCAB, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert Tokenizer.load(again).sha256 == Tokenizer.load(folder).sha256


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_every_text_comes_back_in_its_composed_form(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.text(alphabet="ab1 '\n\t.é数sT", max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_token_crosses_a_boundary_of_the_split(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    pieces = regex.findall(QWEN2_SPLIT, text)
    assert "".join(pieces) == text
    whole = tokenizer.encode_batch([text])[0].tolist()
    assert whole == [token for ids in tokenizer.encode_batch(pieces) for token in ids.tolist()]


@given(st.text(max_size=10), st.text(max_size=10))
@settings(max_examples=30, deadline=None)
def test_a_special_token_in_a_text_is_its_characters(tokenizer: Tokenizer, before: str, after: str) -> None:
    text = f"{before}{EOD}{after}"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_so_it_is_when_the_file_calls_the_token_ordinary(folder: Path, tmp_path: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ordinary = Tokenizer.load(edited(folder, tmp_path / "o", added_tokens=[added[0] | {"special": False}]))
    assert ordinary.eod_id not in ordinary.encode_batch([f"a {EOD} b"])[0]


def test_an_end_of_document_that_text_can_spell_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="a piece of ordinary text"):
        Tokenizer.load(folder, eod_token="a")


def test_truncation_and_padding_in_the_file_do_not_touch_documents(folder: Path, tmp_path: Path) -> None:
    changed = edited(
        folder,
        tmp_path / "t",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": EOD,
        },
    )
    for ours, theirs in zip(
        Tokenizer.load(folder).encode_batch(TEXTS), Tokenizer.load(changed).encode_batch(TEXTS)
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_transformers_loads_it_and_gives_the_same_ids(tokenizer: Tokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.eos_token == EOD
    assert theirs.eos_token_id == tokenizer.eod_id
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS[:5]:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode_batch([text])[0].tolist()
        assert theirs.decode(ids) == text


def test_the_configured_end_token_serves_where_there_is_no_endoftext(folder: Path, tmp_path: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    other = edited(folder, tmp_path / "c", added_tokens=[added[0] | {"content": "</s>"}])
    with pytest.raises(DataError, match="no end-of-document token"):
        Tokenizer.load(other)
    for eos in ("</s>", {"content": "</s>", "lstrip": False}):
        (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
        assert Tokenizer.load(other).eod_id == VOCAB - 1
    assert Tokenizer.load(other, eod_token="</s>").eod_id == VOCAB - 1
    with pytest.raises(DataError, match="no end-of-document token"):
        Tokenizer.load(other, eod_token="<end>")


def test_vocab_size_is_the_largest_id_plus_one_also_over_a_gap(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = content["model"], [content["added_tokens"][0] | {"id": VOCAB + 6}]
    model["vocab"][EOD] = VOCAB + 6
    gap = Tokenizer.load(edited(folder, tmp_path / "g", model=model, added_tokens=added))
    assert gap.vocab_size == VOCAB + 7
    assert gap.eod_id == VOCAB + 6


def test_an_added_token_that_would_be_numbered_anew_is_an_error(folder: Path, tmp_path: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    moved = edited(folder, tmp_path / "m", added_tokens=[added[0] | {"id": VOCAB + 6}])
    with pytest.raises(DataError, match="does not get the id") as caught:
        Tokenizer.load(moved)
    assert caught.value.expected == f"id {VOCAB + 6}"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', '{"added_tokens": [{}]}', "\u00e9"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="damaged, or is something else") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.where == tmp_path / "tokenizer.json"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        Tokenizer.load(tmp_path / "nowhere")
    assert caught.value.where == tmp_path / "nowhere"


def test_training_refuses_what_cannot_be(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        train_bpe([corpus], 256, tmp_path / "a")
    with pytest.raises(DataError, match="too few for the vocabulary"):
        train_bpe([corpus], 50_000, tmp_path / "b")
    with pytest.raises(DataError, match="no field 'body'"):
        train_bpe([corpus], VOCAB, tmp_path / "c", text_field="body")
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_vocabulary_is_bytes_and_the_end_of_a_document(corpus: Path, tmp_path: Path) -> None:
    smallest = Tokenizer.load(train_bpe([corpus], 257, tmp_path / "s"))
    assert len(smallest.encode_batch(["数据"])[0]) == len("数据".encode())
