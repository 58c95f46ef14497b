"""`davinci data inspect` counts what is there and what the run takes, shows samples as they are, and only reads."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from megatron_davinci.cli.data_inspect_answer import Asked, SampleReader
from megatron_davinci.cli.data_inspect_sample import (
    FIRST,
    LAST,
    LEAST,
    Span,
    bracketed,
    coloured,
    from_values,
    spans,
)
from megatron_davinci.cli.data_inspect_screen import bar
from megatron_davinci.config import load_config
from megatron_davinci.data import IndexedDatasetWriter, Journal, Manifest, MixRecord, Shard
from megatron_davinci.data.source import Source
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.train.forecast import Forecast
from megatron_davinci.train.outlook import transforms_of
from tests.cli.screen import Screen, davinci
from tests.data.s3_server import proxy, store
from tests.report.test_page import fetches
from tests.tiny import LENGTH, VOCABULARY, tiny_settings, write_source

__all__ = ["proxy", "store"]  # fixtures

EOD = VOCABULARY - 1
EVIL = "<script>alert(1)</script> \x1b[31mred \u202e [bold]"


def write_qa(folder: Path, name: str = "qa", digest: str | None = "0" * 64) -> Path:
    """Questions without loss and answers with it, in two shards; one document is empty."""
    draw, shards = np.random.default_rng(5), []
    for k in range(2):
        with IndexedDatasetWriter(folder / f"shard-{k}", "uint16", mask=True) as writer:
            for size in (*draw.integers(6, 60, 12).tolist(), 0):
                loss = np.arange(size) >= size // 3
                writer.add_document(np.append(draw.integers(0, EOD, size), EOD)[: size + (size > 0)],
                                    loss=np.append(loss, True)[: size + (size > 0)])  # fmt: skip
        shards.append(Shard.of(f"shard-{k}", writer.written))
    Manifest(name=name, domain="questions", dtype="uint16", vocab_size=VOCABULARY, eod_id=EOD,
             tokenizer_sha256=digest, shards=tuple(shards)).save(folder)  # fmt: skip
    return folder


@pytest.fixture
def config(tmp_path) -> Path:
    """Three sources in two stages: qa is small and often seen, b is never used."""
    sources = {name: {"path": str(tmp_path / "data" / name)} for name in ("a", "b")}
    settings_ = tiny_settings(tmp_path)
    write_qa(tmp_path / "qa")
    sources["qa"] = {"path": str(tmp_path / "qa"), "domain": "q"}
    settings_["data"]["sources"] = sources
    write_source(tmp_path / "held", "a", seed=9, documents=5)
    settings_["data"]["validation"] = {"a": str(tmp_path / "held")}
    settings_["curriculum"][0]["mixture"] = {"a": 1}
    settings_["curriculum"][1]["mixture"] = {"a": 0.3, "qa": 0.7}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings_))
    return path


def inspect(*words: object) -> Screen:
    return davinci("data", "inspect", *words)


def answer(tmp_path: Path, *words: object, code: int = 0) -> dict[str, Any]:
    screen = inspect(*words, "--json", tmp_path / "answer.json")
    assert screen.code == code, screen.err
    found: dict[str, Any] = json.loads((tmp_path / "answer.json").read_text())
    return found


# ---- a source --------------------------------------------------------------------------------------------


def test_a_source_in_numbers(tmp_path):
    folder = write_qa(tmp_path / "qa")
    found = answer(tmp_path, folder, "--sequence-length", 20)
    (facts,) = found["sources"]
    source = Source.open("qa", folder, 20)
    assert (facts["name"], facts["domain"], facts["shards"]) == ("qa", "questions", 2)
    assert (facts["tokens"], facts["documents"]) == (source.num_tokens, 26)
    assert (facts["dtype"], facts["vocab_size"], facts["eod_id"]) == ("uint16", VOCABULARY, EOD)
    assert facts["tokenizer_sha256"] == "0" * 64 and facts["has_mask"]
    assert facts["windows"]["number"] == source.num_windows
    read = facts["read"]
    assert read["empty_documents"] == 2 and sum(one["documents"] for one in read["histogram"]) == 24
    assert sum(one["tokens"] for one in read["histogram"]) == facts["tokens"] == read["tokens"]
    assert 0 < read["loss_tokens"] < read["tokens"]
    out = inspect(folder, "--sequence-length", 20).out
    for said in (
        f"{facts['tokens']:,}",
        "26",
        "256 ids, by tokenizer 0000000000000000",
        "token 255",
        f"{source.num_windows} of 20 + 1 tokens",
        f"{facts['windows']['lost_tokens']} tokens at ends of shards are in none",
        f"{100 * read['loss_tokens'] / read['tokens']:.4g}% of the tokens carry it",
        f"p50 {read['percentiles']['50']}",
        "2 empty",
    ):
        assert said in out
    for one in read["histogram"]:
        assert re.search(rf"{one['first']} to {one['last']} +{one['documents']} ", out)
    assert not found["notes"] and not found["problems"]


def test_a_bare_prefix_and_a_sample_say_what_they_are(tmp_path):
    folder = write_qa(tmp_path / "qa")
    out = inspect(folder / "shard-0").out
    assert "not known: there is no manifest" in out and "in 1 shard\n" in out
    out = inspect(folder, "--sample", 1).out
    assert "a sample: 1 of 2 shards, 13 documents" in out
    assert "a sample" not in inspect(folder, "--sample", 2).out


@given(st.floats(0, 1), st.integers(1, 60))
def test_a_bar_is_as_long_as_its_share(fraction, room):
    eighths = {"█": 8, "▏": 1, "▎": 2, "▍": 3, "▌": 4, "▋": 5, "▊": 6, "▉": 7}
    drawn = sum(eighths[character] for character in bar(fraction, room))
    assert abs(drawn - 8 * room * fraction) <= 1 and (drawn > 0) is (fraction > 0)
    assert cell_len(bar(fraction, room)) <= room
    assert set(bar(fraction, room, fine=False)) <= {"#"}


# ---- a run -----------------------------------------------------------------------------------------------


def taken_by_hand(config: Path) -> list[Counter[str]]:
    """The samples of each source in each stage, one by one."""
    run = Forecast.read(load_config(config))
    located = run.curriculum.locate_many(np.arange(run.total_samples))
    stages = [run.curriculum.locate(n).stage for n in range(run.total_samples)]
    names = [stage.name for stage in run.schedule.stages]
    return [
        Counter(
            run.curriculum.sources[place]
            for place, stage in zip(located.source, stages, strict=True)
            if stage == name
        )
        for name in names
    ]


def check_epochs(config: Path, found: dict[str, Any]) -> None:
    taken = taken_by_hand(config)
    for one in found["sources"]:
        windows = Forecast.read(load_config(config)).sources[one["name"]].num_windows
        use = one["use"]
        assert use["samples"] == [stage[one["name"]] for stage in taken]
        assert use["epochs"] == [stage[one["name"]] / windows for stage in taken]
        assert use["total_epochs"] == sum(use["samples"]) / windows
    for stage, by_hand in zip(found["stages"], taken, strict=True):
        assert stage["samples"] == by_hand.total() and stage["tokens"] == by_hand.total() * LENGTH


def test_epochs_are_those_of_the_samples_one_by_one(config, tmp_path):
    found = answer(tmp_path, config)
    check_epochs(config, found)
    assert [one["name"] for one in found["sources"]] == ["a", "b", "qa"], "by domain"
    assert found["run"]["samples"] == sum(stage["samples"] for stage in found["stages"]) == 352
    out = inspect(config).out
    assert re.search(r"^b +– +– +–  never used$", out, re.MULTILINE)
    qa = found["sources"][2]["use"]
    assert qa["total_epochs"] > 4
    assert re.search(
        rf"^qa +– +{qa['epochs'][1]:.2f} +{qa['total_epochs']:.2f}  over 4 epochs$", out, re.MULTILINE
    )
    assert "b is never used: no stage mixes it" in out
    assert f"qa is passed through {qa['total_epochs']:.1f} times" in out
    assert re.search(r"^first +\d+ +192 +6,144", out, re.MULTILINE)


def test_the_journal_is_the_record(config, tmp_path):
    journal = Journal.open(tmp_path / "run" / "journal.jsonl")
    journal.append(MixRecord(0, "first", {"a": "1"}))
    journal.append(MixRecord(104, "first", {"b": "1"}))
    found = answer(tmp_path, config)
    check_epochs(config, found)
    assert {one["name"]: one["use"]["samples"][0] for one in found["sources"]} == {"a": 104, "b": 88, "qa": 0}
    assert found["run"]["journal_records"] == 2


def test_a_stage_without_a_step_takes_nothing(config, tmp_path):
    found = answer(tmp_path, config, "curriculum.1.tokens=1")
    check = found["stages"][1]
    assert (check["samples"], check["steps"], check["first_sample"]) in ((0, 0, None), (8, 1, 192))
    found = answer(tmp_path, config, "curriculum.0.global_batch_size=190", "curriculum.1.tokens=32")
    assert [stage["samples"] for stage in found["stages"]] == [380, 0]
    assert found["stages"][1]["first_sample"] is None


def test_what_is_held_out(config, tmp_path):
    found = answer(tmp_path, config)
    (held,) = found["validation"]
    assert held["documents"] == 5 and not found["problems"] and "held-out" not in str(found["notes"])
    found = answer(tmp_path, config, f"data.validation.b={tmp_path / 'data' / 'b'}")
    assert "the held-out source of b is the training source b" in found["notes"]
    assert "held out: nothing" in inspect(config, "data.validation={}").out


def test_tokenizers_that_disagree(config, tmp_path):
    assert "several tokenizers" not in str(answer(tmp_path, config)["notes"])
    write_qa(tmp_path / "other", digest="f" * 64)
    notes = answer(tmp_path, config, f"data.sources.qa.path={tmp_path / 'other'}")["notes"]
    (note,) = [note for note in notes if "several tokenizers" in note]
    assert note.endswith("a, b, a (held out): 0000000000000000; qa: ffffffffffffffff")


# ---- damage ----------------------------------------------------------------------------------------------


def test_a_damaged_source_is_named_and_the_rest_is_shown(config, tmp_path):
    before = answer(tmp_path, config)
    shutil.rmtree(tmp_path / "qa")
    found = answer(tmp_path, config, code=2)
    screen = inspect(config)
    assert "There is no source here." in screen.refusal() and "qa" in screen.refusal()
    a, b, qa = found["sources"]
    assert (a, b) == tuple(before["sources"][:2]), "the others' numbers are what they were"
    assert qa["use"]["samples"] == before["sources"][2]["use"]["samples"]
    assert not qa["counted"] and qa["use"]["epochs"] is None
    assert re.search(r"^q +qa +– .* damaged$", screen.out, re.MULTILINE)
    assert re.search(r"^qa +\? +\? +\?$", screen.out, re.MULTILINE)


def test_a_damaged_shard_is_named_and_the_rest_is_counted(config, tmp_path):
    index = tmp_path / "qa" / "shard-1.idx"
    index.write_bytes(index.read_bytes()[:-3])
    for target in (config, tmp_path / "qa"):
        screen = inspect(target)
        assert "An index's counts do not match its size." in screen.refusal()
        assert str(index) in screen.refusal()
        assert "qa" in screen.out
        found = answer(tmp_path, target, code=2)
        (qa,) = [one for one in found["sources"] if one["name"] == "qa"]
        assert qa["read"]["documents"] == 13 and len(qa["problems"]) == 1
    assert qa["documents"] == 26
    assert "all shards but 1 that are damaged" in screen.out


def test_a_source_of_a_larger_vocabulary(config, tmp_path):
    screen = inspect(config, "model.vocab_size=200")
    assert "4 things are wrong" in screen.refusal()
    assert "larger vocabulary than the model has" in screen.err
    assert "sources (3)" in screen.out


def test_many_problems_fit_a_screen(config, tmp_path):
    for name in ("data/a", "data/b", "qa", "held"):
        for index in (tmp_path / name).glob("*.idx"):
            index.unlink()
    screen = inspect(config)
    assert "5 things are wrong" in screen.refusal() and "and 1 more" in screen.err
    assert len(answer(tmp_path, config, code=2)["problems"]) == 5


def test_a_journal_that_does_not_serve(config, tmp_path):
    plan = answer(tmp_path, config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text("nothing\n")
    found = answer(tmp_path, config, code=2)
    assert found["sources"] == plan["sources"] and found["stages"] == plan["stages"]
    assert "A journal is damaged" in found["problems"][0]
    assert any("without a journal" in note for note in found["notes"])


def test_refusals(config, tmp_path):
    source = tmp_path / "qa"
    assert "There is no such configuration" in inspect(tmp_path / "none.yaml").refusal()
    assert "There is no source here" in inspect(tmp_path / "none").refusal()
    assert "has no manifest" in inspect(tmp_path).refusal()
    assert "a source has no settings" in inspect(source, "run.seed=3").refusal()
    assert "a run configuration says it itself" in inspect(config, "--sequence-length", 8).refusal()
    assert "1 to 1,000" in inspect(source, "--samples", 1001).refusal()
    assert "--sample\n" in inspect(source, "--sample", 0).refusal()
    assert "There is no such sample." in inspect(config, "--at", 352).refusal()
    assert "0 to 351" in inspect(config, "--at", 352).refusal()
    assert "There is no such window." in inspect(source, "--at", 99, "--sequence-length", 32).refusal()
    assert "tokenizer cannot be read" in inspect(source, "--tokenizer", tmp_path / "t").refusal()
    assert "file system error" in inspect(source, "--json", source / "manifest.json" / "x.json").refusal()


# ---- samples as they are ---------------------------------------------------------------------------------


def by_id(tokens: np.ndarray) -> str:
    return "".join(f"{token} " for token in tokens.tolist())


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from([1, 2, 5, 119, 120, 300])), max_size=9
    ),
    st.booleans(),
    st.booleans(),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_spans_are_the_sample(runs, by_token, whole, data):
    pairs = [(token, loss) for token, loss, times in runs for _ in range(times if token else 1)]
    tokens = np.array([token for token, _ in pairs], np.int64)
    mask = np.array([loss for _, loss in pairs], bool)
    starts = data.draw(st.none() | st.lists(st.integers(0, len(pairs)), unique=True).map(sorted))
    parts = spans(tokens, mask, 0, by_id, starts=starts, by_token=by_token, whole=whole)
    at, bounds = 0, []
    for span in parts:
        if span.kind == "edge":
            assert by_token and span.tokens == 0
        if span.kind == "bound":
            bounds.append(at)
        if not span.tokens:
            continue
        here = slice(at, at + span.tokens)
        assert (mask[here] == span.loss).all()
        expected = starts if starts is not None else [i + 1 for i, token in enumerate(tokens) if token == 0]
        assert span.document == sum(0 < start <= at for start in expected)
        if span.kind == "end":
            assert tokens[at] == 0 and span.tokens == 1
        else:
            assert (tokens[here] != 0).all()
        if span.kind == "text":
            assert span.text == by_id(tokens[here]) and (not by_token or span.tokens == 1)
        if span.kind == "gap":
            assert not whole and span.tokens >= LEAST
        at += span.tokens
    assert at == len(tokens)
    assert bounds == [s for s in starts or () if 0 < s < len(tokens) and tokens[s - 1] != 0]
    learnt_alike = [(loss, token != 0) for token, loss in pairs]
    if (
        starts is None
        and max((len(list(run)) for _, run in itertools.groupby(learnt_alike)), default=0) < 120
    ):
        assert not any(span.kind == "gap" for span in parts)
    if not by_token:
        assert all(span.tokens < FIRST + LAST + LEAST or whole or span.kind == "gap" for span in parts)


def test_the_middle_of_a_long_stretch_is_left_out():
    tokens = np.ones(300, np.int64)
    parts = spans(tokens, tokens, None, by_id)
    assert [(span.kind, span.tokens) for span in parts] == [("text", 64), ("gap", 212), ("text", 24)]
    assert [span.tokens for span in spans(tokens[:119], tokens[:119], None, by_id)] == [119]
    assert [span.tokens for span in spans(tokens, tokens, None, by_id, whole=True)] == [300]


SAMPLE = [
    Span("text", "why? ", False, 0, 2),
    Span("text", "so.", True, 0, 2),
    Span("end", "EOD", True, 0, 1),
    Span("text", "next", True, 1, 1),
    Span("gap", "", True, 1, 7),
    Span("bound", "", True, 1, 0),
    Span("text", "who", False, 2, 1),
    Span("end", "EOD", False, 2, 1),
]


def test_colours_and_brackets():
    text = coloured(SAMPLE)
    assert text.plain == "why? so.⏎EOD\nnext [… 7 tokens …] ⏎\nwho⏎EOD"
    assert [(text.plain[span.start : span.end].strip(), span.style) for span in text.spans] == [
        ("why?", "bright_black"),
        ("⏎EOD", "bold magenta"),
        ("next", "cyan"),
        ("[… 7 tokens …]", "dim italic"),
        ("⏎", "bold magenta"),
        ("who", "bright_black"),
        ("⏎EOD", "dim magenta"),
    ]
    assert coloured(SAMPLE[:2]).plain == "why? so."
    assert bracketed(SAMPLE) == "[-why? -]so.[EOD]\nnext [... 7 tokens ...] [|]\n[-who-][-EOD-]"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A source of real text with questions, an evil document, and the tokenizer that made it."""
    root = tmp_path_factory.mktemp("texts")
    lines = [{"prompt": f"What is {k}? ", "response": f"The number {k}, 你好 é 👩‍👩‍👧."} for k in range(40)]
    lines.insert(1, {"prompt": "Say it. ", "response": EVIL})
    (root / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": "".join(line.values())}) + "\n" for line in lines)
    )
    train_bpe([root / "text.jsonl"], 300, root / "tokenizer")
    tokenizer = Tokenizer.load(root / "tokenizer")
    with IndexedDatasetWriter(root / "qa" / "x", "uint16", mask=True) as writer:
        for line in lines:
            prompt, response = (
                array.tolist() for array in tokenizer.encode_batch([line["prompt"], line["response"]])
            )
            tokens = [*prompt, *response, tokenizer.eod_id]
            writer.add_document(tokens, loss=[0] * len(prompt) + [1] * (len(tokens) - len(prompt)))
    Manifest(
        name="qa",
        domain="qa",
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer_sha256=tokenizer.sha256,
        shards=(Shard.of("x", writer.written),),
    ).save(root / "qa")
    return root


WORDS = ("--sequence-length", 64, "--at", 0)


def test_a_window_of_text(texts, tmp_path):
    found = answer(tmp_path, texts / "qa", *WORDS, "--tokenizer", texts / "tokenizer", "--full-text")
    (sample,) = found["samples"]
    source, tokenizer = Source.open("qa", texts / "qa", 64), Tokenizer.load(texts / "tokenizer")
    tokens, labels = source.read(0), np.empty(64, np.uint8)
    source.read_mask_into(0, labels)
    parts = from_values(sample["spans"])
    assert sum(span.tokens for span in parts) == 65
    learnt = np.concatenate([[span.loss] * span.tokens for span in parts])
    assert learnt.tolist() == [False, *labels.astype(bool)]
    assert sample["labels_with_loss"] == labels.sum()
    text = "".join("<|endoftext|>" if span.kind == "end" else span.text for span in parts)
    assert text.replace("\\x1b", "\x1b").replace("\\u202e", "\u202e") == tokenizer.decode(tokens)
    quiet = [span.text for span in parts if span.kind == "text" and not span.loss]
    assert quiet[:2] == ["What is 0? ", "Say it. "]
    out = inspect(texts / "qa", *WORDS, "--tokenizer", texts / "tokenizer").out
    assert "[-What is 0? -]The number 0, 你好 é 👩‍👩‍👧.[EOD]\n" in out
    assert "[-Say it. -]<script>alert(1)</script> \\x1b[31mred \\u202e [bold][EOD]" in out
    assert "\x1b" not in out and "[-no loss-]" in out


def test_a_character_of_several_tokens_is_shown_whole(texts):
    out = inspect(texts / "qa", *WORDS, "--tokenizer", texts / "tokenizer", "--tokens", "--full-text").out
    assert "\N{REPLACEMENT CHARACTER}" not in out
    body = out[out.index("window 0 of qa") :].split("\n", 1)[1]
    assert body.replace("|", "").strip().startswith("[-What is 0? -]The number 0, 你好 é")
    assert body.count("|") > 20


def test_on_a_terminal_it_is_coloured(texts, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    words = (texts / "qa", *WORDS, "--tokenizer", texts / "tokenizer")
    out = inspect(*words).out
    assert "\x1b[90mWhat is 0? \x1b[0m" in out and "\x1b[1;35m⏎EOD" in out
    assert "\x1b[36m<script>alert(1)</script> \\x1b[31mred" in out, "the second document, in its colour"
    assert "[EOD]" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[-What is 0? -]" in inspect(*words).out


def test_samples_of_a_run_are_those_of_its_order(config, tmp_path):
    run = Forecast.read(load_config(config))
    found = answer(tmp_path, config, "--samples", 30, "--seed", 4)
    drawn = [sample["n"] for sample in found["samples"]]
    assert len(set(drawn)) == 30 and drawn == sorted(drawn)
    assert drawn == [s["n"] for s in answer(tmp_path, config, "--samples", 30, "--seed", 4)["samples"]]
    assert drawn != [s["n"] for s in answer(tmp_path, config, "--samples", 30, "--seed", 5)["samples"]]
    for sample in found["samples"]:
        located = run.curriculum.locate(sample["n"])
        assert (sample["source"], sample["window"], sample["epoch"], sample["stage"]) == (
            located.source, located.window, located.epoch, located.stage,
        )  # fmt: skip
        ids = run.sources[located.source].read(located.window).tolist()
        shown = [
            token
            for span in from_values(sample["spans"])
            for token in ([str(EOD)] if span.kind == "end" else span.text.split())
        ]
        assert shown == list(map(str, ids))
    assert [s["n"] for s in answer(tmp_path, config, "--at", 350, "--samples", 5)["samples"]] == [350, 351]
    assert "data.tokenizer is not set" in found["notes"][-1]
    assert f"sample {drawn[0]:,}, stage" in inspect(config, "--samples", 30, "--seed", 4).out


@pytest.mark.parametrize("brought", [False, True], ids=["configured", "brought in by a record"])
def test_samples_of_a_run_are_as_the_model_sees_them(brought, config, texts, tmp_path):
    """As `data order` says, which is held to the trainer's; and no token of the metadata is learnt."""
    settings_ = yaml.safe_load(config.read_text())
    settings_["data"]["tokenizer"] = str(texts / "tokenizer")
    settings_["data"]["sources"]["qa"] = {"path": str(texts / "qa"), "metadata": "URL: qa.org "}
    settings_["data"]["sources"]["more"] = {"path": str(texts / "qa"), "metadata": "URL: more.org "}
    settings_["data"]["sequence_length"] = settings_["model"]["max_sequence_length"] = 96
    settings_["model"]["vocab_size"] = 300
    second = settings_["curriculum"][1]
    settings_["curriculum"] = [
        {**second, "mixture": {"more" if brought else "qa": 1}, "transforms": {
            "metadata_prefix": {}, "document_mask": True, "prompt_loss_weight": 0.5,
        }}
    ]  # fmt: skip
    config.write_text(yaml.safe_dump(settings_))
    if brought:
        loaded, weights = load_config(config), {"qa": "1"}
        first = Forecast.read(loaded).records[0].record
        done = transforms_of(loaded, second["name"], weights)
        journal = Journal.open(tmp_path / "run" / "journal.jsonl")
        journal.append(first)
        journal.append(replace(first, first_sample=8, weights=weights, transforms=done, origin="edit-1"))
    found = answer(tmp_path, config, "--at", 8, "--samples", 8, "--full-text")
    assert "before the stages" not in str(found["notes"])
    order = davinci("data", "order", config, "--at", 8, "--count", 8, "--full-text", "--json")
    for sample, said in zip(found["samples"], json.loads(order.out)["samples"], strict=True):
        parts = from_values(sample["spans"])
        transforms = said["transforms"]
        assert sample["applied"] == transforms["applied"] and len(sample["applied"]) >= 2
        assert sample["labels_with_loss"] == transforms["labels_with_loss"]
        text = "".join("<|endoftext|>" if span.kind == "end" else span.text for span in parts)
        escaped = (transforms["text"] or said["window"]["text"])["first"]
        assert text == escaped.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        quiet = [span for span in parts if span.text.startswith("URL: qa.org ") and span.kind == "text"]
        assert quiet and not any(span.loss for span in quiet)
        assert sum(span.tokens for span in parts) == 97
        for before, after in itertools.pairwise([span for span in parts if span.kind != "edge"]):
            assert before.kind != "end" or not after.loss, "no label is in another document than its input"
    out = inspect(config, "--at", 8).out
    assert "labels carry loss; " in out and "document mask" in out


def test_ids_that_the_tokenizer_does_not_have_are_seen(texts, tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([5000, 65, 66, 5001, 5002, 67, 5003])
    window = ("--sequence-length", 6, "--at", 0, "--tokenizer", texts / "tokenizer")
    tokenizer = Tokenizer.load(texts / "tokenizer")
    manifest = Manifest(name="x", domain="x", dtype="uint16", vocab_size=5004, eod_id=None, tokenizer_sha256=None,
                        shards=(Shard.of("x", writer.written),))  # fmt: skip
    manifest.save(tmp_path)
    assert "more ids than the tokenizer" in inspect(tmp_path, *window).refusal()
    # In a run they come from transforms, and from a source where the model's vocabulary has room for them.
    reader = SampleReader({"x": Source.open("x", tmp_path, 6)}, tokenizer, Asked(whole=True))
    parts = from_values(reader.sample("x", 0, None)["spans"])
    text = "".join(span.text for span in parts)
    assert text == f"<5000>{tokenizer.decode([65, 66])}<5001><5002>{tokenizer.decode([67])}<5003>"


def test_samples_before_transforms_say_so(config, tmp_path):
    shutil.rmtree(tmp_path / "data" / "b")
    notes = answer(tmp_path, config, "--at", 3, code=2)["notes"]
    assert "samples are shown as the sources have them, before the stages' transforms" in notes


def test_a_sample_of_a_damaged_source_cannot_be_read_and_others_can(config, tmp_path):
    shutil.rmtree(tmp_path / "qa")
    found = answer(tmp_path, config, "--at", 192, "--samples", 10, code=2)
    readable = {sample["spans"] is not None for sample in found["samples"] if sample["source"] == "a"}
    lost = {sample["spans"] for sample in found["samples"] if sample["source"] == "qa"}
    assert readable == {True} and lost == {None}
    assert "of qa: cannot be read" in inspect(config, "--at", 192, "--samples", 10).out


def test_a_token_outside_the_vocabulary(texts, tmp_path):
    shutil.copytree(texts / "qa", tmp_path / "qa")
    raw = bytearray((tmp_path / "qa" / "x.bin").read_bytes())
    raw[20:22] = (999).to_bytes(2, "little")
    (tmp_path / "qa" / "x.bin").write_bytes(raw)
    text = inspect(tmp_path / "qa", *WORDS).refusal()
    assert "bytes 20 to 22" in text and "999" in text


def test_a_tokenizer_of_fewer_ids_or_of_other_bytes(texts, tmp_path):
    train_bpe([texts / "text.jsonl"], 280, tmp_path / "small")
    assert "more ids than the tokenizer" in inspect(texts / "qa", "--tokenizer", tmp_path / "small").refusal()
    train_bpe([texts / "text.jsonl"], 310, tmp_path / "other")
    assert (
        "another tokenizer than --tokenizer" in inspect(texts / "qa", "--tokenizer", tmp_path / "other").out
    )


# ---- screens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_the_screen(config, texts, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stages = yaml.safe_load(config.read_text())
    first = stages["curriculum"][0]
    stages["curriculum"] = [{**first, "name": f"stage-{k}", "tokens": 3000} for k in range(14)]
    name = "a-source-with-a-name-that-is-longer-than-anyone-needs"
    stages["data"]["sources"][name] = {"path": str(tmp_path / "qa"), "domain": "a very long domain, too " * 3}
    config.write_text(yaml.safe_dump(stages))
    for words in (
        (config, "--samples", 2),
        (texts / "qa", *WORDS, "--tokenizer", texts / "tokenizer", "--tokens"),
    ):
        screen = inspect(*words)
        assert screen.code == 0, screen.err
        assert max(map(cell_len, screen.out.splitlines())) <= columns
    out = inspect(config).out
    for k in range(14):
        assert len(re.findall(rf"stage-{k}\b", out)) == 2, "in a table of epochs and in that of the stages"
    assert out.count("total") == 1 and "and in the stages after them" in out


@pytest.mark.parametrize("columns", [80, 120])
def test_no_number_is_cut(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        for size in (1, 5000, 3_000_000):
            writer.add_document(np.zeros(size, np.uint16))
    out = inspect(tmp_path / "x").out
    assert re.search(r"^ +1 +1 +33.3% +0.0%  █+$", out, re.MULTILINE)
    assert re.search(r"^ +4,096 to 8,191 +1 +33.3% +0.2%  █+$", out, re.MULTILINE)
    assert re.search(r"^2,097,152 to 4,194,303 +1 +33.3% +99.8%  █+$", out, re.MULTILINE)
    assert max(map(cell_len, out.splitlines())) <= columns and "…" not in out


def test_an_output_that_is_ascii(config, texts, monkeypatch):
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "data", "inspect"]
    words = [*command, str(texts / "qa"), *map(str, WORDS), "--tokenizer", str(texts / "tokenizer")]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "####" in done.stdout and "\\u4f60\\u597d" in done.stdout


def test_the_page(config, texts, tmp_path):
    settings_ = yaml.safe_load(config.read_text())
    settings_["data"]["tokenizer"] = str(texts / "tokenizer")
    settings_["data"]["sources"]["qa"]["path"] = str(texts / "qa")
    settings_["model"]["vocab_size"] = 300
    config.write_text(yaml.safe_dump(settings_))
    page = tmp_path / "page.html"
    assert inspect(config, "--samples", 352, "--full-text", "--html", page).code == 0
    html = page.read_text()
    assert fetches(html) == []
    assert "<script>" not in html and "&lt;script" in html
    assert "\x1b" not in html and "\\x1b[31m" in html
    for title in ("Sources", "Epochs", "Stages", "Held out", "Document lengths", "Samples"):
        assert f"<h2>{title}</h2>" in html
    assert html.count("<svg") == 1 + 3, "epochs, and the lengths of three sources"
    assert 'aria-label="Epochs of each source' in html and "over 4 epochs" in html
    assert re.search(r'<span class="quiet( other)?">What is \d+\? </span>', html)
    assert re.search(r'<span class="(other )?end">⏎EOD\n</span>', html)
    assert "b is never used: no stage mixes it" in unescape(html)


def test_the_page_of_a_source_and_of_damage(texts, tmp_path):
    folder = write_qa(tmp_path / "qa")
    (folder / "shard-0.idx").unlink()
    assert inspect(folder, "--html", tmp_path / "page.html", "--at", 40, "--sequence-length", 8).code == 2
    html = unescape((tmp_path / "page.html").read_text())
    assert "An indexed dataset lacks one of its two files." in html and "Documents of qa" in html


# ---- it only reads ---------------------------------------------------------------------------------------


def test_nothing_is_written_but_what_is_asked_for(config, tmp_path):
    def everything() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}

    before = everything()
    assert (
        inspect(config, "--samples", 3).code
        == inspect(tmp_path / "qa", "--at", 1, "--sequence-length", 8).code
        == 0
    )
    assert everything() == before


def test_it_does_without_torch(config):
    code = (
        "import sys\nfrom megatron_davinci.cli.main import main\n"
        f"assert main(['data', 'inspect', {str(config)!r}, '--samples', '2']) == 0\n"
        "assert not {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_source_in_s3(tmp_path, proxy, store, monkeypatch):
    folder = write_qa(tmp_path / "qa")
    for path in folder.iterdir():
        store.put(f"qa/{path.name}", path.read_bytes())
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    words = ("--sequence-length", 16, "--at", 2, "--samples", 3)
    there, here = (inspect(target, *words) for target in ("s3://bucket/qa", folder))
    assert (there.code, there.err) == (0, "")
    assert there.out.replace("s3://bucket/qa", str(folder)) == here.out
    assert "There is no source here." in inspect("s3://bucket/nothing").refusal()
