"""lm-eval's tasks on a checkpoint as it is, against lm-eval's own `hf` model on its export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.cli.eval_plan import by_name, task_names
from megatron_davinci.cli.main import main
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.answers import Answers
from megatron_davinci.evaluate.engine import Likelihood
from tests.evaluate import models, native
from tests.ranks import run_ranks

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    native.offline(root / "cache")
    models.write_run(root)
    models.write_tasks(root / "tasks")
    return root


@pytest.fixture(scope="module")
def theirs(root) -> dict:
    """lm-eval's own model on the export, in batches of 4."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from megatron_davinci.evaluate.tasks import FEWSHOT_SEED, _quiet

    export(str(root / "run"), root / "hf", verify=False)
    with _quiet():
        model = HFLM(pretrained=str(root / "hf"), device="cpu", dtype="float32", batch_size=4)
        manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
        loaded = manager.load(list(native.TASKS))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(model, loaded, bootstrap_iters=0)
    return {
        name: [list(sample["filtered_resps"]) for sample in samples]
        for name, samples in found["samples"].items()
    }


def largest_difference(ours: dict, theirs: dict) -> float:
    """Of any log-likelihood; what is no number must be the same."""
    worst = 0.0
    assert {name: len(rows) for name, rows in ours.items()} == {
        name: len(rows) for name, rows in theirs.items()
    }
    for name, rows in theirs.items():
        for our, their in zip(ours[name], rows, strict=True):
            for one, other in zip(our, their, strict=True):
                if name == "tiny_generation":
                    assert one == other
                elif name == "tiny_text":
                    worst = max(worst, abs(one - other))
                else:
                    assert bool(one[1]) == bool(other[1])
                    worst = max(worst, abs(one[0] - other[0]))
    return worst


def evaluate(root: Path, *words: str) -> int:
    return main(["eval", str(root / "run"), "--include-path", str(root / "tasks"), *words, "train.threads=1"])


def kept(root: Path, name: str) -> list[dict]:
    text = (root / "run/evals/samples/step-00000000" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_gives_what_lm_eval_gives_on_the_export(root, theirs, capsys):
    assert evaluate(root, "--tasks", ",".join(native.TASKS)) == 0
    ours = native.answers_of({name: kept(root, name) for name in native.TASKS})
    assert 0 < largest_difference(ours, theirs) < TOLERANCE
    shown = capsys.readouterr().out
    assert "tiny_choice" in shown and "acc_norm" in shown and "bits_per_byte" in shown
    records = [json.loads(line) for line in (root / "run/evals/results.jsonl").read_text().splitlines()]
    assert [(one["task"], one["protocol"], one["shots"]) for one in records] == [
        ("tiny_choice", "likelihood", 1),
        ("tiny_text", "text", 0),
        ("tiny_generation", "generation", 0),
    ]
    # Generation that reached its limit is an answer, and is counted.
    assert records[2]["troubles"].keys() <= {"generation that did not stop"}


def test_every_layout_gives_what_lm_eval_gives_on_the_export(root, theirs):
    wanted = [["parallel.tensor=2"], ["parallel.pipeline=2"], []]
    found, nothing = run_ranks(2, native.layouts, root / "run", root / "tasks", root / "cache", wanted)
    assert nothing == [] and len(found) == 3
    for ours in found:
        assert largest_difference(ours, theirs) < TOLERANCE


@pytest.fixture(scope="module")
def found(root) -> dict:
    """What one rank found out about its engine."""
    return run_ranks(1, native.alone_and_poisoned, root / "run")[0]


def test_sharing_beginnings_changes_nothing_and_what_is_no_number_is_said(found):
    together, alone = (np.array([one.log for one in found[name]]) for name in ("together", "alone"))
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert [one.greedy for one in found["together"]] == [one.greedy for one in found["alone"]]
    assert [len(ids) for ids in found["generated"]] == found["most"]
    assert all(found["greedy"])
    # The embedding of token 5 is no number: what reads it, and, since it is the output matrix too, all logits.
    assert all(math.isnan(one.log) for one in found["poisoned"])
    assert all(ids == [-1] for ids in found["ended"])
    assert found["no_states"] == (0, 64)


def test_scores_of_tokens_are_those_of_float64(found):
    for sequence, logits, scores in zip(found["sequences"], found["logits"], found["moments"], strict=True):
        logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logs -= logits.max(1, keepdims=True)
        p = np.exp(logs)
        mean = (p * logs).sum(1)
        deviation = np.sqrt((p * (logs - mean[:, None]) ** 2).sum(1))
        own = logs[np.arange(len(sequence) - 1), sequence[1:]]
        np.testing.assert_allclose(scores, np.stack([own, mean, deviation], 1), atol=2e-4)


def test_what_was_answered_is_not_computed_again(root, capsys):
    arguments = ("--tasks", "tiny_choice", "--limit", "5", "--out", str(root / "out"))
    assert evaluate(root, *arguments) == evaluate(root, *arguments) == 0
    first, second = [json.loads(line) for line in (root / "out/results.jsonl").read_text().splitlines()]
    assert (first["answers_found"], second["answers_found"]) == (0, 20)
    assert first["metrics"] == second["metrics"]
    # The lab holds scores against each other by these.
    assert first["asked"] == second["asked"] and len(first["asked"]) == 16
    assert first["given"] == {"overrides": ["train.threads=1"], "include_path": [str(root / "tasks")]}
    # An interruption in the middle of a line loses that line.
    answers = root / "out/answers/step-00000000.jsonl"
    answers.write_bytes(answers.read_bytes()[:-7])
    assert evaluate(root, *arguments) == 0
    third = json.loads((root / "out/results.jsonl").read_text().splitlines()[-1])
    assert third["answers_found"] == 19
    assert len(answers.read_text().splitlines()) == 20


@pytest.mark.parametrize("line", ["12", "null", "[1]", '[["x"], 1]', '{"a', "\0\0"])
def test_a_damaged_line_of_the_answers_is_passed_over(tmp_path, line):
    """As two commands at the same time, or a disk that lost power, may leave one."""
    file = tmp_path / "answers.jsonl"
    first = Answers(file, {})
    assert first.of([["a"], ["b"]], lambda places: [f"answer {place}" for place in places])
    one, other = file.read_text().splitlines()
    file.write_text(f"{one}\n{line}\n{other}\n")
    assert Answers(file, {}).of([["a"], ["b"]], pytest.fail) == ["answer 0", "answer 1"]


def variant(root: Path, name: str, task: str, change: dict | None = None, spoil: dict | None = None) -> Path:
    """A folder with one of the tasks, changed, and its data with some items spoilt, by their number."""
    folder = models.write_tasks(root / name)
    for path in folder.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        path.unlink()
        if settings["task"] == task:
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "task": name, **(change or {})}))
    for file in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{**row, **(spoil or {}).get(number, {})} for number, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def said(root: Path, name: str, folder: Path, capsys) -> tuple[int, str]:
    """The command's code and what it says of the task, with nothing kept."""
    words = ["--tasks", name, "--include-path", str(folder), "--out", str(root / f"{name}.out")]
    code = main(["eval", str(root / "run"), *words, "train.threads=1"])
    shown = capsys.readouterr()
    return code, shown.err + shown.out


class Wrong(NamedTuple):
    """A task that cannot be scored, and what is said of it."""

    task: str
    change: dict[str, Any]
    spoil: dict[int, dict[str, Any]]
    expected: list[str]


WRONG = {
    "spoilt_choice": Wrong(
        "tiny_choice",
        {},
        {3: {"choices": ["a", " "]}, 5: {"answer": 4}, 6: {"choices": ["one"]}},
        ["3 of 12 items", "item 3: option 1 is empty", "item 5: its answer is option 4, of 4", "item 6: it has"],
    ),
    "spoilt_text": Wrong("tiny_text", {}, {2: {"text": " "}}, ["1 of 12 items", "item 2: its text is empty"]),
    "no_field": Wrong("tiny_generation", {"doc_to_text": "{{qestion}}"}, {}, ["'qestion' is undefined"]),
    "sampled": Wrong(
        "tiny_generation", {"generation_kwargs": {"do_sample": True}}, {}, ["asks for sampling"]
    ),
    "no_room": Wrong(
        "tiny_generation", {"generation_kwargs": {"max_gen_toks": 96}}, {}, ["no room to generate"]
    ),
    "spoilt_examples": Wrong(
        "tiny_choice", {"fewshot_config": {"doc_to_text": "{{qestion}}"}}, {},
        ["its examples, filters or metrics fail", "'qestion' is undefined"],
    ),
    "no_metric": Wrong(
        "tiny_generation", {"filter_list": [{"name": "f", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
        {}, ["missing )"],
    ),
    "no_data": Wrong(
        "tiny_text", {"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, {}, ["could not be loaded"]
    ),
}  # fmt: skip


def test_what_is_wrong_with_a_task_is_named_and_it_has_no_score(root, capsys):
    """All of them in one command: what is wrong with one does not keep the others from being said."""
    words = []
    for name, wrong in WRONG.items():
        words += ["--include-path", str(variant(root, name, wrong.task, wrong.change, wrong.spoil))]
    words += ["--tasks", ",".join(WRONG), "--out", str(root / "wrong.out")]
    assert main(["eval", str(root / "run"), *words, "train.threads=1"]) == 2
    shown = capsys.readouterr()
    lines = (root / "wrong.out/results.jsonl").read_text().splitlines()
    records = {record["task"]: record for record in map(json.loads, lines)}
    assert records.keys() == WRONG.keys()
    for name, wrong in WRONG.items():
        assert records[name]["metrics"] == {}
        assert f"{name} has no result" in shown.err
        assert all(part in records[name]["problem"] for part in wrong.expected), records[name]["problem"]


def test_generation_that_does_not_stop_is_cut_scored_and_counted(root, capsys):
    change = {"generation_kwargs": {"until": ["never said"], "max_gen_toks": 3}}
    code, text = said(root, "endless", variant(root, "endless", "tiny_generation", change), capsys)
    assert code == 0
    assert "of 12 items: generation that did not stop" in text


def test_a_task_is_asked_in_both_ways_and_in_several_formats(root, capsys):
    out = root / "ways"
    words = [
        "--tasks",
        "tiny_choice",
        "--include-path",
        str(root / "tasks"),
        "--limit",
        "4",
        "--out",
        str(out),
    ]
    assert main(["eval", str(root / "run"), *words, "--both-ways", "--formats", "train.threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "in both ways" in shown and "in several formats" in shown
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    names = [f"tiny_choice@{form}" for form in ("question", "short", "lines", "letters", "numbers")]
    assert [one["task"] for one in records] == [*names, "tiny_choice", "tiny_choice_generation"]
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (out / "samples").rglob("*.jsonl")
    }
    assert rows.keys() == {one["task"] for one in records}
    # The same answers are right in every format, and the same item has the same digest.
    for name in names:
        assert [row["target"] for row in rows[name]] == [row["target"] for row in rows["tiny_choice"]]
        assert [row["item"] for row in rows[name]] == [row["item"] for row in rows["tiny_choice_generation"]]
    letters = [row["target"] for row in rows["tiny_choice_generation"]]
    assert letters == ["ABCD"[row["target"]] for row in rows["tiny_choice"]]
    code = main(["eval", str(root / "run"), *words, "--both-ways", "--tasks", "tiny_text", "train.threads=1"])
    assert code == 2 and "no other way to ask it" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(root, capsys):
    content = json.loads((root / "tokenizer/tokenizer.json").read_text())
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": models.VOCABULARY, "content": "<one more>"}
    )
    (root / "longer").mkdir(exist_ok=True)
    (root / "longer/tokenizer.json").write_text(json.dumps(content))
    assert evaluate(root, "--tasks", "tiny_text", "--tokenizer", str(root / "longer")) == 2
    assert "more tokens" in capsys.readouterr().err


def test_a_setting_of_the_model_is_refused(root, capsys):
    assert evaluate(root, "--tasks", "tiny_text", "model.num_layers=3") == 2
    assert "the model is the checkpoint's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,said",
    [
        (["--limit", "0"], "--limit"),
        (["--limit", "-3"], "--limit"),
        (["--shots", "-1"], "--shots"),
        (["--ranks", "0"], "--ranks"),
        (["--tokens-at-once", "0"], "--tokens-at-once"),
        (["--tasks", " ,"], "No task is named"),
    ],
)
def test_numbers_that_cannot_be_and_no_task_at_all_are_refused(root, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    assert evaluate(root, "--tasks", "tiny_choice", "--out", str(out), *words) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_names_of_tasks_may_have_spaces_around_them():
    assert task_names(" tiny_choice, tiny_text (5-shot),,tiny_choice") == [
        "tiny_choice",
        "tiny_text (5-shot)",
    ]


class NotNumbers:
    """Ranks whose model's logits are not numbers."""

    def log_likelihoods(self, requests):
        return [Likelihood(math.nan, False) for _ in requests]

    def generate(self, prompts, until, most):
        return [[65, -1] for _ in prompts]


@pytest.mark.parametrize("name", native.TASKS)
def test_logits_that_are_not_numbers_give_no_score_whatever_is_asked(root, name):
    from megatron_davinci.evaluate.harness import NativeLM
    from megatron_davinci.evaluate.tasks import Tasks, run_task

    tokenizer = Tokenizer.load(root / "tokenizer")
    lm = NativeLM(NotNumbers(), tokenizer, models.LENGTH, Answers(None, {}))
    manager = Tasks([root / "tasks"]).manager(name)
    result = run_task(lm, name, lambda: manager.load([name]))
    assert result.metrics == {}
    assert result.problem == "12 of 12 items: logits that are not numbers"


class Failing:
    """Ranks that cannot compute."""

    def log_likelihoods(self, requests):
        raise RuntimeError("out of memory")


def test_a_model_that_fails_is_no_trouble_of_a_task(root):
    from megatron_davinci.evaluate.harness import NativeLM
    from megatron_davinci.evaluate.tasks import Tasks, run_task

    lm = NativeLM(Failing(), Tokenizer.load(root / "tokenizer"), models.LENGTH, Answers(None, {}))
    manager = Tasks([root / "tasks"]).manager("tiny_choice")
    with pytest.raises(RuntimeError, match="out of memory"):
        run_task(lm, "tiny_choice", lambda: manager.load(["tiny_choice"]))


class AtMost:
    """Ranks whose model finds nothing likely but what follows few tokens."""

    def log_likelihoods(self, requests):
        return [Likelihood(-float(len(before)), False) for before, _ in requests]


def test_contexts_as_options_have_their_number_as_text(root, tmp_path):
    """As in WinoGrande: what stands before a common end differs."""
    from lm_eval.tasks import TaskManager

    from megatron_davinci.evaluate.harness import NativeLM
    from megatron_davinci.evaluate.tasks import run_task

    def asked(answers: list[int]):
        rows = [{"which": n, "options": ["It was a", "It was not a"], "end": "dog."} for n in answers]
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "common_end",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{which}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{end}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        lm = NativeLM(AtMost(), Tokenizer.load(root / "tokenizer"), models.LENGTH, Answers(None, {}))
        return run_task(lm, "common_end", lambda: TaskManager(include_defaults=False).load([task]))

    found = asked([0, 1, 0, 0])
    assert found.problem is None and found.metrics["acc,none"] == 0.75
    assert "its answer is option 2, of 2" in str(asked([0, 2]).problem)


def test_tasks_by_name_take_their_data_from_a_folder_of_data_sets(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ndataset_path: nobody/nowhere\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["a", "b"]\ndoc_to_target: 0\n'
    )
    folder = tmp_path / "sets" / "nobody" / "nowhere"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"q": "which?"}\n')
    [one] = by_name(["mine"], [tmp_path / "tasks"], tmp_path / "sets", None)
    assert [item["q"] for item in one.load()["tasks"]["mine"].test_docs()] == ["which?"]
    with pytest.raises(ConfigError, match="The folder of data sets is not there"):
        by_name(["mine"], [tmp_path / "tasks"], tmp_path / "elsewhere", None)
