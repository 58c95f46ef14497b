"""A trained token followed back: sample, window, document, raw file, bytes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from megatron_davinci.cli.main import main
from megatron_davinci.data import sidecar
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.tokenize import Options, tokenize
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.errors import DataError
from tests.darwin.making import made, recipe
from tests.tiny import LENGTH, tiny_settings


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(corpus.files(), 300, folder)
    return Tokenizer.load(folder)


def source(corpus, tokenizer, folder, **options):
    tokenize(corpus.files(), tokenizer, folder, "all", "general", Options(**options), workers=1)
    return Manifest.load(folder)


@pytest.mark.parametrize(
    "options, format_", [({}, "jsonl.zst"), ({"shuffle": 5}, "parquet")], ids=["in order", "shuffled"]
)
def test_row_i_is_where_sequence_i_is_from(folder, corpus, tokenizer, tmp_path, options, format_):
    if format_ == "parquet":
        corpus = made(recipe(folder, "as-tables", output={"format": "parquet"}))
    manifest = source(corpus, tokenizer, tmp_path / "source", shard_tokens=15_000, **options)
    assert len(manifest.shards) > 2
    records = {record["id"]: record for record in corpus.records()}
    seen = []
    for shard in manifest.shards:
        prefix = tmp_path / "source" / shard.prefix
        dataset = IndexedDataset(prefix)
        assert sidecar.sidecar_path(prefix).exists() and len(dataset) == shard.documents
        for number in range(len(dataset)):
            origin = sidecar.origin_of(prefix, number)
            record = records[origin["id"]]
            seen.append(origin["id"])
            assert tokenizer.decode(np.asarray(dataset[number])[:-1]) == record["text"]
            assert {key: origin[key] for key in ("source", "licence")} == {
                key: record[key] for key in ("source", "licence")
            }
            assert origin["level"] == record["darwin"]["level"] and origin["corpus"] == str(corpus.folder)
            raw = record["darwin"]["origin"]
            assert {key: origin[key] for key in raw} == raw
    assert sorted(seen) == sorted(records)
    assert (seen == list(records)) == (not options)
    with pytest.raises(DataError, match="fewer rows"):
        sidecar.origin_of(prefix, len(dataset))


@pytest.mark.parametrize(
    "darwin",
    ["Charles", {"origin": "Galapagos"}, {"origin": None}, "[1]", 1859],
    ids=lambda value: str(value),
)
def test_a_field_of_that_name_may_be_somebody_elses(tokenizer, tmp_path, darwin):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "darwin": darwin}) + "\n")
    tokenize([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", "a", "a", workers=1)
    assert Manifest.load(tmp_path / "out").documents == 1
    assert sidecar.origin_of(tmp_path / "out" / "shard-00000", 0) is None


def test_a_record_may_be_nested_more_deeply_than_one_of_the_parsers_goes(tokenizer, tmp_path):
    deep = '{"text": "one", "of": ' + "[" * 1010 + "]" * 1010 + "}\n"
    (tmp_path / "a.jsonl").write_text(deep + '{"text": "two"}\n')
    made = tokenize([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", "a", "a", workers=1, on_error="skip")
    assert made.manifest.documents + made.bad == 2


def test_a_column_of_dates_that_python_has_not_leaves_the_text_alone(tokenizer, tmp_path):
    dates = pyarrow.array([1 << 62]).cast(pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "id": dates}), tmp_path / "a.parquet")
    made = tokenize([tmp_path / "a.parquet"], tokenizer, tmp_path / "out", "a", "a", workers=1)
    assert made.manifest.documents == 1 and made.bad == 0


def test_documents_of_others_may_follow_with_values_of_any_kind(tokenizer, tmp_path):
    ours = {
        "text": "one",
        "id": "x",
        "darwin": {"level": 3, "origin": {"path": "p", "format": "jsonl", "row": 7}},
    }
    theirs = {
        "text": "two",
        "id": 5,
        "source": ["web"],
        "darwin": {"level": "L3", "origin": {"path": 1, "row": "7"}},
    }
    lines = [ours, {"text": "three", "darwin": "Charles"}, theirs]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", "a", "a", workers=1)
    found = [sidecar.origin_of(tmp_path / "out" / "shard-00000", number) for number in range(3)]
    assert [row["id"] for row in found] == ["x", None, "5"]
    assert [(row["level"], row["path"], row["row"]) for row in found] == [
        (3, "p", 7),
        (None,) * 3,
        (None, "1", None),
    ]
    assert found[2]["source"] == '["web"]'


def test_where_nothing_is_known_there_is_no_sidecar(corpus, tokenizer, tmp_path):
    (tmp_path / "plain.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    tokenize([tmp_path / "plain.jsonl"], tokenizer, tmp_path / "plain", "a", "a", workers=1)
    source(corpus, tokenizer, tmp_path / "packed", pack=64)
    assert list(tmp_path.rglob("*.parquet")) == []
    assert sidecar.origin_of(tmp_path / "plain" / "shard-00000", 0) is None


def test_a_sample_is_followed_to_its_raw_bytes(corpus, tokenizer, tmp_path, capsys):
    for name in "ab":
        source(corpus, tokenizer, tmp_path / "data" / name)
    settings = tiny_settings(tmp_path, model={"vocab_size": 300})
    settings["data"]["validation"] = {}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["data", "order", str(config), "--at", "7", "--lineage", "--json"]) == 0
    [sample] = json.loads(capsys.readouterr().out)["samples"]
    documents = sample["window"]["documents"]
    assert sum(end - first for first, end in (document["in_window"] for document in documents)) == LENGTH + 1
    for document in documents:
        origin = document["origin"]
        with open(origin["path"], "rb") as file:
            assert file.read(2) != b"\x1f\x8b"
            file.seek(origin["first"])
            raw = file.read(origin["bytes"])
        text = json.loads(raw)["text"] if origin["format"] == "jsonl" else raw.decode()
        record = next(record for record in corpus.records() if record["id"] == origin["id"])
        assert record["text"][:40] in text.replace("\r\n", "\n") or origin["format"] == "html"
    assert main(["data", "order", str(config), "--at", "7", "--lineage"]) == 0
    shown = capsys.readouterr().out
    assert (
        documents[0]["origin"]["path"] in shown
        and f"davinci data lineage {documents[0]['origin']['id']}" in shown
    )
    assert main(["data", "order", str(config), "--at", "7"]) == 0
    assert "lineage" not in capsys.readouterr().out
