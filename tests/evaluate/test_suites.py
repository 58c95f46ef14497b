"""Suites on a run that was trained: every metric as computed by hand, what is missing by name, and what was seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_davinci.cli.eval_plan import davinci19, in_formats
from megatron_davinci.cli.eval_screen import paired_difference
from megatron_davinci.cli.main import main
from megatron_davinci.evaluate.local import local_tasks
from megatron_davinci.evaluate.naming import format_of
from megatron_davinci.evaluate.suites import DAVINCI19, averages
from tests.evaluate import native, trained
from tests.evaluate.models import WORDS, sentence
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("suites")
    native.offline(root / "cache")
    trained.write_run(root)
    return root


def records(root: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (root / name / "results.jsonl").read_text().splitlines()]


def evaluate(root: Path, out: str, *words: str) -> int:
    return main(["eval", str(root / "run"), "--out", str(root / out), *words, "train.threads=1"])


def test_every_metric_of_the_local_suite_is_what_it_is_by_hand(root, capsys):
    assert evaluate(root, "local", "--suite", "local", "--limit", str(trained.ITEMS)) == 0
    found = {record["task"]: record["metrics"] for record in records(root, "local")}
    (expected,) = run_ranks(1, trained.by_hand, root / "run", root / f"local/local/limit-{trained.ITEMS}")
    # Apart: another command, of all items, may be about to load its own.
    assert not list((root / "local/local").glob("*.jsonl"))
    kinds = {"cloze_held", "choice_held", "arithmetic", "copying"}
    both = {f"{kind}_{protocol}" for kind in kinds for protocol in ("likelihood", "generation")}
    assert expected.keys() == both | {"bytes_held"}
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, abs=1e-6), name
    in_the_loop = json.loads((root / "run/evals.jsonl").read_text().splitlines()[-1])["tasks"]
    geometry = in_the_loop.pop("geometry")
    assert in_the_loop.keys() == {f"{kind}_likelihood" for kind in kinds}
    for name, scores in in_the_loop.items():
        asked = {f"{metric},none": scores[metric] for metric in ("acc", "acc_norm")}
        assert asked == found[name] and scores["items"] == trained.ITEMS, name
    shape = found["geometry"]
    assert 1 < shape["rank_me,none"] <= 23
    measured = {f"{name},none": geometry[name] for name in ("rank_me", "alpha_req")}
    assert measured == pytest.approx(shape, rel=1e-5)
    shown = capsys.readouterr().out
    assert "in both ways" in shown and "same verdict" in shown


def test_what_is_known_of_made_up_texts_is_what_it_is_by_hand(root, capsys):
    made = root / "made"
    assert main(["data", "knowledge", "--people", "3", "--facts", "4", "--out", str(made)]) == 0
    assert evaluate(root, "knowledge", "--suite", "knowledge", "--knowledge", str(made)) == 0
    found = {record["task"]: record["metrics"] for record in records(root, "knowledge")}
    (expected,) = run_ranks(1, trained.knowledge_by_hand, root / "run", made)
    for name in ("name_loss", "attribute_loss"):
        assert found["biographies"][f"{name},none"] == pytest.approx(expected[name], abs=1e-3)
    once = found["facts_once_semantic"]["log_probability,none"]
    assert once == pytest.approx(expected["once"], abs=1e-3)
    # It was trained on other texts.
    assert found["biographies"]["bits_per_parameter,none"] == 0
    assert "bits_per_parameter" in capsys.readouterr().out


def test_benchmarks_without_data_are_named_with_what_to_do_and_the_rest_is_run(root, capsys):
    data = trained.write_benchmarks(root / "hub")
    code = evaluate(root, "davinci19", "--suite", "davinci19", "--data", str(data), "--limit", "3")
    shown = capsys.readouterr()
    assert code == 2
    *tasks, means = records(root, "davinci19")
    assert [one["task"] for one in tasks] == [entry.name for entry in DAVINCI19]
    run = {one["task"]: one for one in tasks if one["metrics"]}
    assert run.keys() == {"PIQA", "GSM8K", "WinoGrande", "MBPP"}
    assert {name: (one["protocol"], one["shots"], one["items"]) for name, one in run.items()} == {
        "PIQA": ("likelihood", 0, 3),
        "GSM8K": ("generation", 8, 3),
        "WinoGrande": ("generation", 0, 3),
        "MBPP": ("generation", 3, 3),
    }
    assert run["MBPP"]["metrics"] == {"pass@1,sandbox": 0.0}
    assert "exact_match,letter" in run["WinoGrande"]["metrics"]
    assert "MMLU has no result: its data is not here, or cannot be used (" in shown.err
    assert "hf download --repo-type dataset cais/mmlu" in shown.err
    assert "accept its terms" in next(one["problem"] for one in tasks if one["task"] == "GPQA-Main")
    assert "openai/openai_humaneval" in next(one["problem"] for one in tasks if one["task"] == "HumanEval")
    assert means["means"]["Code"] == {"score": 0.0, "of": 1, "missing": ["HumanEval", "EvalPlus"]}
    assert means["means"]["General"]["of"] == 2
    assert len(means["means"]["Overall"]["missing"]) == 15


def test_the_report_s_protocol_is_to_the_letter():
    by_protocol = {
        protocol: {entry.name: entry.shots for entry in DAVINCI19 if entry.protocol == protocol}
        for protocol in ("likelihood", "generation")
    }
    assert by_protocol["likelihood"] == {
        "PIQA": 0, "MMLU": 5, "OpenBookQA": 5, "GPQA-Main": 5, "MMLU-STEM": 5,
    }  # fmt: skip
    assert by_protocol["generation"] == {
        "MATH": 4, "MMLU-Pro": 5, "SuperGPQA": 5, "MMLU-Pro-STEM": 5, "GSM8K": 8, "GSM-Plus": 5, "HumanEval": 0,
        "EvalPlus": 0, "MBPP": 3, "TriviaQA": 5, "AGIEval-EN": 0, "HellaSwag": 0, "RACE": 0, "WinoGrande": 0,
    }  # fmt: skip
    groups = [entry.group for entry in DAVINCI19]
    assert [groups.count(group) for group in ("General", "Code", "Science")] == [9, 3, 7]


def test_benchmarks_by_generation_are_in_no_other_format():
    names = [one.label for one in in_formats(davinci19(None))]
    asked = {name.partition("@")[0] for name in names if "@" in name}
    assert asked == {entry.name for entry in DAVINCI19 if entry.protocol == "likelihood"}
    assert [name for name in names if "@" not in name] == [entry.name for entry in DAVINCI19]


def test_the_averages_are_the_report_s():
    """The scores of its final model (section 1, table 1) and the averages that it prints."""
    scores = {
        "MMLU": 62.53, "MMLU-Pro": 43.50, "AGIEval-EN": 26.77, "HellaSwag": 71.17, "TriviaQA": 49.90, "RACE": 38.56,
        "WinoGrande": 66.77, "OpenBookQA": 40.20, "PIQA": 77.26, "HumanEval": 61.64, "EvalPlus": 57.32, "MBPP": 49.00,
        "GSM8K": 72.86, "GSM-Plus": 50.38, "MATH": 62.80, "GPQA-Main": 32.37, "SuperGPQA": 19.56, "MMLU-STEM": 53.41,
        "MMLU-Pro-STEM": 46.70,
    }  # fmt: skip
    found = averages(DAVINCI19, {name: score / 100 for name, score in scores.items()})
    printed = {"General": 52.96, "Code": 55.99, "Science": 48.30, "Overall": 51.72}
    for group, score in printed.items():
        assert found[group]["score"] == pytest.approx(score, abs=0.01)
        assert found[group]["missing"] == []


def test_what_was_trained_on_is_told_from_its_twins(root, capsys):
    texts = ("--texts", f"seen={root / 'seen.jsonl'}", "--texts", f"unseen={root / 'unseen.jsonl'}")
    assert evaluate(root, "seen", "--suite", "contamination", *texts) == 0
    (record,) = records(root, "seen")
    # DC-PDD bounds what one token may say: 0.90 here, give or take what rounding makes of a training run.
    least = {"min_k": 0.9, "min_k_plus": 0.9, "dc_pdd": 0.8}
    assert all(record["auroc"][name] >= bound for name, bound in least.items()), record["auroc"]
    assert record["auroc"].keys() == {"min_k", "min_k_plus", "dc_pdd"}
    # A run that a window's end cuts is in no sample.
    assert record["texts"]["seen"]["overlap"] > 0.8
    assert record["texts"]["unseen"]["overlap"] < 0.05
    rows = [
        json.loads(line)
        for line in (root / "seen/samples" / record["samples_in"] / "contamination.jsonl")
        .read_text()
        .splitlines()
    ]
    assert all(row["times"] >= trained.EPOCHS for row in rows if row["texts"] == "seen")
    assert "AUROC seen / unseen" in capsys.readouterr().out


def test_what_was_asked_of_other_texts_or_samples_is_kept_beside_it_in_json(root):
    (root / "short.jsonl").write_text('{"text": "river stone"}\n')
    short = ("--suite", "contamination", "--texts", f"short={root / 'short.jsonl'}", "--samples")
    assert evaluate(root, "beside", *short, "0:4") == 0
    assert evaluate(root, "beside", *short, "0:8") == 0
    first, second = (record["samples_in"] for record in records(root, "beside"))
    assert first != second
    for folder in (first, second):
        text = (root / "beside/samples" / folder / "contamination.jsonl").read_text()
        # Too short for a run of tokens: no number, and no JSON either if it were written so.
        assert json.loads(text, parse_constant=pytest.fail)["overlap"] is None


def test_a_checkpoint_by_itself_has_no_samples_to_look_at(root, capsys):
    words = ["--suite", "contamination", "--texts", f"seen={root / 'seen.jsonl'}"]
    words += ["--tokenizer", str(root / "tokenizer"), "train.threads=1"]
    (checkpoint,) = (root / "run/checkpoints").glob("step-*")
    assert main(["eval", str(checkpoint), *words, "--samples", "0:5"]) == 2
    assert "by itself does not say what it was trained on" in capsys.readouterr().err
    assert main(["eval", str(checkpoint), *words]) == 0
    assert "overlap: a checkpoint by itself" in capsys.readouterr().out


def test_texts_that_were_never_seen_are_not_told_apart(root):
    generator = np.random.default_rng(77)
    for name in ("one", "other"):
        lines = [json.dumps({"text": sentence(generator, 30)}) for _ in range(24)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    texts = ("--texts", f"one={root / 'one.jsonl'}", "--texts", f"other={root / 'other.jsonl'}")
    assert evaluate(root, "clean", "--suite", "contamination", "--samples", "0:10", *texts) == 0
    (record,) = records(root, "clean")
    # 24 against 24: the standard error of an AUROC of nothing is 0.08.
    assert all(0.25 < value < 0.75 for value in record["auroc"].values()), record["auroc"]


def test_local_items_follow_from_the_texts_alone_and_have_one_right_option():
    generator = np.random.default_rng(3)
    texts = {"a": [sentence(generator, 40) for _ in range(12)], "b": []}
    tasks = local_tasks(texts, 8)
    assert [task.items for task in tasks] == [task.items for task in local_tasks(texts, 8)]
    assert {task.group for task in tasks} == {"a", "probes"}
    for task in tasks:
        for item in task.items:
            if "options" in item:
                assert len(set(item["options"])) == len(item["options"]) == 4
    # What stands behind an @ is a format.
    assert all(format_of(task.name) is None for task in local_tasks({"web@2024": texts["a"]}, 8))
    pairs = {task.name: task.items for task in tasks}
    assert pairs["cloze_a_likelihood"] == pairs["cloze_a_generation"]
    for item in pairs["arithmetic_likelihood"]:
        a, sign, b, _ = item["text"].split()
        right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert item["options"][item["answer"]] == f" {right}" == f" {item['said']}"


class Text(str):
    """A text that counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, place):
        part = super().__getitem__(place)
        Text.copied += len(part)
        return part


def test_items_of_long_texts_are_made_in_no_time():
    generator = np.random.default_rng(0)
    texts = {"a": [Text(" ".join(generator.choice(WORDS, 6000))) for _ in range(10)]}
    tasks = {task.name: task for task in local_tasks(texts, 5)}
    # Where a text is copied once a word, to count those before it, it is copied 3,000 times.
    assert 0 < Text.copied < 40 * sum(map(len, texts["a"]))
    items = tasks["cloze_a_likelihood"].items
    assert len(items) == 5 and all(len(item["text"].split()) >= 12 for item in items)


def test_a_difference_on_the_same_items_has_the_error_of_pairs():
    one, other = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    mean, error = paired_difference(one, other)
    assert mean == -0.5
    assert error == pytest.approx(np.std([-1, 0, 0, -1], ddof=1) / 2)
