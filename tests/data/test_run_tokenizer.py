"""A run's tokenizer ends documents as the run's sources do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_davinci.config.data import DataConfig
from megatron_davinci.data import tokenize
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.run_tokenizer import end_of_documents, manifests, run_tokenizer
from megatron_davinci.data.tokenizer import EOD, Tokenizer
from megatron_davinci.errors import DataError
from megatron_davinci.evaluate.texts import held_out_texts
from tests.data.tokenizing import EOD_ENTRY, telling_tokenizer, write_jsonl

END = "<|end|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with two tokens that can end documents; its own is the first."""
    file = telling_tokenizer(tmp_path)
    file = file / "tokenizer.json" if file.is_dir() else file
    content = json.loads(file.read_text())
    (entry,) = content["added_tokens"]
    content["added_tokens"].append({**EOD_ENTRY, "content": END, "id": entry["id"] + 1})
    file.write_text(json.dumps(content))
    return file


def source(tmp_path: Path, tokenizer: Path, name: str, eod: str | None) -> str:
    path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"text {n} of {name}"} for n in range(9)])
    tokenize.tokenize([path], Tokenizer.load(tokenizer, eod), tmp_path / name, name, "d")
    return str(tmp_path / name)


def said_by(**paths: str) -> list[Manifest]:
    sources = {name: {"path": path} for name, path in paths.items()}
    return list(manifests(DataConfig.model_validate({"sequence_length": 8, "sources": sources})).values())


def test_what_ended_documents_ends_texts(tmp_path: Path, folder: Path) -> None:
    data = said_by(a=source(tmp_path, folder, "a", END), gone=str(tmp_path / "gone"))
    own, found = Tokenizer.load(folder), run_tokenizer(folder, data)
    assert (own.eod_token, found.eod_token) == (EOD, END) and found.eod_id == end_of_documents(data)
    assert (own.own_end, found.own_end) == (True, False)
    assert run_tokenizer(folder, manifests(None).values()) == own
    # Documents of a held-out source end where it says.
    for tokenizer in (own, found):
        texts = held_out_texts({"d": tmp_path / "a"}, None, tokenizer, 8, 3)
        assert texts == {"d": ["text 0 of a", "text 1 of a", "text 2 of a"]}


def test_sources_that_end_documents_in_two_ways_say_none(tmp_path: Path, folder: Path) -> None:
    data = said_by(a=source(tmp_path, folder, "a", END), b=source(tmp_path, folder, "b", None))
    assert end_of_documents(data) is None and run_tokenizer(folder, data).eod_token == EOD


def test_a_tokenizer_without_an_end_of_its_own_has_the_sources(tmp_path: Path, folder: Path) -> None:
    data = said_by(a=source(tmp_path, folder, "a", END))
    content = json.loads(folder.read_text())
    content["added_tokens"][0]["content"] = "<|other|>"
    folder.write_text(json.dumps(content))
    (folder.parent / "tokenizer_config.json").write_text("{")
    assert run_tokenizer(folder, data).eod_token == END
    with pytest.raises(DataError, match=r"tokenizer_config.json cannot be read"):
        run_tokenizer(folder, manifests(None).values())
