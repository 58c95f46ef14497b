"""Refinement by a real model behind our own server: a bad way and kills change nothing; each answer is used once."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.cli.main import main
from tests.cases import is_long
from tests.darwin.making import made
from tests.darwin.refine_trial import refining, trial
from tests.ranks import start_ranks


def run_here(path: str, workers: int) -> int:
    return main(["data", "run", path, "--workers", str(workers)])


def in_a_fork(loaded, workers):
    """`davinci data run` in a process that has everything imported already."""
    [(process, _)] = start_ranks(1, run_here, str(loaded.path), workers, parents=True)
    return process


@pytest.mark.long
def test_faults_and_kills_change_nothing_and_each_answer_is_used_once(tmp_path, tiny_url):
    kills, documents = (20, 24) if is_long() else (1, 2)
    found = trial(tmp_path, tiny_url, 3, kills, documents, in_a_fork, quick=not is_long(), stream=True)
    assert found["counts"]["kills"] == kills and len(found["counts"]["faults"]) > 3
    assert found["counts"]["refined_chunks"] and found["counts"]["untouched_chunks"]
    figures = dict(found["figures"])
    assert figures.pop("calls_used_that_are_not_on_disk") == 0
    assert set(figures.values()) == {1.0}, found


def test_a_chunk_beyond_the_models_context_keeps_its_text(tmp_path, tiny_url):
    loaded = refining(tmp_path, "long", tiny_url, 1)
    loaded.recipe.steps[0]["refine"]["chunk"] = 4000
    corpus = made(loaded)
    [record] = corpus.records()
    [raw] = (tmp_path / "raw").iterdir()
    assert record["text"] == json.loads(raw.read_text())["text"] and record["darwin"]["level"] == 0
    assert record["darwin"]["operations"][-1]["notes"]["chunks"] == {"refused": 1}
