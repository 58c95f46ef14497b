"""Classifiers: trained by the command, judged against length, and asked by steps that leave text alone."""

from __future__ import annotations

import ast
import json
import random
from argparse import Namespace
from functools import cache

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.cli import data_classifier
from megatron_davinci.cli.main import main
from megatron_davinci.darwin import classifiers, embedding, linear
from megatron_davinci.darwin.provenance import begin
from megatron_davinci.darwin.selection import Classify, SelectTop
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem
from tests.darwin.making import MODULES, STDLIB, made, prose, recipe


@cache
def labelled(seed: int = 0) -> list[tuple[str, str]]:
    """Prose of docstrings and help topics, and code without them, in pieces whose sizes tell nothing."""
    draw = random.Random(seed)
    code, words = [], list(prose()[:40])
    for name in (*MODULES, "argparse", "calendar", "configparser", "datetime", "difflib", "inspect"):
        text = (STDLIB / f"{name}.py").read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                said = ast.get_docstring(node)
                if said and len(said) > 200:
                    words.append(said)
                node.body = [
                    part for part in node.body if not isinstance(getattr(part, "value", None), ast.Constant)
                ]
                written = ast.unparse(node) if node.body else ""
                if len(written) > 300:
                    code.append(written)
    pieces = []
    for label, texts in (("prose", words), ("code", code)):
        own = []
        for text in texts:
            at = 0
            while at + 200 < len(text):
                size = draw.randrange(200, 900)
                own.append((label, text[at : at + size]))
                at += size
        draw.shuffle(own)
        pieces += own[:200]
    draw.shuffle(pieces)
    return pieces


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    with open(folder / "labelled.jsonl", "w") as file:
        for label, text in labelled():
            file.write(json.dumps({"label": label, "text": text}) + "\n")
    arguments = [
        "data",
        "train-classifier",
        str(folder / "labelled.jsonl"),
        "--out",
        str(folder / "made"),
        "--bits",
        "16",
    ]
    assert main(arguments) == 0
    return folder


def test_it_beats_length_on_held_out_texts(trained):
    facts = json.loads((trained / "made" / "classifier.json").read_text())["trained"]
    assert facts["held_out_accuracy"] > 0.9 > 0.75 > facts["length_accuracy"]
    assert facts["held_out_auc"]["prose"] > 0.95 > facts["length_auc"]["prose"]


def test_labels_drawn_by_chance_are_not_told():
    draw = random.Random(1)
    pieces = [text for _, text in labelled()[:200]]
    made_ = classifiers.train_and_judge(pieces, [draw.choice("ab") for _ in pieces], bits=12, epochs=3)
    assert abs(made_.facts["held_out_accuracy"] - 0.5) < 0.25


def test_the_same_texts_and_seed_give_the_same_weights_and_a_file_gives_the_same_probabilities(trained):
    pieces = labelled()[:80]
    texts, labels = [text for _, text in pieces], [label for label, _ in pieces]
    one, other = (linear.train(texts, labels, bits=12, epochs=2, seed=3) for _ in range(2))
    assert np.array_equal(one.weights, other.weights) and np.array_equal(one.bias, other.bias)
    one.save(trained / "again")
    loaded = classifiers.load(trained / "again")
    assert loaded.labels == one.labels and loaded.name.startswith("linear ")
    for text in texts[:5]:
        assert loaded.probabilities(text) == pytest.approx(one.probabilities(text))
        assert loaded.probabilities(text).sum() == pytest.approx(1)


def test_features_are_those_that_saved_weights_know():
    assert len(linear.features("snake_case", 16, 100).places) == 1
    assert len(linear.features("two words", 16, 100).places) == 3


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_labels_may_be_numbers_and_stand_in_objects(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    rows = [{"text": f"t{grade}", "labels": {"q": grade}} for grade in (2, 4.5, 3, 2.9)]
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    given = {
        "files": [str(path)],
        "positive": [],
        "negative": [],
        "text_field": "text",
        "label_field": "labels.q",
    }
    texts, labels = data_classifier._labelled(Namespace(**given, at_least=3.0))
    assert texts == [row["text"] for row in rows]
    assert labels == ["negative", "positive", "positive", "negative"]
    assert data_classifier._labelled(Namespace(**given, at_least=None))[1][1] == "4.5"


@pytest.mark.parametrize("label", ["NaN", "true", '"good"'])
def test_what_is_no_number_is_no_grade(tmp_path, label):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "label": {label}}}\n')
    given = {"files": [str(tmp_path / "x.jsonl")], "positive": [], "negative": [], "text_field": "text"}
    with pytest.raises(DataError, match=r"no number|not a string"):
        data_classifier._labelled(Namespace(**given, label_field="label", at_least=3.0))


@pytest.mark.parametrize("folder", ["file", "file/within"])
def test_a_folder_that_cannot_be_made_is_said(trained, tmp_path, folder):
    (tmp_path / "file").write_text("of somebody")
    with pytest.raises(EnvironmentProblem, match="A file system error"):
        classifiers.load(trained / "made").save(tmp_path / folder)


def test_softmax_regression_follows_the_gradient_of_its_loss():
    # One text of each label, one step: what moves is what the loss's gradient says, checked by differences.
    texts, labels = ["alpha beta", "gamma delta", "alpha gamma"], ["x", "y", "z"]
    made_ = linear.train(texts, labels, bits=10, epochs=200, penalty=0.0)
    told = [made_.labels[int(made_.probabilities(text).argmax())] for text in texts]
    assert told == labels
    assert all(made_.probabilities(text).max() > 0.9 for text in texts)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_under_the_curve_is_the_share_of_pairs_in_order(rows):
    yes = [score for score, positive in rows if positive]
    no = [score for score, positive in rows if not positive]
    area = linear.area_under_curve([score for score, _ in rows], [positive for _, positive in rows])
    if not yes or not no:
        assert np.isnan(area)
        return
    pairs = [(a > b) + 0.5 * (a == b) for a in yes for b in no]
    assert area == pytest.approx(sum(pairs) / len(pairs))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small encoder of transformers with weights as they were drawn: its means are words, mixed at random."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(vocab_size=600, special_tokens=["[UNK]", "[PAD]"])
    words.train_from_iterator([text for _, text in labelled()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=600, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.long
def test_a_head_upon_an_encoder_beats_length_and_selects(encoder, trained, tmp_path, capsys):
    arguments = ["data", "train-classifier", str(trained / "labelled.jsonl"), "--encoder", str(encoder)]
    assert main([*arguments, "--out", str(tmp_path / "made")]) == 0
    described = json.loads((tmp_path / "made" / "classifier.json").read_text())
    facts = described["trained"]
    assert facts["held_out_accuracy"] > 0.85 > 0.75 > facts["length_accuracy"]
    loaded = classifiers.load(tmp_path / "made")
    # A vector is a text's own, whatever it is computed beside.
    texts = [text for _, text in labelled()[:20]]
    alone = np.stack([loaded._encoder.vectors([text])[0] for text in texts])
    assert alone == pytest.approx(loaded._encoder.vectors(texts), abs=1e-6)
    corpus = selected(
        trained,
        tmp_path,
        {"classify": {"classifier": str(tmp_path / "made"), "score": "prose", "min_score": 0.5}},
    )
    kept = [record["fields"]["true"] == "prose" for record in corpus.records()]
    assert sum(kept) > 0.8 * len(kept) and len(kept) > 30
    assert next(corpus.records())["darwin"]["operations"][-1]["model"].startswith("embedding ")
    (encoder / "config.json").write_text((encoder / "config.json").read_text() + " ")
    with pytest.raises(DataError, match="another one"):
        classifiers.load(tmp_path / "made")
    assert main(["data", "train-classifier", str(trained / "labelled.jsonl"), "--encoder", str(tmp_path),
                 "--out", str(tmp_path / "none")]) != 0  # fmt: skip
    assert "no encoder that transformers can load" in capsys.readouterr().err


def test_a_decoder_that_pads_on_the_left_gives_each_text_its_own_vector(encoder, tmp_path):
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5)
    GPT2Model(config).save_pretrained(tmp_path)
    opened = embedding.Encoder(tmp_path, 32)
    texts = ["the name of a file that is to be read", "", "a value"]
    alone = np.concatenate([opened.vectors([text]) for text in texts])
    assert alone == pytest.approx(opened.vectors(texts), abs=1e-6)
    assert np.linalg.norm(alone, axis=1) == pytest.approx([1, 0, 1]) and abs(alone[0] - alone[2]).max() > 0.05


def test_the_head_is_at_the_minimum_of_its_loss(encoder):
    pieces = labelled()[:60]
    texts, labels = [text for _, text in pieces], [label for label, _ in pieces]
    made_ = embedding.train(texts, labels, encoder=encoder, tokens=64, penalty=1e-2)
    vectors = embedding.Encoder(encoder, 64).vectors(texts)
    spread, wanted = vectors.std(0) + 1e-9, np.array([made_.labels.index(label) for label in labels])
    share = 1 / (2 * np.bincount(wanted)[wanted])

    def loss(weights, bias):
        logits = vectors @ weights.T + bias
        nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(wanted)), wanted]
        return share @ nats + 1e-2 * ((weights * spread) ** 2).sum()

    best, draw = loss(made_.weights, made_.bias), np.random.default_rng(0)
    for _ in range(20):
        moved = made_.weights + 1e-2 * draw.normal(size=made_.weights.shape) / spread
        assert loss(moved, made_.bias + 1e-2 * draw.normal(size=2)) >= best - 1e-9


def selected(trained, tmp_path, *steps):
    lines = [
        json.dumps({"id": str(i), "text": text, "true": label})
        for i, (label, text) in enumerate(labelled(1)[:120])
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    sources = [{"name": "a", "paths": ["x.jsonl"], "id_field": "id"}]
    return made(recipe(tmp_path, sources=sources, steps=list(steps)))


def test_documents_are_chosen_and_their_text_left(trained, tmp_path):
    classifier = str(trained / "made")
    corpus = selected(
        trained,
        tmp_path,
        {"classify": {"classifier": classifier, "field": "kind", "score": "prose", "min_score": 0.5}},
    )
    originals = {str(i): text for i, (_, text) in enumerate(labelled(1)[:120])}
    right = 0
    for kind in ("documents", "dropped"):
        for record in corpus.records(kind):
            assert record["text"] == originals[record["id"].removeprefix("a/")]
            entry = record["darwin"]["operations"][-1]
            assert entry["model"].startswith("linear ") and record["darwin"]["level"] == 3
            assert (entry["scores"]["kind"] >= 0.5) == (kind == "documents")
            assert record["labels"]["kind"] == entry["notes"]["kind"]
            right += (record["fields"]["true"] == "prose") == (kind == "documents")
    assert right > 105
    assert corpus.counts["dropped"] == {"classify/low_kind": len(list(corpus.records("dropped")))}


def test_the_best_share_of_characters_stays(trained, tmp_path):
    step = {"select_top": {"classifier": str(trained / "made"), "score": "prose", "share": 0.3}}
    corpus = selected(trained, tmp_path, step)
    kept, gone = (list(corpus.records(kind)) for kind in ("documents", "dropped"))
    sizes = [sum(len(record["text"]) for record in side) for side in (kept, gone)]
    largest = max(len(record["text"]) for record in kept)
    assert 0 <= sizes[0] - 0.3 * sum(sizes) <= largest
    loaded = classifiers.load(trained / "made")
    place = loaded.labels.index("prose")
    scores = [[loaded.probabilities(record["text"])[place] for record in side] for side in (kept, gone)]
    assert min(scores[0]) >= max(scores[1])


def test_what_a_classifier_cannot_do_is_said(trained, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such label"):
        selected(trained, tmp_path, {"classify": {"classifier": str(trained / "made"), "keep": ["poetry"]}})
    with pytest.raises(DataError, match="no classifier"):
        selected(trained, tmp_path, {"classify": {"classifier": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match="min_score needs"):
        selected(trained, tmp_path, {"classify": {"classifier": "x", "min_score": 0.5}})
    folder = tmp_path / "damaged"
    classifiers.load(trained / "made").save(folder)
    content = bytearray((folder / "linear.weights.npy").read_bytes())
    content[-1] ^= 1
    (folder / "linear.weights.npy").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        classifiers.load(folder)
    described = json.loads((folder / "classifier.json").read_text()) | {"kind": "forest"}
    (folder / "classifier.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="entry point 'forest'"):
        classifiers.load(folder)
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3)
    assert main(["data", "train-classifier", str(tmp_path / "one.jsonl"), "--out", str(tmp_path / "y")]) == 2
    assert "two labels" in capsys.readouterr().err and not (tmp_path / "y").exists()


@pytest.mark.parametrize("option", [("epochs", "0"), ("tokens", "0"), ("seed", "-1"), ("at-least", "nan")])
def test_options_that_train_nothing_are_refused(tmp_path, capsys, option):
    name, value = option
    words = ["data", "train-classifier", "x.jsonl", "--out", str(tmp_path), f"--{name}", value]
    assert main(words) == 2 and f"--{name} is" in capsys.readouterr().err


def test_a_classifier_that_says_nan_lets_nothing_in(tmp_path, monkeypatch):
    class Odd:
        labels, name = ("bad", "good"), "odd 1"

        def probabilities(self, text):
            return np.array([np.nan, np.nan]) if "odd" in text else np.array([0.2, 0.8])

    monkeypatch.setattr(classifiers, "load", lambda folder: Odd())
    chosen = {"classifier": tmp_path, "score": "good"}
    classify = Classify(Classify.Parameters(**chosen, min_score=0.5, keep=["good", "bad"]))
    top = SelectTop(SelectTop.Parameters(**chosen, share=1.0))
    classify.open()
    top.open()
    top.begin(tmp_path, 0)
    fates = []
    for text in ("odd", "plain"):
        each = begin(text, f"a/{text}", "a", None, {}, None)
        outcome = classify.apply(each)
        fates.append((outcome.drop, outcome.quarantine))
        top.sketch(each)
    top.skip()
    top.finish()
    assert fates == [(None, "no_score"), (None, None)]
    [(_, verdicts)] = top.solve(tmp_path, [0])
    assert [(one.place, one.reason) for one in verdicts] == [(0, "no_score")]


def test_another_package_reads_its_own_kind(tmp_path, monkeypatch):
    class Longer:
        labels, name = ("short", "long"), "longer 1"

        def probabilities(self, text):
            share = min(1.0, len(text) / 1000)
            return np.array([1 - share, share])

    class Point:
        name = "longer"

        def load(self):
            return lambda folder, described: Longer()

    monkeypatch.setattr(classifiers, "entry_points", lambda group: [Point()])
    (tmp_path / "classifier.json").write_text('{"kind": "longer"}')
    assert classifiers.load(tmp_path).probabilities("x" * 250)[1] == 0.25
