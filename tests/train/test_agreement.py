"""Ranks that are not made of the same refuse to start, and say who has what."""

import os

import pytest

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.train.agreement import RankFacts, differences
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def facts(host, **changes):
    return RankFacts(host, {"torch": "2.13.0", "python": "3.11.7", **changes})


def test_ranks_that_agree_have_nothing_to_say():
    assert differences([facts("a")] * 3) == []


def test_who_has_what_is_named_by_rank_and_node():
    ranks = [facts("a")] * 4 + [facts("b", torch="2.12.1")] * 2 + [facts("b"), facts("c", torch="2.11.0")]
    assert differences(ranks) == [
        "torch: 2.13.0 on rank 0 to 3 (a), rank 6 (b); 2.12.1 on rank 4 to 5 (b); 2.11.0 on rank 7 (c)"
    ]


def test_a_thousand_nodes_fit_on_a_screen():
    ranks = [facts(f"n{number // 8}") for number in range(8000)] + [facts("odd", python="3.12.1")]
    [line] = differences(ranks)
    assert line.startswith("python: 3.11.7 on rank 0 to 7 (n0), ") and len(line) < 250
    assert "(and 996 more nodes); 3.12.1 on rank 8000 (odd)" in line


def train_with_another(settings, version):
    """Rank 1 has another seed in its configuration, and another Megatron-Core."""
    import importlib.metadata

    if os.environ["RANK"] == "1":
        settings = {**settings, "run": {**settings["run"], "seed": 8}}
        real = importlib.metadata.version
        importlib.metadata.version = lambda name: version if name == "numpy" else real(name)
    return train_here(settings)


def test_ranks_of_different_make_refuse_before_anything_is_written(tmp_path):
    with pytest.raises(EnvironmentProblem) as error:
        run_ranks(2, train_with_another, tiny_settings(tmp_path), "1.0.0")
    said = str(error.value)
    assert "configuration: " in said and "numpy: " in said and "torch" not in said.split("do:")[0]
    assert "1.0.0 on rank 1 (" in said
    assert not (tmp_path / "run").exists()
