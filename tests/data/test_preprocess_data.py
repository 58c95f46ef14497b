"""`tools/preprocess_data.py`: Megatron-LM's flags, and what Megatron-LM's rules would have written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.tokenizer import EOD, Tokenizer
from tests.data.tokenizing import telling_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
ROWS = [{"text": f"abba {n} \u6570" * (n % 4), "title": f"it's {n}"} for n in range(50)]


def preprocess(*arguments: object, expect: int = 0) -> str:
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return telling_tokenizer(tmp_path_factory.mktemp("telling"))


def by_megatrons_rules(prefix: Path, tokenizer: Tokenizer, key: str, eod: bool) -> None:
    """What Megatron-LM's script does with each line, written by Megatron-Core's own builder."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for row in ROWS:
        ids = tokenizer.encode_batch([row[key]])[0].tolist()
        if ids and eod:
            ids.append(tokenizer.eod_id)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("eod", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_files_are_those_of_megatrons_rules_and_megatron_core_reads_them(
    tokenizer: Path, tmp_path: Path, eod: bool
) -> None:
    for n, rows in enumerate((ROWS[:20], ROWS[20:])):
        write_jsonl(tmp_path / f"in_{n}.jsonl", rows)
    said = preprocess(
        "--input", tmp_path / "in_*.jsonl", "--json-keys", "text", "title", "--output-prefix", tmp_path / "out",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--workers", 2,
        "--partitions", 2, "--keep-sequential-samples", "--log-interval", 10, *(["--append-eod"] if eod else []),
    )  # fmt: skip
    loaded = Tokenizer.load(tokenizer)
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for key in ("text", "title"):
        by_megatrons_rules(tmp_path / "theirs", loaded, key, eod)
        ours = tmp_path / f"out_{key}_document"
        for ending in ("bin", "idx"):
            assert Path(f"{ours}.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
        read = indexed.IndexedDataset(str(ours))
        expected = [row[key] for row in ROWS if row[key]]
        assert [loaded.decode(read[i]).removesuffix(EOD) for i in range(len(read))] == expected
        assert len(read.document_indices) == len(ROWS) + 1
        assert f"out_{key}_document: 50 documents" in said
    names = {path.name for path in tmp_path.iterdir()} - {
        "theirs.bin",
        "theirs.idx",
        "in_0.jsonl",
        "in_1.jsonl",
    }
    assert names == {f"out_{key}_document.{ending}" for key in ("text", "title") for ending in ("bin", "idx")}


def test_gpt2_files_make_the_same_as_their_tokenizer_json(tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    model = content["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {EOD: len(model["vocab"])}))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    preprocess(
        "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--append-eod",
        "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", tmp_path / "vocab.json",
        "--merge-file", tmp_path / "merges.txt",
    )  # fmt: skip
    written = IndexedDataset(tmp_path / "out_text_document")
    assert written.dtype == np.uint16
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    same = Tokenizer.load(telling_tokenizer(tmp_path / "same", pre_tokenizer=gpt2, normalizer=None))
    expected = [
        [*ids.tolist(), same.eod_id] for ids in same.encode_batch([r["text"] for r in ROWS if r["text"]])
    ]
    assert [written[i].tolist() for i in range(len(written))] == expected


def test_what_it_refuses(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [*ROWS, {"title": "no text"}])
    given = ("--input", path, "--output-prefix", tmp_path / "out", "--tokenizer-type", "HuggingFaceTokenizer")
    assert "--tokenizer-model" in preprocess(*given, expect=2)
    given += ("--tokenizer-model", tokenizer)
    assert "--split-sentences" in preprocess(*given, "--split-sentences", expect=2)
    assert f"{path}:51" in preprocess(*given, expect=2)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    assert "1 bad records" in preprocess(*given, "--on-error", "skip")
    assert json.loads((tmp_path / "out_text_document.quarantine.jsonl").read_text())["line"] == 51
    assert "is there already" in preprocess(*given, expect=2)
