"""A search of mixtures comes nearer to a known optimum than as many random ones, and says how sure it is."""

import json

import numpy as np
import pytest
import yaml

from benchmarks import mixture_search
from benchmarks.lab_calibration import base
from megatron_davinci.config import load_config
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.lab import mixtures
from megatron_davinci.lab.mixtures import Space, load_search, look
from megatron_davinci.lab.outcomes import Outcome
from megatron_davinci.stats.mixture_search import Bounds, best_mixture, fit_predictor, propose
from tests.cases import is_long
from tests.cli.screen import davinci


def written(folder, **changes):
    folder.mkdir(exist_ok=True)
    settings = base()
    settings["curriculum"].append({**settings["curriculum"][0], "name": "end"})
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    said = {"question": "Which?", "base": "base.yaml", "stage": "end", "rounds": [5, 3], **changes}
    (folder / "search.yaml").write_text(yaml.safe_dump(said))
    return folder / "search.yaml"


def test_mixtures_keep_their_bounds():
    rng = np.random.default_rng(0)
    bounds = Bounds(np.array([0.1, 0.0, 0.05]), np.array([0.5, 0.6, 0.9]))
    base_mixture = np.array([0.4, 0.4, 0.2])
    tried = propose(base_mixture, np.empty((0, 3)), np.empty(0), bounds, 12, rng)
    assert tried[0] == pytest.approx(base_mixture)
    more = propose(base_mixture, tried, ((tried - [0.2, 0.6, 0.2]) ** 2).sum(1), bounds, 8, rng)
    for one in (tried, more):
        assert one.sum(axis=1) == pytest.approx(1) and (one >= bounds.floor - 1e-9).all()
        assert (one <= bounds.ceiling + 1e-6).all()
    assert len(np.unique(more.round(6), axis=0)) == 8
    only = np.array([0.8, 0.05, 0.05, 0.1])
    assert only.sum() > 1, "as floats"
    assert Bounds(only, np.ones(4)).draw(only, 8.0, 2, rng) == pytest.approx(np.array([only, only]))
    with pytest.raises(DataError, match="No mixture lies"):
        Bounds(np.array([0.6, 0.6]), np.array([1.0, 1.0]))
    with pytest.raises(DataError, match="several mixtures"):
        fit_predictor(tried[:3], np.ones(3))


def test_a_smooth_loss_is_found_and_its_interval_holds_the_truth():
    rng = np.random.default_rng(4)
    true = np.array([0.2, 0.5, 0.3])
    bounds = Bounds(np.zeros(3), np.ones(3))
    start = np.full(3, 1 / 3)

    def loss(mixture):
        return 3 + 2 * ((np.sqrt(mixture) - np.sqrt(true)) ** 2).sum(-1)

    tried = propose(start, np.empty((0, 3)), np.empty(0), bounds, 14, rng)
    losses = loss(tried) + 0.001 * rng.normal(size=len(tried))
    found = best_mixture(start, tried, losses, bounds, rng)
    assert found.mixture == pytest.approx(true, abs=0.06) and found.better > 0.95
    assert found.gain_low <= loss(start) - loss(found.mixture) <= found.gain_high
    assert ((found.low - 0.02 <= true) & (true <= found.high + 0.02)).all()


def test_a_search_beats_random_ones_of_as_many_runs():
    found = mixture_search.searches(30 if is_long() else 1, 3)
    assert found["search_gain_fraction"] > found["random_gain_fraction"]
    assert found["search_gain_fraction"] > 0.8


def test_a_search_writes_a_curriculum_and_goes_on_with_what_it_proposed(tmp_path, monkeypatch):
    path, asked = written(tmp_path, floor={"a": 0.1}, ceiling={"b": 0.8}), []

    def trained(root, runs, *, design, **others):
        asked.append([run.arm.config.curriculum[1].mixture for run in runs])
        assert design.branch.after == "all"
        steps = [float(run.arm.config.curriculum[1].mixture["a"]) for run in runs]
        return [
            Outcome(
                run, "done", 1, 1, "",
                [{"step": 1, "consumed_tokens": 1, "heldout_loss": {"a": 3 + (share - 0.7) ** 2}}],
            )
            for run, share in zip(runs, steps, strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(mixtures, "carry_out", trained)
    search = load_search(path)
    found = look(search, path, tmp_path / "lab", parallel=1)
    assert [len(one) for one in asked] == [5, 8] and asked[1][:5] == asked[0]
    said = json.loads((found.parent / "mixture.json").read_text())
    assert said["mixture"]["a"] == pytest.approx(0.7, abs=0.1) and said["gain"] > 0.01 and said["tried"] == 8
    assert sum(said["mixture"].values()) == pytest.approx(1, abs=1e-9)
    # The curriculum is one that a run can have.
    settings = {**base(), **yaml.safe_load(found.read_text())}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(settings))
    stages = load_config(tmp_path / "whole.yaml").curriculum
    assert float(stages[1].mixture["a"]) == said["mixture"]["a"] and float(stages[0].mixture["a"]) == 0.5
    assert (found.parent / "tried.csv").read_text().count("\n") == 9
    assert "less than the base" in (found.parent / "mixture.md").read_text()
    before = list(asked)
    look(search, path, tmp_path / "lab", parallel=1)
    assert asked[2:] == before
    settings["curriculum"] = base()["curriculum"] * 2
    settings["curriculum"][1] = {
        **settings["curriculum"][1],
        "name": "end",
        "mixture": {"a": 0.25, "b": 0.75},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(DataError, match="began at another mixture"):
        look(search, path, tmp_path / "lab", parallel=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": [2]}, "the first should have 4"),
        ({"stage": "nowhere"}, "no such stage"),
        ({"floor": {"c": 0.1}}, "does not mix"),
        ({"budget": {"runs": 3}}, "more than its budget"),
        ({"budget": {"tokens": "100k"}}, "found: 8 runs, 369k tokens"),
        ({"share_past": False, "budget": {"tokens": "400k"}}, "found: 8 runs, 655k tokens"),
        ({"seeds": [1, 1]}, "seeds should differ"),
        ({"floor": {"a": 1.0}}, "2 that differ in the fourth decimal, of 5"),
        ({"metric": "heldout_loss.c"}, "does not measure it"),
        ({"metric": "task.arithmetic.acc,none"}, "a search asks no tasks"),
        ({"steps": 1}, "(line 7): unknown key"),
    ],
)
def test_what_is_no_search_is_refused(changes, said, tmp_path):
    path = written(tmp_path, **changes)
    screen = davinci("lab", "mixture", path, "--out", tmp_path / "lab")
    assert screen.code == 2 and said in " ".join(screen.err.split()) and "search.yaml" in screen.err
    assert not (tmp_path / "lab").exists(), "what was proposed would be gone on with"


def test_the_same_mixture_twice_is_one_loss(tmp_path, monkeypatch):
    path = written(tmp_path, rounds=[6])
    search = load_search(path)
    space = Space(search, path)
    drawn = np.array([[0.5, 0.5], [0.2, 0.8], [0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    monkeypatch.setattr(mixtures, "propose", lambda *_: drawn)

    def trained(root, runs, **others):
        line = {"step": 1, "consumed_tokens": 1, "heldout_loss": {"a": 3.0}}
        return [Outcome(run, "done", 1, 1, "", [line]) for run in runs]

    monkeypatch.setattr(mixtures, "carry_out", trained)
    found = look(search, path, tmp_path / "lab", parallel=1)
    assert json.loads((found.parent / "mixture.json").read_text())["tried"] == 4
    assert space.domains == ["a", "b"] and (found.parent / "tried.csv").read_text().count("\n") == 5


def test_too_few_runs_are_no_ground(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setattr(
        mixtures, "carry_out", lambda root, runs, **others: [Outcome(r, "failed", 0, 9) for r in runs]
    )
    with pytest.raises(DataError, match="Too few runs") as refused:
        look(load_search(path), path, tmp_path / "lab", parallel=1)
    assert "mixture 1, seed 1: failed" in str(refused.value)
    with pytest.raises(ConfigError, match="no such stage"):
        Space(load_search(written(tmp_path / "other", stage="x")), path)
