"""Words that follow from figures, and no word where there is no ground for one."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import lab_calibration
from megatron_davinci.errors import ConfigError
from megatron_davinci.lab.arm_plots import curves, domain_bars, ends_of, mixtures
from megatron_davinci.lab.arms import runs_of
from megatron_davinci.lab.control import check
from megatron_davinci.lab.outcomes import Outcome, folder_of
from megatron_davinci.lab.report import answer, markdown, sizes_csv, write_index, write_report
from megatron_davinci.lab.verdict import as_json, in_words, judge
from megatron_davinci.stats.comparison import pairs_needed, power
from tests.cases import is_long
from tests.lab.test_design import RATE, loaded

MIXTURE = "curriculum.0.mixture"


def outcomes_of(runs, effects, noise=0.001, failed=()):
    """Runs that have ended with a loss of 3, the arm's effect and a little of the seed's own."""
    found = []
    for run in runs:
        generator = np.random.default_rng([run.seed, len(run.arm.name)])
        value = (
            3.0 + effects.get((run.arm.name, run.arm.size), 0.0) + 0.1 * run.seed + noise * generator.normal()
        )
        lines = [
            {"step": n, "consumed_tokens": 1000 * n, "heldout_loss": {"a": value + 1 / n - 0.05}}
            for n in (5, 10, 20)
        ]
        bad = (run.arm.name, run.seed) in failed
        found.append(
            Outcome(
                run,
                "failed" if bad else "done",
                20,
                20,
                "error: it broke" if bad else "",
                lines,
                [3.0] * 20,
                9.0,
            )
        )
    return found


def judged(folder, effects, noise=0.001, failed=(), **changes):
    design, arms = loaded(folder, **changes)
    runs = runs_of(design, arms)
    outcomes = outcomes_of(runs, effects, noise, failed)
    return design, arms, runs, outcomes, judge(design, arms, runs, outcomes)


@pytest.mark.parametrize(
    ("effect", "noise", "word"),
    [
        (0.2, 0.001, "worse"),
        (-0.2, 0.001, "better"),
        (0.0, 0.001, "equivalent"),
        (0.0, 0.5, "not enough evidence"),
    ],
)
def test_words(effect, noise, word, tmp_path):
    *_, verdict = judged(tmp_path, {("half", ""): effect}, noise)
    [one] = verdict.deciding
    assert one.word == word and one.found.mean == pytest.approx(effect, abs=4 * noise)
    assert word.split()[0] in in_words(one)
    named = replace(one, metric=one.metric.model_copy(update={"name": "heldout_loss.web-2"}))
    assert "heldout_loss.web-2 " in in_words(named) and not re.search(r" -\d", in_words(named))


def test_within_a_factor_each_level_has_a_control_of_its_own(tmp_path):
    factors = {
        "decay": {"key": "curriculum.0.weight_decay", "levels": {"some": 0.1, "none": 0.0}},
        "rate": {"key": RATE, "levels": {"slow": 1e-3, "fast": 3e-3}},
    }
    effects = {("decay=some, rate=fast", ""): 0.5, ("decay=none, rate=fast", ""): 0.2}
    changes = {"arms": None, "varies": None, "factors": factors}
    *_, verdict = judged(tmp_path, effects, within=["rate"], **changes)
    slow, fast = verdict.deciding
    assert (slow.arm, slow.against, slow.word) == (
        "decay=none, rate=slow",
        "decay=some, rate=slow",
        "equivalent",
    )
    assert (fast.arm, fast.against, fast.word) == ("decay=none, rate=fast", "decay=some, rate=fast", "better")
    assert fast.found.mean == pytest.approx(-0.3, abs=0.01)
    assert "is better than decay=some, rate=fast" in in_words(fast)
    assert answer(verdict) == "Each against its control: 1 equivalent, 1 better."
    *_, whole = judged(tmp_path, effects, **changes)
    assert len(whole.deciding) == 3 and {one.against for one in whole.deciding} == {"decay=some, rate=slow"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"within": ["speed"]}, "within should name factors; found speed"),
        ({"within": ["rate"]}, "and one more that is asked about"),
        ({"within": ["rate"], "combine": "one-at-a-time"}, "combined in full"),
    ],
)
def test_a_within_that_asks_nothing_is_refused(changes, said, tmp_path):
    factors = {"rate": {"key": RATE, "levels": {"slow": 1e-3, "fast": 3e-3}}}
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, arms=None, varies=None, factors=factors, **changes)


def test_a_difference_that_is_sure_and_smaller_than_matters_is_equivalence(tmp_path):
    *_, verdict = judged(tmp_path, {("half", ""): 0.004}, 0.0001)
    [one] = verdict.deciding
    assert one.p < 0.05 and one.word == "equivalent"


def test_seeds_and_power_are_of_p_values_that_are_corrected(tmp_path):
    arms = {"control": {}} | {f"rate {n}": {"set": {RATE: n * 1e-3}} for n in (1, 2, 4)}
    design, found, _, outcomes, verdict = judged(tmp_path, {}, 0.01, arms=arms)
    assert verdict.power == power(0.01, verdict.noise, 3, 0.05 / 3)
    assert verdict.seeds_needed == pairs_needed(0.01, verdict.noise, alpha=0.05 / 3)
    said = f"in four cases of five with p-values corrected for 3 comparisons: {verdict.seeds_needed}; this design"
    assert said in markdown(design, found, outcomes, verdict)


def test_a_run_that_failed_leaves_no_verdict_and_a_report(tmp_path):
    design, arms, runs, outcomes, verdict = judged(tmp_path, {}, failed={("half", 2)})
    [one] = verdict.deciding
    assert one.word == "refused" and "seed 2" in one.why and one.found.pairs == 2
    text = markdown(design, arms, outcomes, verdict)
    assert "1 run failed" in text and "    error: it broke" in text and "no verdict, since" in text
    if is_long():
        page = write_report(tmp_path / "designs" / "d", design, arms, runs, outcomes, verdict).read_text()
        assert "1 run failed" in page and "error: it broke" in page and "no verdict, since" in page


def test_a_confound_leaves_no_verdict_and_a_report(tmp_path):
    arms = {"control": {}, "half": {"set": {RATE: 1.5e-3, "optimizer.beta2": 0.9}}}
    design, found, runs, outcomes, _ = judged(tmp_path, {("half", ""): 0.2}, arms=arms)
    verdict = judge(design, found, runs, outcomes, check(design, found))
    [one] = verdict.deciding
    assert one.word == "refused" and "could explain a difference: optimizer.beta2" in one.why
    assert one.found.mean == pytest.approx(0.2, abs=0.01)
    text = markdown(design, found, outcomes, verdict)
    assert "optimizer.beta2: control has" in text and "half has 0.9" in text
    assert f"| half | heldout_loss.mean | {one.found.mean:+.4f} |" in text


def test_a_run_that_was_stopped_leaves_no_verdict_and_is_told(tmp_path):
    design, arms, runs, outcomes, _ = judged(tmp_path, {})
    why = "hopeless: at step 10 of 20 it is 0.4 behind"
    outcomes[1] = replace(outcomes[1], state="stopped", step=10, why=why)
    verdict = judge(design, arms, runs, outcomes)
    [one] = verdict.deciding
    assert one.word == "refused" and "stopped by the design's rule: hopeless" in one.why
    assert "1 run stopped early: half, seed 1" in markdown(design, arms, outcomes, verdict)


def test_an_effect_that_crosses_over_with_size_is_said(tmp_path):
    ladder = {"small": {}, "large": {"model.num_layers": 4}}
    effects = {("half", "small"): -0.2, ("half", "large"): 0.1}
    *_, verdict = judged(tmp_path, effects, ladder=ladder)
    assert [one.word for one in verdict.deciding] == ["better", "worse"]
    assert any("crosses over" in warning for warning in verdict.warnings)
    effects = {("half", "small"): -0.2, ("half", "large"): -0.05}
    *_, verdict = judged(tmp_path / "shrinks", effects, ladder=ladder)
    assert any("shrinks with size" in warning for warning in verdict.warnings)


def test_a_ladder_has_laws_and_trends(tmp_path):
    ladder = {f"{n} layers": {"model.num_layers": n} for n in (1, 2, 4, 8)}
    effects = {
        (arm, size): 0.4 / n + (0.03 * (1 - n / 4) if arm == "half" else 0.0)
        for arm in ("control", "half")
        for n, size in zip((1, 2, 4, 8), ladder)
    }
    design, arms, runs, outcomes, verdict = judged(tmp_path, effects, ladder=ladder)
    assert verdict.over_sizes.trends["half"].turns and "crosses over" in verdict.warnings[0]
    # Seeds of this design differ by 0.1, so the laws' noise is theirs; trends are of pairs and know none of it.
    said = as_json(verdict)["over_sizes"]
    floor = said["laws"]["control"]["floor"]
    assert said["scale"] == "parameters" and floor["low"] < 3.2 < floor["high"]
    text = markdown(design, arms, outcomes, verdict)
    assert "How the difference changes over sizes" in text and "| half | +0.0" in text
    header, control, half = sizes_csv(verdict.over_sizes).splitlines()
    assert header.startswith("arm,slope") and control.startswith("control,,,,,3")
    assert half.startswith("half,-0.0")
    if is_long():
        page = write_report(tmp_path / "d", design, arms, runs, outcomes, verdict).read_text()
        assert "Over sizes" in page and "crosses over" in page and "loss at" in page
        assert (tmp_path / "d" / "sizes.csv").read_text().startswith(header)


def test_laws_are_drawn_on_to_one_size_also_where_the_largest_runs_are_missing(tmp_path):
    ladder = {f"{n} layers": {"model.num_layers": n} for n in (1, 2, 4, 8, 16)}
    effects = {(arm, size): 0.4 / int(size.split()[0]) for arm in ("control", "half") for size in ladder}
    design, arms, runs, outcomes, verdict = judged(tmp_path, effects, ladder=ladder)
    whole = as_json(verdict)["over_sizes"]["laws"]["half"]
    left = [
        replace(one, state="failed")
        if one.run.arm.size == "16 layers" and one.run.arm.name == "half"
        else one
        for one in outcomes
    ]
    laws = as_json(judge(design, arms, runs, left))["over_sizes"]["laws"]
    assert laws["half"]["ahead"]["size"] == laws["control"]["ahead"]["size"] == whole["ahead"]["size"]


def test_steps_of_a_ladder_of_one_size_are_taken_together(tmp_path):
    ladder = {
        "short": {"curriculum.0.tokens": 40960},
        "long": {"curriculum.0.tokens": 81920},
        "large": {"model.num_layers": 4},
    }
    *_, verdict = judged(tmp_path, {("half", "short"): 0.2, ("half", "long"): -0.2}, ladder=ladder)
    trend = verdict.over_sizes.trends["half"]
    pairs = {one.size: one.found.pairs for one in verdict.deciding}
    assert trend.pairs == sum(pairs.values()) and trend.smallest == pytest.approx(0, abs=0.1)


def test_the_page_its_markdown_and_its_index(tmp_path):
    design, arms, runs, outcomes, verdict = judged(tmp_path, {("half", ""): 0.2})
    folder = tmp_path / "lab" / "designs" / "half"
    folder_of(tmp_path / "lab", runs[0]).mkdir(parents=True)
    page = write_report(folder, design, arms, runs, outcomes, verdict).read_text()
    assert "half is worse than control" in page and "curriculum.0.learning_rate.peak" in page
    assert (
        "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
        and "<script" not in page
    )
    for section in ("Verdict", "How sure", "On the way", "By domain", "Mixtures", "Cost", "Runs"):
        assert f"<h2>{section}</h2>" in page
    assert page.count("<svg") == 5 and page.count("95% interval") > 4
    # Runs that are there are led to, others are named.
    assert page.count("<a href=") == 1 and f'<a href="../../runs/{runs[0].identity}/">' in page
    markdown = (folder / "lab.md").read_text()
    assert answer(verdict) in markdown and "| half | heldout_loss.mean | +0." in markdown
    assert (folder / "runs.csv").read_text().count("\n") == 7
    assert json.loads((folder / "verdict.json").read_text())["comparisons"][0]["verdict"] == "worse"
    assert any(folder.glob("plots/*.png"))
    index = write_index(tmp_path / "lab").read_text()
    assert '<a href="designs/half/lab.html">Does half the rate lose anything?</a>' in index


def test_curves_have_the_interval_of_their_mean_as_a_band(tmp_path):
    design, _, runs, outcomes, _ = judged(tmp_path, {})
    half = next(one for one in curves(design, runs, outcomes, "").series if one.name == "half")
    values = np.array([one.curve("heldout_loss.mean")[1] for one in outcomes if one.run.arm.name == "half"])
    low, high = stats.t.interval(0.95, 2, values.mean(0), stats.sem(values))
    assert np.allclose(half.y - half.band, low) and np.allclose(half.y + half.band, high)
    # Two seeds have an interval that would hide all else.
    few = [(run, one) for run, one in zip(runs, outcomes) if run.seed < 3]
    assert all(one.band is None for one in curves(design, *zip(*few), "").series)


def test_domains_and_mixtures_of_arms(tmp_path):
    changes = {
        "arms": {
            "control": {},
            "more a": {"set": {MIXTURE: {"a": 0.75, "b": 0.25}}},
            "slow": {"set": {RATE: 1e-3}},
        }
    }
    _, arms, runs, outcomes, _ = judged(tmp_path, {("slow", ""): 0.5}, varies=[MIXTURE, RATE], **changes)
    bars = domain_bars(arms, ends_of(runs, outcomes), "")
    [group] = bars.groups
    assert group.name == "a" and [bar.name for bar in group.bars] == ["control", "more a", "slow"]
    assert group.bars[2].value - group.bars[0].value == pytest.approx(0.5, abs=0.01)
    assert all(bar.low < bar.value < bar.high for bar in group.bars)
    headers, rows = bars.table()
    assert headers[2] == "held-out loss, nats per token" and [row[1] for row in rows] == [
        "control",
        "more a",
        "slow",
    ]
    shared, other = mixtures(arms)
    assert shared.title == "Mixture: control, slow" and other.title == "Mixture: more a"
    assert {name: list(shares) for name, _, shares in other.bands} == {"a": [0.75], "b": [0.25]}


def test_verdicts_are_as_right_as_they_say():
    found = lab_calibration.verdicts(2000 if is_long() else 600, 1)
    assert found["false_verdict_fraction"] <= 0.06
    assert found["power"] >= 0.8
    assert 0.9 <= found["coverage"] <= 0.98


def test_a_run_that_has_diverged_is_named_and_the_page_is_drawn(tmp_path):
    design, arms, runs, outcomes, _ = judged(tmp_path, {})
    outcomes[-1].evaluations[-1]["heldout_loss"]["a"] = float("nan")
    verdict = judge(design, arms, runs, outcomes)
    [one] = verdict.deciding
    assert one.word == "refused" and f"with seed {runs[-1].seed} " in one.why and "diverged" in one.why
    assert one.found.pairs == 2
    page = write_report(tmp_path / "page", design, arms, runs, outcomes, verdict)
    assert "a run has diverged" in page.read_text()
