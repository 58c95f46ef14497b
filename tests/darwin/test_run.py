"""A recipe from raw files to a corpus: what documents know, bad input, resumed runs, and the count at the end."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import time
from datetime import date

import numpy as np
import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin import normalise, parts
from megatron_davinci.darwin.corpus import Corpus, check
from megatron_davinci.darwin.pipeline import note
from megatron_davinci.darwin.provenance import text_hash
from megatron_davinci.darwin.rules import Length
from megatron_davinci.darwin.step import Outcome, Step
from megatron_davinci.data.jsonl import Document, Fields
from megatron_davinci.data.text_inputs import read_documents
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem
from tests.cases import is_long
from tests.darwin.making import SOURCES, digests, made, prose, raw_files, recipe
from tests.darwin.test_rules import document


def test_every_document_knows_its_level_source_licence_and_history(corpus):
    records = list(corpus.records())
    assert len({record["id"] for record in records}) == len(records) == corpus.counts["output"]
    operations = {(op["name"], op["parameters"]): op for op in corpus.manifest["operations"]}
    for record in records:
        darwin = record["darwin"]
        names = [entry["name"] for entry in darwin["operations"]]
        assert names[0] == "unique_ids" or names[0] == "acquire"
        assert darwin["level"] == max(entry["level"] for entry in darwin["operations"]) == 2
        assert all((entry["name"], entry["parameters"]) in operations for entry in darwin["operations"])
        last = [entry for entry in darwin["operations"] if "sha" in entry][-1]
        assert last["sha"] == text_hash(record["text"])
        assert record["licence"] == (None if record["source"] == "pages" else "PSF-2.0")
    page = next(record for record in records if record["id"].endswith("page2.html"))
    assert "return x ** 2" in page["text"] and "var x" not in page["text"] and "<p>" not in page["text"]
    [extracted] = [entry for entry in page["darwin"]["operations"] if entry["name"] == "extract_html"]
    assert extracted["result"] == "changed" and extracted["model"].startswith("resiliparse ")


def test_the_first_of_duplicates_stays_and_is_named(corpus):
    [again] = [record for record in corpus.records("dropped") if record["fate"]["step"] == "exact_dedup"]
    assert again["id"].endswith("page1.html") and again["fate"]["reason"] == "exact_duplicate"
    assert again["darwin"]["operations"][-1]["notes"]["of"].endswith("again.html")


def test_what_comes_out_does_not_depend_on_tasks_and_workers(folder, corpus):
    def documents(corpus):
        return [
            record for name in ("help", "pages", "code")
            for path in corpus.files() if path.parent.name == name for record in parts.read_part(path)
        ]  # fmt: skip

    other = made(recipe(folder, "small-tasks", limits={"task_bytes": 30_000}), workers=2)
    assert other.manifest["input"]["tasks"] > 4 and corpus.manifest["input"]["tasks"] == 1
    key = "parameters"
    ours, theirs = json.dumps(documents(corpus)), json.dumps(documents(other))
    assert re.sub(rf'"{key}": "\w+"', "", ours) == re.sub(rf'"{key}": "\w+"', "", theirs)
    assert other.counts == corpus.counts


def test_the_corpus_is_what_tokenize_takes_and_tokens_are_counted(folder, corpus, capsys):
    from megatron_davinci.data.tokenizer import Tokenizer

    tokenizer = str(folder / "tokenizer")
    files = [str(path) for path in corpus.files() if path.parent.name == "help"]
    assert main(["data", "train-tokenizer", *files, "--vocab-size", "300", "--out", tokenizer]) == 0
    other = made(recipe(folder, "tables", output={"format": "parquet", "tokenizer": tokenizer}))
    assert [r["text"] for r in other.records()] == [r["text"] for r in corpus.records()]
    assert [r["darwin"] for r in other.records()] == [r["darwin"] for r in corpus.records()]
    loaded = Tokenizer.load(folder / "tokenizer")
    tokens = sum(len(loaded.encode_batch([r["text"]])[0]) for r in other.records() if r["source"] == "help")
    kept = other.manifest["sources"]["help"]["levels"]["2"]
    assert kept["tokens"] == tokens > 1000
    for name, of in (("lines", corpus), ("table", other)):
        files = [str(path) for path in of.files() if path.parent.name == "help"]
        source = str(folder / f"source-{name}")
        assert (
            main(["data", "tokenize", *files, "--tokenizer", tokenizer, "--out", source, "--workers", "1"])
            == 0
        )
        assert f"{kept['documents']} documents" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "parquet"])
def test_a_part_gives_back_what_was_written_and_pairs_keep_their_mask(tmp_path, ending):
    darwin = {"level": 5, "origin": {"path": "caf\udce9.txt", "row": 2**70}, "operations": []}
    plain = {"id": "a", "text": "é", "source": "s", "licence": None, "darwin": darwin}
    fields = {"large": 2**64, "larger": -(10**30), "half": "\ud800", "number": 0.1, "none": None}
    records = [
        plain, plain | {"id": "b", "fields": fields}, plain | {"id": "half \udce9"},
        plain | {"id": "c", "text": "why? so", "prompt": "why? ", "response": "so"},
        plain | {"id": "d", "prompt": 3, "response": None},
    ]  # fmt: skip
    path = tmp_path / f"part.{ending}"
    with parts.Parts() as written:
        for record in records:
            written.write(path, record)
    assert list(parts.read_part(path)) == records
    assert repr(list(parts.read_part(path))[1]["fields"]["larger"]) == str(-(10**30))  # and no float
    found = list(read_documents(path, Fields("text", "prompt", "response"))) if ending == "parquet" else []
    assert Document("why? ", "so") in found or ending != "parquet"


def test_what_json_has_no_word_for_is_written_the_same_way_beside_what_is_slow_to_write():
    odd = {"nan": float("nan"), "many": (1, float("inf")), "date": date(2026, 1, 2), "array": np.arange(2)}
    there = parts.load(parts.dump(odd | {"large": 2**70}))
    assert there == parts.load(parts.dump(odd)) | {"large": 2**70}
    deep = json.loads('{"a":' * 900 + "1" + "}" * 900)
    assert parts.load(parts.dump(deep)) == deep
    assert there["nan"] is None and there["date"] == "2026-01-02" and there["array"] == [0, 1]


def test_bad_input_is_counted_and_kept_with_its_reason(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    raw.mkdir()
    good = prose()[20]
    line = json.dumps({"key": "one", "text": good})
    lines = [
        line.encode(), line.encode(),                                   # an identifier given twice
        b"{broken", b'{"key": "two"}', b'{"key": "three", "text": 3}',  # no JSON, no text, no string
        b'["a list"]', b'{"key": "four", "text": "\xff\xfe"}',          # no object, no UTF-8
        b'{"key": "", "text": "x"}', b'{"key": "five", "text": "\\ud800"}',
        b'{"key": "six", "text": "' + b"x" * 200_000 + b'"}',           # larger than a document may be
    ]  # fmt: skip
    (raw / "a.jsonl").write_bytes(b"\n".join(lines))
    whole = gzip.compress(
        "\n".join(
            json.dumps({"key": f"g{i}", "text": text}) for i, text in enumerate(prose()[40:60])
        ).encode()
    )
    (raw / "b.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    (raw / "broken.txt.gz").write_bytes(gzip.compress(good.encode())[:-10])
    (raw / "picture.txt").write_bytes(bytes(range(256)) * 20)
    (raw / "latin.txt").write_bytes(
        "Vingt-et-un élèves ont été reçus à l’école cet été, déclara le préfet. ".encode("cp1252") * 8
    )
    (raw / "utf16.txt").write_bytes(good.encode("utf-16"))
    (raw / "big.txt").write_bytes(b"y" * 200_000)
    (raw / "hangs.html").write_text("<p>never</p>")
    (raw / "dies.html").write_text("<p>kill</p>")
    (raw / "raises.html").write_text("<p>raise</p>")
    (raw / "empty.html").write_text("<html><body></body></html>")
    monkeypatch.setattr(normalise.ExtractHtml, "extractor", staticmethod(extractor_of_bad_manners))
    (raw / "zeros.py").write_bytes(b"\n" * 50)
    steps = [
        {"extract_html": {"seconds": 0.5}},
        "normalise_text",
        {"length": {"min_characters": 1}},
        "exact_dedup",
    ]
    sources = [SOURCES[0], SOURCES[1] | {"paths": ["raw/*.html", "raw/*.txt", "raw/*.txt.gz"]}, SOURCES[2]]
    corpus = made(recipe(tmp_path, sources=sources, steps=steps, limits={"document_bytes": 100_000}))
    counts = corpus.counts
    assert counts["quarantined"] == {
        "acquire/binary": 1, "acquire/broken_gzip": 2, "acquire/half_surrogate": 1, "acquire/no_id": 1,
        "acquire/no_text": 2, "acquire/not_json": 2, "acquire/not_utf8": 1, "acquire/too_large": 2,
        "extract_html/extractor_died": 1, "extract_html/extractor_failed": 1, "extract_html/extractor_timeout": 1,
        "extract_html/no_text_in_page": 1, "unique_ids/duplicate_id": 1,
    }  # fmt: skip
    texts = {record["id"]: record["text"] for record in corpus.records()}
    assert texts["help/one"] == good.strip("\n") or texts["help/one"]
    assert "élèves ont été reçus à l’école" in texts["pages/raw/latin.txt"]
    assert any(key.startswith("help/g") for key in texts), "what comes before the break is there"
    assert counts["input"] == counts["output"] + sum(counts["dropped"].values()) + sum(
        counts["quarantined"].values()
    )
    for record in corpus.records("quarantine"):
        assert record["fate"]["reason"] and record["darwin"]["origin"]["path"].startswith(str(raw))
    [long] = [
        r for r in corpus.records("quarantine") if r["fate"]["reason"] == "too_large" and "jsonl" in r["id"]
    ]
    assert long["darwin"]["origin"]["bytes"] > 200_000


def extractor_of_bad_manners(html: str, main_content: bool, links: bool) -> tuple[str, str]:
    if "never" in html:
        re.match(r"(a+)+$", "a" * 64 + "b")  # years, inside C
    if "kill" in html:
        import os

        os._exit(1)
    if "raise" in html:
        return "", "ValueError: what the library says"
    return normalise.html_to_text(html, main_content, links)


class Crash(Exception):
    pass


def test_a_run_that_stops_anywhere_goes_on_to_the_same_corpus(folder, monkeypatch):
    steps = ["normalise_text", {"length": {"min_characters": 3000}}, "exact_dedup"]
    smaller = {"limits": {"task_bytes": 40_000}, "sources": [SOURCES[0], SOURCES[2]], "steps": steps}
    loaded = recipe(folder, "stopped", **smaller)
    expected = digests(made(recipe(folder, "whole", **smaller)).folder)
    commit, draw = parts.PartWriter.commit, random.Random(0)
    stops = 0
    for _ in range(20 if is_long() else 3):
        left = draw.randrange(1, 3 if is_long() else 7)  # many stops, and something left to do after them

        def stop(writer, left=[left]):  # noqa: B006
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            commit(writer)

        monkeypatch.setattr(parts.PartWriter, "commit", stop)
        try:
            made(loaded)
        except Crash:
            stops += 1
            assert not (folder / "stopped" / "corpus.json").exists()
        else:
            break
    monkeypatch.setattr(parts.PartWriter, "commit", commit)
    # What an attempt put aside and the next one took: an extractor may be slow once.
    tasks = json.loads((folder / "stopped" / "plan.json").read_text())["deal"]
    stale = folder / "stopped" / "quarantine" / f"02-{len(tasks) - 2:05d}.jsonl.zst"
    with parts.Parts() as writing:
        writing.write(stale, {"id": "x", "text": "", "darwin": {}})
    corpus = made(loaded)
    assert stops >= 2 and not stale.exists()
    assert digests(corpus.folder) == expected
    assert not (corpus.folder / "work").exists()


def test_another_recipe_does_not_go_on_with_a_corpus(folder, corpus):
    with pytest.raises(ConfigError, match="other steps"):
        made(recipe(folder, steps=["normalise_text"]))
    recipe(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    raw_files(tmp_path / "raw", documents=2)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match="something else"):
        made(recipe(tmp_path), restart=True)
    assert (tmp_path / "corpus" / "thesis.txt").read_text() == "all of it"


def test_a_lost_document_is_noticed(folder, corpus):
    counts = corpus.counts
    check(corpus.folder, counts, [counts["input"]])
    with pytest.raises(DataError, match="missing"):
        check(corpus.folder, counts | {"input": counts["input"] + 1}, [counts["input"] + 1])
    path = corpus.files("dropped")[0]
    whole = path.read_bytes()
    records = list(parts.read_part(path))
    try:
        with parts.Parts() as writing:
            writing.open(path)
            for record in records[1:]:
                writing.write(path, record)
        with pytest.raises(DataError, match="missing"):
            check(corpus.folder, counts, [counts["input"]])
    finally:
        path.write_bytes(whole)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.os, "fsync", full)
    writing = parts.Parts()
    writing.write(tmp_path / "x.jsonl.zst", {"text": "one"})
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        writing.__exit__(None, None, None)
    monkeypatch.undo()
    parts.remove_temporary(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Rewrites(Step):
    name, level, about = "rewrites", 3, "selects, and must not write"

    def apply(self, document):
        return Outcome(text=document.text.upper())


class Tampers(Rewrites):
    def apply(self, document):
        document.text += " and more"
        return Outcome()


class Dies(Step):
    name, level, about = "dies", 2, "is killed, as if for its memory"

    def apply(self, document):
        if document.id.endswith("csv.py"):
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome()


def test_a_worker_that_is_killed_is_said_and_tasks_that_were_done_are(tmp_path, monkeypatch):
    from megatron_davinci.darwin.recipe import STEPS

    raw_files(tmp_path / "raw", documents=1)
    monkeypatch.setitem(STEPS, "dies", Dies)
    loaded = recipe(tmp_path, sources=SOURCES[2:], steps=["dies"], limits={"task_bytes": 20_000})
    with pytest.raises(EnvironmentProblem, match="A worker was killed"):
        made(loaded, workers=2)
    monkeypatch.setattr(Dies, "apply", lambda step, document: Outcome())
    assert made(loaded).counts["output"] == 6


def test_selection_never_changes_a_text(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="may not"):
        note(Rewrites(Length.Parameters()), document("text"), Outcome(text="TEXT"))
    from megatron_davinci.darwin.recipe import STEPS

    raw_files(tmp_path / "raw", documents=2)
    monkeypatch.setitem(STEPS, "tampers", Tampers)
    with pytest.raises(DataError, match="did not leave a text as it was"):
        made(recipe(tmp_path, sources=SOURCES[2:], steps=["tampers"]))


def test_the_command_says_what_became_of_the_documents(folder, corpus, capsys):
    began = time.time()
    assert main(["data", "run", str(folder / "corpus.yaml")]) == 0
    shown = capsys.readouterr().out
    counts = corpus.counts
    assert f"{counts['output']:,} of {counts['input']:,} documents" in shown
    assert "exact_duplicate" in shown and "PSF-2.0" in shown
    assert (corpus.folder / "corpus.json").stat().st_mtime < began, "a finished corpus is left as it is"


def test_there_is_no_corpus_before_the_end(tmp_path):
    with pytest.raises(DataError, match="no finished corpus"):
        Corpus.load(tmp_path)
