"""`davinci data order` says what is done to a sample, and shows it as the model sees it."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_davinci.config import load_config
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.train.forecast import Forecast
from tests.cli.screen import davinci
from tests.tiny import LENGTH
from tests.transforming import EOD, FIRST_CHANGED, SENTINELS, TRANSFORMS, by_hand, transformed_settings


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("transforms")
    config = root / "config.yaml"
    transforms = {**TRANSFORMS, "document_mask": True}
    config.write_text(yaml.safe_dump(transformed_settings(root, transforms)))
    return config


@pytest.fixture(scope="module")
def told(config):
    count = FIRST_CHANGED + 48
    screen = davinci("data", "order", config, "--at", 0, "--count", count, "--full-text", "--json")
    assert (screen.code, screen.err) == (0, "")
    return json.loads(screen.out)["samples"]


def test_samples_are_shown_as_they_are_stored_and_as_the_model_sees_them(config, told):
    settings = load_config(config)
    forecast, tokenizer = Forecast.read(settings), Tokenizer.load(settings.data.tokenizer)
    kinds = set()
    for sample in told[FIRST_CHANGED:]:
        source, shown = sample["source"]["name"], sample["transforms"]
        stored = forecast.sources[source].read(sample["window"]["number"])
        wanted, weights, cut = by_hand(forecast.sources, forecast.curriculum, sample["n"], TRANSFORMS, 7)
        assert sample["window"]["text"]["first"] == tokenizer.decode(stored)
        assert shown["tokens_cut"] == cut
        assert shown["labels_with_loss"] == sum(
            weight > 0 and token != EOD for token, weight in zip(wanted[:-1], weights, strict=True)
        )
        if wanted == stored.tolist():
            assert shown["text"] is None
        else:
            assert shown["text"]["first"] == tokenizer.decode(wanted)
            kinds.add(source)
        said = "; ".join(shown["applied"])
        assert ("fill in the middle" in said) == any(name in tokenizer.decode(wanted) for name in SENTINELS)
        assert ("metadata prefix" in said) == (cut > 0 and "U: " in tokenizer.decode(wanted))
        assert said.endswith("document mask")
    assert kinds == {"code", "web"}


def test_a_stage_without_transforms_has_none(told):
    for sample in told[:FIRST_CHANGED]:
        assert sample["transforms"] == {
            "applied": [],
            "tokens_cut": 0,
            "labels_with_loss": sample["window"]["labels_with_loss"],
            "text": None,
            "ids": None,
        }


def test_the_screen_says_it(config, told):
    changed = next(sample for sample in told if len(sample["transforms"]["applied"]) == 3)
    screen = davinci("data", "order", config, "--at", changed["n"], "--full-text").out
    shown = changed["transforms"]
    assert "; ".join(shown["applied"]) in screen
    assert f"{shown['tokens_cut']} tokens past the end are cut" in screen
    assert f"{shown['labels_with_loss']} labels carry loss" in screen and shown["labels_with_loss"] < LENGTH
    assert screen.index("text, ") < screen.index("as the model sees it, ")
    assert SENTINELS[0] in screen[screen.index("as the model sees it, ") :]
    plain = davinci("data", "order", config, "--at", 0).out
    assert "\ntransforms" not in plain and "as the model sees it" not in plain
