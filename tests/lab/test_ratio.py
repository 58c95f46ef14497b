"""How much of a new domain general loss bears, drawn on from short runs whose curves are known."""

import json

import numpy as np
import pytest
import yaml

from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.lab.arms import arms_of, runs_of
from megatron_davinci.lab.outcomes import Outcome
from megatron_davinci.lab.ratio import Question, answer, in_words, write
from megatron_davinci.stats.mixture_ratio import critical_ratio
from tests.cases import is_long
from tests.lab.test_mixtures import written as search_in
from tests.lab.test_pasts import load_design

SHARES = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3)


def drawn(rng, noise=0.002, steps=20):
    """Runs to one unit of tokens, and the share that is critical at four."""
    height, power, gift = rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.4), rng.uniform(0.02, 0.1)
    t = np.linspace(0.1, 1, steps)

    def general(share, at):
        return height * share * at**power - gift * (1 - share) * (1 - (1 + at / 0.1) ** -0.6)

    runs = {
        share: (
            t,
            general(share, t) + noise * rng.normal(size=steps),
            -0.5 * share**0.3 * t**0.25 + noise * rng.normal(size=steps),
        )
        for share in SHARES
    }
    fine = np.linspace(SHARES[0], SHARES[-1], 2000)
    feasible = fine[general(fine, 4.0) <= 0.05]
    return runs, float(feasible.max()) if len(feasible) else 0.0


def test_the_critical_ratio_is_found_with_the_interval_that_is_stated():
    rng, held, errors = np.random.default_rng(7), [], []
    for _ in range(200 if is_long() else 30):
        runs, true = drawn(rng)
        found = critical_ratio(runs, 4.0)
        held.append(found.low - 1e-3 <= true <= found.high + 1e-3)
        errors.append(abs((found.ratio or 0) - true))
    # A step of the grid of shares is 0.08 to 0.17.
    assert np.mean(held) >= 0.85 and np.median(errors) < 0.04


def test_what_cannot_be_told_is_refused():
    runs, _ = drawn(np.random.default_rng(0))
    with pytest.raises(DataError, match="Too few shares"):
        critical_ratio({share: runs[share] for share in SHARES[:2]}, 4.0)
    with pytest.raises(DataError, match="evaluations on the way"):
        critical_ratio(drawn(np.random.default_rng(0), steps=4)[0], 4.0)
    rises = {share: (t, g + 1, d) for share, (t, g, d) in runs.items()}
    found = critical_ratio(rises, 4.0)
    assert found.ratio is None and max(found.feasible.values()) < 0.05


def test_runs_of_a_design_become_a_curriculum(tmp_path):
    search_in(tmp_path)
    settings = yaml.safe_load((tmp_path / "base.yaml").read_text())
    settings["data"]["validation"]["b"] = "nowhere/b-valid"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    arms = {
        f"{share:.3f}": {"set": {"curriculum.1.mixture": {"a": round(1 - share, 3), "b": round(share, 3)}}}
        for share in SHARES
    }
    design = {
        "question": "?", "base": "base.yaml", "varies": ["curriculum.1.mixture"], "arms": arms, "seeds": [1, 2],
        "metrics": [{"name": "heldout_loss.mean", "margin": 0.1}],
    }  # fmt: skip
    path = tmp_path / "design.yaml"
    path.write_text(yaml.safe_dump(design, sort_keys=False))
    loaded = load_design(path)
    arms, tokens = arms_of(loaded), 40960
    runs, true = drawn(np.random.default_rng(2))
    outcomes = []
    for run in runs_of(loaded, arms):
        at, general, domain = runs[min(SHARES, key=lambda share: abs(share - float(run.arm.name)))]
        lines = [{"step": 1, "consumed_tokens": tokens, "heldout_loss": {"a": 3.0, "b": 4.0}}] + [
            {"step": 1, "consumed_tokens": tokens * (1 + t), "heldout_loss": {"a": 3 + g, "b": 4 + d}}
            for t, g, d in zip(at, general, domain)
        ]
        outcomes.append(Outcome(run, "done", 1, 1, "", lines))
    asked = Question("end", "b", "a", 4 * tokens, 0.05)
    found = answer(arms, outcomes, asked, path)
    assert found.ratio == pytest.approx(true, abs=0.08) and "of b (" in in_words(asked, found)
    file = write(tmp_path / "ratio", arms[0], asked, found)
    stage = yaml.safe_load(file.read_text())["curriculum"][1]
    assert stage["mixture"]["b"] == pytest.approx(found.ratio, abs=1e-3) and stage["tokens"] == 4 * tokens
    assert sum(stage["mixture"].values()) == pytest.approx(1, abs=1e-9)
    assert json.loads((tmp_path / "ratio" / "ratio.json").read_text())["feasible"]["0.125"] > 0.9
    for wrong, said in (
        (Question("x", "b", "a", 1, 0.1), "no such stage"),
        (Question("end", "c", "a", 1, 0.1), "--domain"),
    ):
        with pytest.raises(ConfigError, match=said):
            answer(arms, outcomes, wrong, path)
