"""Tasks asked of a model while it is trained: the same under every layout, and training goes as without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.answers import Answers
from megatron_davinci.evaluate.harness import NativeLM
from megatron_davinci.evaluate.in_loop import Asked, _encoded, _scores
from megatron_davinci.evaluate.local import LocalTask
from megatron_davinci.evaluate.texts import pairs_of
from megatron_davinci.report.run_tasks import read_tasks
from tests.evaluate import trained
from tests.ranks import run_ranks
from tests.tiny import train_each

LAYOUTS = {"DP2": {}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(run, "metrics.jsonl")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs of six steps with an evaluation after every three: of every layout with tasks, of DP2 without."""
    root = tmp_path_factory.mktemp("in-loop")
    settings = trained.prepared(root)

    def of(name: str, tasks: int, **parallel: int) -> dict[str, Any]:
        return settings | {
            "run": {"directory": str(root / name), "seed": 1},
            "parallel": {"device": "cpu", **parallel},
            "train": {**settings["train"], "micro_batch_size": 2, "stop_after_steps": 6},
            "evaluation": {"every_steps": 3, "sequences": 2, "tasks": tasks},
        }

    run_ranks(
        2, train_each, [of(name, 4, **parallel) for name, parallel in LAYOUTS.items()] + [of("without", 0)]
    )
    return root


def test_training_goes_as_without_them(root):
    assert len(losses(root / "DP2")) == 6
    assert losses(root / "DP2") == losses(root / "without")
    assert all("tasks" not in line for line in lines(root / "without", "evals.jsonl"))


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_every_layout_gives_the_same_scores(root, name):
    expected, found = (lines(root / one, "evals.jsonl") for one in ("DP2", name))
    assert [line["step"] for line in found] == [3, 6]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["tasks"].keys() == theirs["tasks"].keys() and len(ours["tasks"]) == 5
        shapes = [line["tasks"].pop("geometry") for line in (ours, theirs)]
        assert shapes[0] == pytest.approx(shapes[1], rel=1e-3)
        for task, scores in theirs["tasks"].items():
            # An option may win by less than rounding.
            assert abs(ours["tasks"][task]["acc"] - scores["acc"]) <= 1 / scores["items"], task


def test_the_page_has_them_beside_what_davinci_eval_has_measured(root):
    assert {line.task for line in read_tasks(root / "DP2")} == set(
        lines(root / "DP2", "evals.jsonl")[0]["tasks"]
    )


class Counting:
    """A tokenizer of one token a character, which counts the texts that it is given."""

    eod_id, texts = 0, 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.texts += len(texts)
        return [np.array([ord(letter) for letter in text]) for text in texts]


def test_a_context_is_encoded_once_for_all_its_options():
    tokenizer = Counting()
    asked = [("ab", "c"), ("ab", "d"), ("ab", "e"), ("", "f")]
    pairs = list(pairs_of(tokenizer, asked))
    assert pairs == [([97, 98], [99]), ([97, 98], [100]), ([97, 98], [101]), ([0], [102])]
    assert tokenizer.texts == 5


def test_an_item_that_is_longer_than_the_model_loses_its_beginning_as_in_davinci_eval():
    item = {"text": "abcdefghij", "options": [" kl", " m"], "answer": 0}
    asked = _encoded(LocalTask("cloze_x_likelihood", "x", "likelihood", [item]), Counting(), 6)
    lm = NativeLM(None, Counting(), 6, Answers(None, {}))
    encoded = pairs_of(Counting(), [(item["text"], option) for option in item["options"]])
    assert asked.pairs == [lm._checked(None, pair) for pair in encoded]
    assert ["".join(map(chr, before + rest)) for before, rest in asked.pairs] == ["ghij kl", "fghij m"]
    too_long = {**item, "options": [" klmnop", " m"]}
    assert not _encoded(LocalTask("x_likelihood", "x", "likelihood", [too_long]), Counting(), 6).pairs


def test_logits_that_are_no_numbers_have_no_score():
    task = Asked("choice", np.array([0, 1]), np.ones((2, 2)), [])
    assert _scores(task, np.array([[-1.0, -2.0], [float("nan"), -1.0]])) == {
        "items": 2,
        "problem": "1 of 2 items have logits that are not numbers",
    }
    assert _scores(task, np.array([[-1.0, -2.0], [-1.0, -2.0]]))["acc"] == 0.5


def test_what_they_do_not_go_with_is_said_at_once(root):
    (root / "other").mkdir()
    settings = trained.prepared(root / "other")
    settings["parallel"] = {"device": "cpu", "tensor": 2, "sequence": True}
    settings["data"].pop("tokenizer")
    with pytest.raises(ConfigError) as error:
        validate(settings, "test")
    said = str(error.value)
    assert "data.tokenizer is not given" in said and "found parallel.sequence: true" in said
