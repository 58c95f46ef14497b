"""`davinci compare` on kept answers whose truth is known, and tasks that are put in other ways."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_davinci.cli.eval import keep as keep_result
from megatron_davinci.cli.main import main
from megatron_davinci.cli.report import findings
from megatron_davinci.evaluate.both_ways import answer_of
from megatron_davinci.evaluate.comparing import compare
from megatron_davinci.evaluate.formats import FORMATS
from megatron_davinci.evaluate.item_scores import read_item_scores
from megatron_davinci.evaluate.tasks import TaskResult, _weighted
from megatron_davinci.report.run_tasks import read_tasks

ITEMS = 300


def keep(run: Path, step: int, task: str, protocol: str, chance: float, **more) -> None:
    """What `davinci eval` keeps of a task: an item's difficulty is the same for all, whoever asks how."""
    hard = np.random.default_rng(0).random(ITEMS)
    right = (hard < chance).astype(int).tolist()
    folder = run / f"evals/samples/step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    metric = "acc" if protocol == "likelihood" else "exact_match"
    rows = [
        {
            "doc": doc,
            "item": f"item{doc}",
            "target": doc % 2,
            "answers": [[-1.0, True], [-1.0 - np.log(3), False]],
            metric: float(one),
        }
        for doc, one in enumerate(right)
    ]
    rows = [row | more.get("row", {}) for row in rows]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "step": step,
        "tokens": 100 * step,
        "task": task,
        "protocol": protocol,
        "metrics": {metric: 0.5},
    }
    with open(run / "evals/results.jsonl", "a") as file:
        file.write(json.dumps(record | {"samples": [task]} | more.get("record", {})) + "\n")


@pytest.fixture
def run(tmp_path) -> Path:
    """Three checkpoints: the last two are in opposite order by generation; formats are worth ten points."""
    run = tmp_path / "run"
    for step, likelihood, generation in ((10, 0.3, 0.2), (20, 0.5, 0.6), (30, 0.7, 0.4)):
        keep(run, step, "words_likelihood", "likelihood", likelihood)
        keep(run, step, "words_generation", "generation", generation)
        for number, form in enumerate(FORMATS):
            keep(run, step, f"words_likelihood@{form.name}", "likelihood", likelihood - 0.1 * (number == 1))
    return run


def test_reversals_and_formats_are_found_and_printed(run, tmp_path, capsys):
    assert main(["compare", str(run), "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "step 20 and step 30" in shown and "1 of 3" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    agreement = found["protocols"]["words"]
    assert agreement["tau"] == pytest.approx(1 / 3) and agreement["items"] == ITEMS
    assert [pair["reversed"] for pair in agreement["pairs"]] == [False, False, True]
    assert [one["model"] for one in found["formats"]] == ["step 10", "step 20", "step 30"]
    for one in found["formats"]:
        assert len(one["formats"]) == 1 + len(FORMATS)
        spread = one["spread"]
        assert max(spread["means"]) - min(spread["means"]) == pytest.approx(0.1, abs=0.05)
        assert spread["p"] < 1e-6


def test_early_checkpoints_are_set_against_the_last_of_one_run_and_of_several(tmp_path, capsys):
    runs = []
    for number, final in enumerate((0.35, 0.45, 0.6, 0.7, 0.8)):
        runs.append(str(tmp_path / f"run{number}"))
        for step, share in ((10, 0.0), (20, 0.2), (40, 0.5), (80, 1.0)):
            # By one task the runs are in their last order early; by the other in the opposite one.
            keep(Path(runs[-1]), step, "steady", "likelihood", 0.3 + share * (final - 0.3))
            early = 0.9 - final if step < 80 else final
            keep(Path(runs[-1]), step, "late", "likelihood", early)
    compared = compare(read_item_scores(runs))
    right = {(one.target, one.step, one.by): one.decision for one in compared.foretold}
    assert right["steady, likelihood", 40, "steady, likelihood"].right == 1.0
    assert right["late, likelihood", 40, "late, likelihood"].right == 0.0
    assert right["late, likelihood", 40, "steady, likelihood (best of 1)"].tau == 1.0
    assert all(one.decision.pairs == 10 for one in compared.foretold)
    course = next(one for one in compared.courses if one.task == "steady" and one.run == "run4")
    assert (course.checkpoints, course.half, course.chance) == (4, 4000, 0.5)
    assert course.above_chance == 8000 and course.forecast.checkpoints == 3
    ((steady, subset), _) = compared.subsets
    assert steady.task == "steady" and subset.found and len(subset.items) <= ITEMS / 2 and subset.tau > 0.85
    assert main(["compare", *runs, "--tasks", "steady"]) == 0
    shown = capsys.readouterr().out
    assert "which measurement decides early" in shown and "the fewest items that rank alike" in shown


def test_the_report_is_given_the_same_tables_and_says_so_where_answers_cannot_be_read(run, tmp_path):
    titles = [finding.title for finding in findings(run)]
    assert titles[:2] == ["Rankings by likelihood and by generation", "In several formats"]
    assert all(len(row) == len(found.headers) for found in findings(run) for row in found.rows)
    assert findings(tmp_path / "nowhere") == []
    (run / "evals/samples/step-00000010/words_likelihood.jsonl").write_text("{}\n")
    (broken,) = findings(run)
    assert "line 1" in broken.text and not broken.rows


@pytest.mark.parametrize("spoilt", [{"acc": None}, {"doc": "x"}, {"answers": [[None, True], [-1.0, False]]}])
def test_an_answer_with_a_field_that_is_none_is_named_and_the_page_is_drawn(tmp_path, capsys, spoilt):
    keep(tmp_path, 10, "words", "likelihood", 0.5, row=spoilt)
    assert main(["compare", str(tmp_path)]) == 2
    assert "words.jsonl, line 1" in capsys.readouterr().err
    (found,) = findings(tmp_path)
    assert "could not be read" in found.text


@pytest.mark.parametrize(
    "changed", [{"protocol": None}, {"task": ["words"]}, {"samples": 5}, {"errors": [1]}]
)
def test_records_of_another_form_end_nothing(run, changed):
    keep(run, 30, "words_likelihood", "likelihood", 0.5, record=changed)
    assert read_item_scores([str(run)])
    assert read_tasks(run)


def test_one_checkpoint_of_one_run_may_be_named_and_two_runs_compared(run, tmp_path):
    tasks = read_item_scores([f"{run}@10", f"{run}@30"])
    assert {tuple(task.models) for task in tasks} == {("step 10", "step 30")}
    assert tasks[0].chosen[0, :2].tolist() == pytest.approx([0.75, 0.25])
    other = tmp_path / "other"
    for protocol in ("likelihood", "generation"):
        keep(other, 5, f"words_{protocol}", protocol, 0.9)
    names = read_item_scores([f"{run}@10", str(other)])[0].models
    assert names == ["run@10", "other@5"]
    assert compare(read_item_scores([str(other)])).protocols == {}, "one model has no ranking"


def asked(run: Path, scores: list[float], shots: int = 0, **about) -> None:
    """As `davinci eval` keeps it, of checkpoint 10."""
    rows = [{"doc": doc, "item": str(doc), "target": 0, "acc": one} for doc, one in enumerate(scores)]
    record = {"task": "words", "protocol": "likelihood", "shots": shots, "metrics": {"acc": 0.5}}
    checkpoint = SimpleNamespace(folder=run / "checkpoints/step-00000010", step=10, consumed_samples=80)
    result = SimpleNamespace(samples={"words": rows}, record=lambda: record | {"samples": ["words"]})
    keep_result(
        run / "evals",
        SimpleNamespace(checkpoint=checkpoint, config=None),
        result,
        {"suite": None, "limit": None} | about,
    )


def test_a_look_at_a_few_items_hides_no_full_result_and_takes_no_answers_away(tmp_path):
    def means() -> dict[str, list[float]]:
        return {task.task: task.scores[0].tolist() for task in read_item_scores([str(tmp_path)])}

    asked(tmp_path, [1.0, 1.0], limit=2)
    assert means() == {"words": [1, 1]}
    asked(tmp_path, [1.0, 0.0, 1.0], limit=3)
    assert means() == {"words": [1, 0, 1]}
    asked(tmp_path, [1.0, 0.0, 1.0, 0.0])
    asked(tmp_path, [1.0, 1.0], limit=2)
    assert means() == {"words": [1, 0, 1, 0]}
    asked(tmp_path, [0.0, 0.0, 1.0, 0.0])
    assert means() == {"words": [0, 0, 1, 0]}, "of the same items the newest counts"
    asked(tmp_path, [0.5], limit=1, identity={"checkpoint": "digest"})
    assert means() == {"words": [0, 0, 1, 0]}, "an old record does not say of which checkpoint it is"


def test_another_training_of_a_checkpoint_takes_the_place_of_the_first(tmp_path):
    asked(tmp_path, [1.0, 1.0], identity={"checkpoint": "first"})
    asked(tmp_path, [0.0], limit=1, identity={"checkpoint": "second"})
    (one,) = read_item_scores([str(tmp_path)])
    assert one.scores.tolist() == [[0.0]]


def test_other_examples_and_texts_are_other_tasks_which_may_be_named(tmp_path, capsys):
    asked(tmp_path, [1.0, 0.0])
    asked(tmp_path, [1.0, 1.0], shots=5, given={"shots": 5})
    asked(tmp_path, [0.0, 0.0], given={"texts": ["a=mine.jsonl"]})
    asked(tmp_path, [0.5, 0.5], shots=5, suite="davinci19", limit=2)
    found = {task.task: task.scores[0].tolist() for task in read_item_scores([str(tmp_path)])}
    assert found == {
        "words (0-shot)": [1, 0],
        "words (5-shot)": [1, 1],
        "words (0-shot with texts a=mine.jsonl)": [0, 0],
    }
    for name in ("words", "words (5-shot)"):
        assert main(["compare", str(tmp_path), "--tasks", name]) == 0
    assert main(["compare", str(tmp_path), "--tasks", "words (3-shot)"]) == 2
    assert "words (5-shot)" in capsys.readouterr().err


def test_both_protocols_asked_in_two_ways_are_paired_way_by_way(run):
    for step in (10, 20, 30):
        for protocol in ("likelihood", "generation"):
            keep(run, step, f"words_{protocol}", protocol, 0.5, record={"shots": 3})
    assert compare(read_item_scores([str(run)])).protocols.keys() == {"words", "words (3-shot)"}


def test_other_items_are_refused_and_so_is_a_folder_without_results(run, tmp_path, capsys):
    other = tmp_path / "other"
    keep(other, 5, "words_likelihood", "likelihood", 0.9, row={"item": "another"})
    assert main(["compare", str(run), str(other)]) == 2
    assert "not asked the same items" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert "Nothing has been measured here" in capsys.readouterr().err
    assert main(["compare", str(run), "--tasks", "numbers"]) == 2
    assert "of words" in capsys.readouterr().err


def test_a_step_that_was_not_measured_and_a_seed_that_is_none_are_refused(run, capsys):
    assert main(["compare", f"{run}@25"]) == 2
    assert "found:    steps 10, 20, 30" in capsys.readouterr().err
    assert main(["compare", str(run), "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_an_answer_that_is_a_number_is_the_option_that_says_so():
    """As lm-eval scores it; and a number that no option says is a place."""
    task = SimpleNamespace(
        doc_to_text=lambda item: item["question"],
        doc_to_choice=lambda item: item["choices"],
        doc_to_target=lambda item: item["answer"],
    )
    item = {"question": "1 + 1 =", "choices": ["3", "2", "1", "0"], "answer": "2"}
    assert answer_of(task, item) == 1
    assert answer_of(task, item | {"choices": ["a", "b", "c", "d"]}) == 2
    assert answer_of(task, item | {"answer": 2}) == answer_of(task, item | {"answer": "1"}) == 2
    # AGIEval has a list of one; a letter to write is for one right option.
    assert answer_of(task, item | {"answer": [2]}) == answer_of(task, item | {"answer": ["1"]}) == 2
    with pytest.raises(ValueError, match="2 right options"):
        answer_of(task, item | {"answer": [0, 2]})


def test_a_group_of_turned_tasks_and_one_that_is_scored_by_another_name_has_a_mean():
    """Nine tasks of AGIEval are turned, and the tenth counts what is right as `acc`."""
    turned = [
        TaskResult("a", items=30, metrics={"exact_match,letter": 0.5}, errors={"exact_match,letter": 0.1})
    ] * 2
    other = TaskResult("b", items=40, metrics={"acc,none": 0.25}, errors={"acc,none": 0.2})
    metrics, errors = _weighted([*turned, other])
    assert metrics == {"exact_match,letter": pytest.approx(0.4)}
    assert errors == {"exact_match,letter": pytest.approx((2 * 3.0**2 + 8.0**2) ** 0.5 / 100)}
    # Measures of different things have no mean.
    assert _weighted([*turned, TaskResult("c", items=1, metrics={"bleu,none": 9.0})]) == ({}, {})


def test_a_format_says_the_same_in_other_words():
    put = {form.name: form.put("Question: Which?\nAnswer:", [" one", " two"]) for form in FORMATS}
    assert put["question"] == ("Question: Which?\nAnswer:", ["one", "two"])
    assert put["lines"] == ("Which?", ["one", "two"])
    assert put["letters"] == ("Which?\nA. one\nB. two\nAnswer:", ["A", "B"])
    assert put["numbers"] == ("Which?\n(1) one\n(2) two\nAnswer:", ["1", "2"])
