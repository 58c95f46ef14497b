"""Levers that contradict each other are refused with the key and what to write instead."""

from __future__ import annotations

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.config import small


def refusal(**changes):
    with pytest.raises(ConfigError) as caught:
        validate(small.settings(**changes), "test")
    return str(caught.value)


def recompute(**keys):
    return {"train": {"precision": "fp32", "recompute": keys}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"granularity": "selective"}, "needs modules"),
        ({"modules": ["mlp"]}, "granularity: selective"),
        ({"granularity": "full", "modules": ["mlp"]}, "found granularity: full"),
        ({"granularity": "selective", "modules": ["mlp", "mlp"]}, "twice"),
        ({"granularity": "selective", "modules": ["mpl"]}, "'mpl'"),
        ({"granularity": "selective", "modules": ["mlp"], "layers": 2}, "layers acts with granularity: full"),
        ({"layers": 2}, "layers acts with granularity: full"),
        ({"granularity": "full", "layers": 0}, "greater than or equal to 1"),
        ({"granularity": "full", "layers": 3}, "more than any pipeline stage has"),
        ({"granularity": "full", "layers": 3, "method": "block"}, "more than any pipeline stage has"),
    ],
)
def test_recomputation_that_would_not_act_is_refused(keys, said):
    text = refusal(**recompute(**keys))
    assert "train.recompute" in text and said in text


def test_recomputed_runs_of_layers_are_equal():
    keys = recompute(granularity="full", layers=3)
    assert "does not divide the layers of a pipeline stage (4)" in refusal(
        model={"num_layers": 8}, parallel={"pipeline": 2}, **keys
    )
    keys["train"]["recompute"]["method"] = "block"
    assert validate(small.settings(model={"num_layers": 8}, parallel={"pipeline": 2}, **keys), "test")


def test_contradictions_of_several_sections_are_listed_together():
    text = refusal(data={"sequence_length": 32}, **recompute(granularity="full", layers=5))
    assert "exceeds model.max_sequence_length" in text and "train.recompute.layers (5)" in text
