"""What a run is begun with, and goes on with: input as it was, a folder of its own, a recipe that can be kept."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin import parts
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.data.sidecar import origin_of
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem
from megatron_davinci.files import write_json
from tests.darwin.making import SOURCES, digests, made, prose, raw_files, recipe
from tests.darwin.test_run import Crash


def code(folder, **changes):
    """A recipe of six files of source code."""
    raw_files(folder / "raw", documents=2)
    return recipe(folder, **{"sources": SOURCES[2:], "steps": ["normalise_text", "exact_dedup"]} | changes)


def stopped(loaded, monkeypatch):
    """A run that has a plan, and has done none of its tasks."""
    with monkeypatch.context() as patched:
        patched.setattr(parts.PartWriter, "commit", lambda writer: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            made(loaded)


@pytest.mark.parametrize("content", ["other", None], ids=["of another size", "of the same size"])
def test_changed_input_is_noticed(tmp_path, monkeypatch, content):
    loaded = code(tmp_path)
    stopped(loaded, monkeypatch)
    changed = tmp_path / "raw" / "abc.py"
    before = changed.stat().st_mtime_ns
    changed.write_text(content or changed.read_text().swapcase())
    os.utime(changed, ns=(before, before + 1))
    with pytest.raises(DataError, match=r"abc\.py"):
        made(loaded)
    assert made(loaded, restart=True).counts["input"] == 6


def test_a_plan_that_knows_no_times_is_gone_on_with(tmp_path, monkeypatch):
    loaded = code(tmp_path)
    stopped(loaded, monkeypatch)
    plan = json.loads((loaded.out / "plan.json").read_text())
    write_json(loaded.out / "plan.json", plan | {"files": [file[:6] for file in plan["files"]]})
    assert made(loaded).counts["input"] == 6


@pytest.mark.parametrize(
    "fault",
    [
        {"steps": [{"decontaminate": {"files": ["none.jsonl"]}}]},
        {"sources": [{"name": "code", "paths": ["raw/*.none"]}]},
        {"sources": [{"name": "code", "paths": ["raw/*.py"], "format": "pdf"}]},
        {"output": {"tokenizer": "none"}},
    ],
    ids=["step", "no file", "format", "tokenizer"],
)
def test_a_corpus_is_done_away_with_only_for_one_that_can_be_begun(tmp_path, fault):
    before = digests(made(code(tmp_path)).folder)
    with pytest.raises((ConfigError, DataError)):
        made(code(tmp_path, **fault), restart=True)
    assert digests(tmp_path / "corpus") == before
    assert made(code(tmp_path)).counts["output"] == 6


def test_a_tokenizer_that_is_not_there_is_said_before_the_run_is_begun(tmp_path):
    with pytest.raises(DataError, match="tokenizer"):
        made(code(tmp_path, output={"tokenizer": "tokens"}))
    assert made(code(tmp_path)).counts["output"] == 6  # no other recipe was begun


@pytest.mark.parametrize("out", ["file", "file/within"])
def test_a_folder_that_cannot_be_made_is_said(tmp_path, out):
    loaded = code(tmp_path)
    (tmp_path / "file").write_text("of somebody")
    with pytest.raises((DataError, EnvironmentProblem), match=r"something else|A file system error"):
        made(replace(loaded, recipe=loaded.recipe.model_copy(update={"out": Path(out)})))
    assert (tmp_path / "file").read_text() == "of somebody"


@pytest.mark.parametrize("workers", [0, -3])
def test_a_run_needs_a_worker(tmp_path, workers):
    with pytest.raises(ConfigError, match="needs a worker"):
        made(code(tmp_path), workers=workers)
    assert not (tmp_path / "corpus").exists()


def test_names_that_are_no_unicode_go_through_to_the_end(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    path = os.fsdecode(os.fsencode(raw) + b"/caf\xe9.txt")
    with open(path, "w") as file:
        file.write(prose()[30])
    lines = [{"key": "k\ud800", "text": prose()[31], "of": "\udc00"}, {"key": "k", "text": prose()[32]}]
    (raw / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [SOURCES[0] | {"paths": ["raw/*.jsonl"]}, SOURCES[1] | {"paths": ["raw/*.txt"]}]
    corpus = made(recipe(tmp_path, sources=sources, steps=["normalise_text", "exact_dedup"]), workers=2)
    records = {record["id"]: record for record in corpus.records()}
    name = "pages/raw/caf\\udce9.txt"
    assert set(records) == {"help/k\ud800", "help/k", name}
    assert records[name]["darwin"]["origin"]["path"] == path
    for each in records:
        assert not any(event.trouble for event in events(find([corpus], each)))
    assert main(["data", "report", str(corpus.folder)]) == 0
    for each in records:
        assert main(["data", "lineage", each, "--corpus", str(corpus.folder)]) == 0
    files = [str(path) for path in corpus.files()]
    tokenizer, source = str(tmp_path / "tokenizer"), tmp_path / "source"
    assert main(["data", "train-tokenizer", *files, "--vocab-size", "280", "--out", tokenizer]) == 0
    assert main(["data", "tokenize", *files, "--tokenizer", tokenizer, "--out", str(source)]) == 0
    written = [each.encode("utf-8", "backslashreplace").decode() for each in records]
    assert [origin_of(source / "shard-00000", number)["id"] for number in range(3)] == written
