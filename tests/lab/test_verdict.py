"""Words that follow from figures, and no word where there is no ground for one."""

import json

import numpy as np
import pytest

from benchmarks import lab_calibration
from megatron_davinci.lab.arms import runs_of
from megatron_davinci.lab.outcomes import Outcome
from megatron_davinci.lab.report import answer, markdown, sizes_csv, write_index, write_report
from megatron_davinci.lab.verdict import as_json, in_words, judge
from tests.cases import is_long
from tests.lab.test_design import loaded


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
    assert word.split()[0] in in_words(one, "control")


def test_a_difference_that_is_sure_and_smaller_than_matters_is_equivalence(tmp_path):
    *_, verdict = judged(tmp_path, {("half", ""): 0.004}, 0.0001)
    [one] = verdict.deciding
    assert one.p < 0.05 and one.word == "equivalent"


def test_a_run_that_failed_leaves_no_verdict_and_a_report(tmp_path):
    design, arms, runs, outcomes, verdict = judged(tmp_path, {}, failed={("half", 2)})
    [one] = verdict.deciding
    assert one.word == "refused" and "seed 2" in one.why and one.found.pairs == 2
    page = write_report(tmp_path / "lab" / "designs" / "d", design, arms, runs, outcomes, verdict).read_text()
    assert "1 run failed" in page and "error: it broke" in page and "no verdict, since" in page


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


def test_the_page_its_markdown_and_its_index(tmp_path):
    design, arms, runs, outcomes, verdict = judged(tmp_path, {("half", ""): 0.2})
    folder = tmp_path / "lab" / "designs" / "half"
    page = write_report(folder, design, arms, runs, outcomes, verdict).read_text()
    assert "half is worse than control" in page and "curriculum.0.learning_rate.peak" in page
    assert (
        "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
        and "<script" not in page
    )
    markdown = (folder / "lab.md").read_text()
    assert answer(verdict) in markdown and "| half | heldout_loss.mean | +0." in markdown
    assert (folder / "runs.csv").read_text().count("\n") == 7
    assert json.loads((folder / "verdict.json").read_text())["comparisons"][0]["verdict"] == "worse"
    assert any(folder.glob("plots/*.png"))
    assert "Does half the rate lose anything?" in write_index(tmp_path / "lab").read_text()


def test_verdicts_are_as_right_as_they_say():
    found = lab_calibration.verdicts(2000 if is_long() else 600, 1)
    assert found["false_verdict_fraction"] <= 0.06
    assert found["power"] >= 0.8
    assert 0.9 <= found["coverage"] <= 0.98
