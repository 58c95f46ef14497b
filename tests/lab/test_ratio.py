"""How much of a new domain general loss bears, drawn on from short runs whose curves are known."""

import json
from dataclasses import replace

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
    t, general, domain = runs[SHARES[0]]
    with pytest.raises(DataError, match="no number"):
        critical_ratio({**runs, SHARES[0]: (t, general, domain * np.nan)}, 4.0)
    rises = {share: (t, g + 1, d) for share, (t, g, d) in runs.items()}
    found = critical_ratio(rises, 4.0)
    assert found.ratio is None and max(found.feasible.values()) < 0.05


TOKENS = 40960  # of each stage


def design_in(folder, shares, *, domains=("a",), **changes):
    """A design whose arms give `b` a share of the last stage, and the other domains the rest; 0 is left out."""
    search_in(folder)
    settings = yaml.safe_load((folder / "base.yaml").read_text())
    settings["data"]["validation"]["b"] = "nowhere/b-valid"
    for name in domains[1:]:
        settings["data"]["sources"][name] = settings["data"]["sources"]["a"]
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    arms = {}
    for share in shares:
        rest = {name: (1 - round(share, 3)) / len(domains) for name in domains}
        mixture = {name: one for name, one in (rest | {"b": round(share, 3)}).items() if one}
        arms[f"{share:.3f}"] = {"set": {"curriculum.1.mixture": mixture}}
    said = {
        "question": "?", "base": "base.yaml", "varies": ["curriculum.1.mixture"], "arms": arms, "seeds": [1, 2],
        "metrics": [{"name": "heldout_loss.mean", "margin": 0.1}], **changes,
    }  # fmt: skip
    path = folder / "design.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path, load_design(path)


def measured(run, at, general, domain):
    """A run that was evaluated where its last stage begins and on the way."""
    lines = [{"step": 1, "consumed_tokens": TOKENS, "heldout_loss": {"a": 3.0, "b": 4.0}}] + [
        {"step": 1, "consumed_tokens": TOKENS * (1 + t), "heldout_loss": {"a": 3 + g, "b": 4 + d}}
        for t, g, d in zip(at, general, domain)
    ]
    return Outcome(run, "done", 1, 1, "", lines)


def linear(runs):
    """Outcomes whose general loss rises by 0.1 nats at a share of 1, and whose domain's falls."""
    found, at = [], np.linspace(0.1, 1, 10).tolist()
    for run in runs:
        share = float(run.arm.name)
        found.append(measured(run, at, [0.1 * share * t for t in at], [-0.5 * share * t**0.25 for t in at]))
    return found


def last_mixture(file):
    return yaml.safe_load(file.read_text())["curriculum"][-1]["mixture"]


def test_runs_of_a_design_become_a_curriculum(tmp_path):
    path, loaded = design_in(tmp_path, SHARES)
    arms, tokens = arms_of(loaded), TOKENS
    runs, true = drawn(np.random.default_rng(2))
    outcomes = []
    for run in runs_of(loaded, arms):
        at, general, domain = runs[min(SHARES, key=lambda share: abs(share - float(run.arm.name)))]
        outcomes.append(measured(run, at, general, domain))
    asked = Question("end", "b", "a", 4 * tokens, 0.05)
    found = answer(arms, outcomes, asked, path)
    assert found.ratio == pytest.approx(true, abs=0.08) and "of b (" in in_words(asked, found)
    file = write(tmp_path / "ratio", arms, asked, found)
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


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_control_with_none_or_all_of_the_domain_gives_no_proportions(tmp_path, first):
    path, loaded = design_in(tmp_path, (first, 0.25, 0.5, 0.75), domains=("a", "c"))
    arms = arms_of(loaded)
    asked = Question("end", "b", "a", TOKENS, 0.05)
    found = answer(arms, linear(runs_of(loaded, arms)), asked, path)
    assert found.ratio == pytest.approx(0.5, abs=0.01) and first in found.feasible
    mixture = last_mixture(write(tmp_path / "ratio", arms, asked, found))
    assert mixture["b"] == pytest.approx(found.ratio, abs=1e-4)
    assert mixture["a"] == pytest.approx(mixture["c"], abs=1.5e-4) and sum(mixture.values()) == pytest.approx(
        1
    )


def test_many_other_domains_take_nothing_from_the_share(tmp_path):
    domains = ("a", *(f"d{number}" for number in range(63)))
    path, loaded = design_in(tmp_path, (0.01, 0.5, 0.9), domains=domains)
    arms = arms_of(loaded)
    asked = Question("end", "b", "a", TOKENS, 0.0009)
    found = answer(arms, linear(runs_of(loaded, arms)), asked, path)
    assert found.ratio is None
    found = replace(found, ratio=0.01)
    mixture = last_mixture(write(tmp_path / "ratio", arms, asked, found))
    assert mixture["b"] == 0.01 and sum(mixture.values()) == pytest.approx(1, abs=1e-9)


def test_a_curriculum_of_an_earlier_question_does_not_answer_the_next(tmp_path):
    path, loaded = design_in(tmp_path, (0.25, 0.5, 0.75))
    arms = arms_of(loaded)
    outcomes = linear(runs_of(loaded, arms))
    for tolerance, feasible in ((0.05, True), (0.001, False)):
        asked = Question("end", "b", "a", TOKENS, tolerance)
        file = write(tmp_path / "ratio", arms, asked, answer(arms, outcomes, asked, path))
        assert (file is not None) == feasible == (tmp_path / "ratio" / "curriculum.yaml").exists()


def test_what_later_stages_do_to_a_loss_is_not_the_mixtures_doing(tmp_path):
    path, loaded = design_in(tmp_path, (0.25, 0.5, 0.75))
    settings = yaml.safe_load((tmp_path / "base.yaml").read_text())
    settings["curriculum"].append({**settings["curriculum"][0], "name": "after"})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    arms = arms_of(loaded)
    outcomes = linear(runs_of(loaded, arms))
    for one in outcomes:
        worse = {"step": 2, "consumed_tokens": 3.0 * TOKENS, "heldout_loss": {"a": 9.0, "b": 9.0}}
        one.evaluations.append(worse)
    asked = Question("end", "b", "a", TOKENS, 0.05)
    assert answer(arms, outcomes, asked, path).ratio == pytest.approx(0.5, abs=0.01)


def test_runs_of_one_size_that_differ_in_the_mixture_only_are_asked(tmp_path):
    ladder = {"small": {}, "large": {"model.hidden_size": 128}}
    path, loaded = design_in(tmp_path, (0.25, 0.5, 0.75), ladder=ladder)
    arms = arms_of(loaded)
    outcomes = linear([run for run in runs_of(loaded, arms) if run.arm.size == "large"])
    outcomes += [
        replace(one, state="failed") for one in linear(runs_of(loaded, arms)) if one.run.arm.size == "small"
    ]
    asked = Question("end", "b", "a", TOKENS, 0.05)
    with pytest.raises(ConfigError, match="--tokens"):
        answer(arms, outcomes, replace(asked, tokens=0), path)
    with pytest.raises(ConfigError, match="one of small, large"):
        answer(arms, outcomes, asked, path)
    assert answer(arms, outcomes, replace(asked, size="large"), path).ratio == pytest.approx(0.5, abs=0.01)
    with pytest.raises(DataError, match="No run of the design is done"):
        answer(arms, outcomes, replace(asked, size="small"), path)
    with pytest.raises(ConfigError, match="tolerance"):
        answer(arms, outcomes, replace(asked, size="large", tolerance=float("nan")), path)

    path, loaded = design_in(tmp_path / "rate", (0.25, 0.5, 0.75))
    raised = {"curriculum.1.learning_rate.peak": 1e-3}
    arms = {name: arm.model_copy(update={"set": arm.set | raised}) for name, arm in loaded.arms.items()}
    loaded = loaded.model_copy(update={"arms": loaded.arms | {"0.750": arms["0.750"]}})
    with pytest.raises(ConfigError, match=r"learning_rate\.peak"):
        answer(arms_of(loaded), [], asked, path)
