"""What a user gets wrong is said on one screen, with what to do and exit code 2; nothing is half-written."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_davinci.cli.main import main
from megatron_davinci.data.tokenizer import train_bpe
from tests.cli.screen import davinci, davinci_on_a_rank
from tests.tiny import VOCABULARY, tiny_settings, write_source


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path)))
    return path


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_configuration_that_is_not_there(tmp_path, command):
    text = davinci(command, tmp_path / "none.yaml").refusal()
    assert "There is no such configuration." in text and "none.yaml" in text and "do:" in text


@pytest.mark.parametrize(
    "words",
    [
        ("knowledge", "--people", 1),
        ("neighbours", "a"),
        ("cluster", "a", "--clusters", 2),
        ("train-classifier", "a"),
        ("train-tokenizer", "a", "--vocab-size", 300),
        ("tokenize", "a", "--tokenizer", "a"),
        ("fetch", "a", "--agent", "me@example.org"),
    ],
    ids=lambda words: words[0],
)
def test_no_folder_is_made_that_is_called_like_an_address(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("")
    text = davinci("data", *words, "--out", "s3://bucket/a").refusal()
    assert "local files only" in text and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_count_of_tokens_that_is_none_says_what_one_is(capsys):
    with pytest.raises(SystemExit):
        main(["data", "tokenize", "a", "--tokenizer", "t", "--out", "o", "--shard-tokens", "abc"])
    assert "a token count is a number or text like 4T" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("data", "inspect", "PATH"),
        ("data", "manifest", "PATH"),
        ("data", "merge", "PATH", "a"),
        ("data", "merge", "a", "PATH"),
        ("data", "tokenize", "a", "--tokenizer", "PATH", "--out", "b"),
    ],
    ids=str,
)
def test_a_path_that_cannot_be_looked_at(tmp_path, words):
    path = tmp_path / ("long" * 100)
    text = davinci(*(path if word == "PATH" else word for word in words)).refusal()
    assert "File name too long" in text and "long" * 10 in text.replace("\n", "")


def test_a_folder_below_a_file_is_out_of_reach(tmp_path, config):
    (tmp_path / "design.yaml").write_text(
        "{question: q, base: config.yaml, varies: [train.threads], arms: {a: {}, b: {set: {train.threads: 1}}},"
        " seeds: [1, 2], metrics: [{name: train_loss, margin: 0.1}]}"
    )
    text = davinci("lab", "report", tmp_path / "design.yaml", "--out", config / "lab").refusal()
    assert "Not a directory" in text and "each name above it is a folder" in " ".join(text.split())


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_mistyped_key(config, command):
    text = davinci(command, config, "model.hiden_size=32").refusal()
    assert "model.hiden_size" in text and "did you mean hidden_size?" in text


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--suite", "davinci19", "--shots", 5), "--shots"),
        (("--suite", "local", "--include-path", "mine"), "--include-path"),
        (("--suite", "davinci19", "--both-ways"), "--both-ways"),
        (("--suite", "local", "--data", "sets"), "--data"),
        (("--tasks", "a", "--texts", "a=a.jsonl"), "--texts"),
        (("--tasks", "a", "--samples", "0:9"), "--samples"),
        (("--suite", "contamination", "--texts", "a=a.jsonl", "--formats"), "--formats"),
    ],
)
def test_an_option_that_an_evaluation_would_not_look_at(tmp_path, words, option):
    text = davinci("eval", tmp_path, *words).refusal()
    assert "says nothing about what is asked" in text and option in text


def test_a_terminal_without_a_character(config, monkeypatch):
    from megatron_davinci.cli.main import main

    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["plan", str(config), "curriculum.0.name=é"]) == 0
    screen.flush()
    assert rb"\xe9" in screen.buffer.getvalue()


@pytest.mark.parametrize("stage", ["x[/]", "[warm] up", "a:warning:b"])
def test_a_stage_is_shown_by_its_name(config, stage):
    screen = davinci("plan", config, f"curriculum.0.name='{stage}'")
    assert screen.code == 0 and any("taken" in line and stage in line for line in screen.out.splitlines())


def test_a_mixture_that_does_not_sum_to_one(config):
    text = davinci("plan", config, "curriculum.0.mixture={a: 0.5, b: 0.4}").refusal()
    assert "sum to 0.9, not to 1" in text


@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_impossible_layout_is_refused_before_a_rank_starts(config, command):
    text = davinci(command, config, "parallel.tensor=3", "parallel.pipeline=3", "--ranks", 7).refusal()
    assert "The layout is impossible." in text
    assert "model.num_attention_heads (4) is not a multiple of parallel.tensor (3)" in text
    assert "model.num_layers (2) is not a multiple of parallel.pipeline (3)" in text
    assert "the number of ranks (7)" in text


@pytest.mark.parametrize(
    "words", [[], ["trian"], ["train"], ["data"], ["data", "tokenise"], ["plan", "a.yaml", "--rank=x"]]
)
def test_wrong_words(words):
    assert "usage: davinci" in davinci(*words).refusal()


@pytest.mark.parametrize("override", ["seed", "--seed", "-x"])
def test_an_override_that_is_none(config, override):
    assert override.lstrip("-") in davinci("plan", config, override).refusal()


def test_an_index_that_is_missing(config, tmp_path):
    (tmp_path / "data" / "a" / "shard-00000.idx").unlink()
    text = davinci_on_a_rank("train", config).refusal()
    assert "shard-00000.idx" in text
    assert list((tmp_path / "run").glob("checkpoints/*")) == []


def test_tokens_that_were_cut_off(config, tmp_path):
    path = tmp_path / "data" / "b" / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-100])
    text = davinci_on_a_rank("train", config).refusal()
    assert "shard-00000" in text and "bytes" in text


def test_an_index_of_something_else(config, tmp_path):
    (tmp_path / "data" / "a" / "shard-00000.idx").write_bytes(b"PK\x03\x04" * 100)
    assert "shard-00000.idx" in davinci_on_a_rank("train", config).refusal()


def test_a_source_that_is_not_there(config, tmp_path):
    text = davinci_on_a_rank("train", config, f"data.sources.a.path={tmp_path / 'nowhere'}").refusal()
    assert "Source a is not there." in text and "nowhere" in text


def test_a_vocabulary_larger_than_the_models(config):
    text = davinci_on_a_rank("train", config, "model.vocab_size=128").refusal()
    assert "larger vocabulary than the model has" in text
    assert f"set model.vocab_size to {VOCABULARY}" in text


def test_a_source_too_small_for_a_window(config, tmp_path):
    write_source(tmp_path / "small", "small", seed=0, documents=0)
    text = davinci_on_a_rank("train", config, f"data.sources.a.path={tmp_path / 'small'}").refusal()
    assert "too small for one window" in text


def test_a_run_without_a_checkpoint_cannot_be_converted(tmp_path):
    text = davinci("convert", "to-hf", tmp_path / "run").refusal()
    assert "no good checkpoint" in text and "train first" in text
    said = davinci("convert", "to-hf", f"{tmp_path / 'run'}@7").refusal()
    assert "no checkpoint of this step" in said and "no checkpoint at all" in said
    assert "@seven" in davinci("convert", "to-hf", f"{tmp_path / 'run'}@seven").refusal()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_none_has_no_report(tmp_path):
    assert "run" in davinci("report", tmp_path / "run").refusal()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_domain(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"word {n} " * 9}) + "\n" for n in range(50)))
    train_bpe([texts], 260, tmp_path / "tokenizer")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n" + json.dumps({"text": ""}) + "\n")
    out = tmp_path / "out"
    text = davinci("data", "tokenize", empty, "--tokenizer", tmp_path / "tokenizer", "--out", out).refusal()
    assert "no document" in text.lower() or "empty" in text.lower()
    text = davinci(
        "data", "tokenize", tmp_path / "no.jsonl", "--tokenizer", tmp_path / "tokenizer", "--out", out
    )
    assert "no.jsonl" in text.refusal()
    text = davinci("data", "tokenize", texts, "--tokenizer", tmp_path / "nowhere", "--out", out).refusal()
    assert "nowhere" in text
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    assert "bad.jsonl:2" in davinci(
        "data", "tokenize", bad, "--tokenizer", tmp_path / "tokenizer", "--out", out
    ).refusal()  # fmt: skip
    assert not out.exists() and list(tmp_path.glob(".out*")) == []


def test_a_vocabulary_too_small_for_every_byte(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n')
    text = davinci("data", "train-tokenizer", texts, "--vocab-size", 100, "--out", tmp_path / "out").refusal()
    assert "100" in text and "257" in text
    assert not (tmp_path / "out").exists()
