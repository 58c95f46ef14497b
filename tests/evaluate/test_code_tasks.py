"""Code tasks on files in their data sets' own form: prompts, programs that pass, fail and attack, what is counted."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_davinci.cli.eval_plan import _from_folder, by_name, davinci19
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.evaluate.answers import Answers
from megatron_davinci.evaluate.code_runs import LIMITS, pass_at_k
from megatron_davinci.evaluate.code_tasks import CODE_TASKS, load_code_task
from megatron_davinci.evaluate.harness import NativeLM
from megatron_davinci.evaluate.tasks import run_task
from megatron_davinci.platform import sandbox
from megatron_davinci.platform.trial import Trial, run_with_tests
from tests.evaluate import native

NAMES = ("add", "double", "length", "largest")
BODIES = {"add": "a + b", "double": "2 * a", "length": "len(a)", "largest": "max(a)"}
CASES = {
    "add": [("1, 2", 3), ("-1, 1", 0)],
    "double": [("4", 8), ("0", 0)],
    "length": [("[1, 2]", 2), ("''", 0)],
    "largest": [("[3, 1]", 3), ("[-2]", -2)],
}


def head(name: str) -> str:
    return f"def {name}({'a, b' if name == 'add' else 'a'}):\n"


def write(folder: Path, **splits: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def human_eval(number: int, name: str, *, more: bool = False) -> dict[str, str]:
    """As the hub has HumanEval, and HumanEval+, whose tests compare many inputs and use numpy."""
    test = "def check(candidate):\n" + "".join(
        f"    assert candidate({given}) == {out!r}\n" for given, out in CASES[name]
    )
    if more:
        test = (
            "import numpy as np\n\ndef assertion(out, exp, atol):\n    assert np.allclose(out, exp, atol=atol)\n\n"
            f"def check(candidate):\n    inputs = [{', '.join(f'({given},)' for given, _ in CASES[name])}]\n"
            f"    results = {[out for _, out in CASES[name]]}\n"
            "    for inp, exp in zip(inputs, results):\n        assertion(candidate(*inp), exp, 1e-6)\n"
        )
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'{head(name)}    """Write {name}."""\n',
        "canonical_solution": f"    return {BODIES[name]}\n",
        "test": test,
        "entry_point": name,
    }


def mbpp(number: int, name: str, *, plus: bool = False) -> dict[str, Any]:
    """As the hub has MBPP, and MBPP+."""
    code = f"{head(name)}    return {BODIES[name]}"
    tests = [f"assert {name}({given}) == {out!r}" for given, out in (CASES[name] * 2)[:3]]
    item: dict[str, Any] = {"task_id": number, "code": code, "test_list": tests}
    if plus:
        more = "import numpy as np\n" + "\n".join(tests)
        return item | {"prompt": f"Write {name}.", "test_imports": [], "test": more, "source_file": "x.py"}
    return item | {"text": f"Write {name}.", "test_setup_code": "", "challenge_test_list": []}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("code")
    native.offline(root / "cache")
    write(root / "openai/openai_humaneval", test=[human_eval(n, name) for n, name in enumerate(NAMES)])
    write(
        root / "evalplus/humanevalplus", test=[human_eval(n, name, more=True) for n, name in enumerate(NAMES)]
    )
    rows = [mbpp(number, NAMES[number % 4]) for number in range(1, 11)]
    write(root / "google-research-datasets/mbpp/full", test=rows[4:8], prompt=rows)
    splits = "".join(f"  - split: {name}\n    path: full/{name}.jsonl\n" for name in ("test", "prompt"))
    (root / "google-research-datasets/mbpp/README.md").write_text(
        f"---\nconfigs:\n- config_name: full\n  data_files:\n{splits}---\n"
    )
    write(root / "evalplus/mbppplus", test=[mbpp(n, name, plus=True) for n, name in enumerate(NAMES)])
    return root


class Scripted:
    """Ranks whose model answers what a test wants; prompts are kept."""

    def __init__(self, tokenizer: Tokenizer, answer: Any) -> None:
        self.tokenizer, self.answer, self.prompts = tokenizer, answer, []

    def generate(self, prompts, until, most):
        texts = [self.tokenizer.decode(list(ids)) for ids in prompts]
        self.prompts += texts
        return [
            [*self.tokenizer.encode_batch([self.answer(text)])[0].tolist(), self.tokenizer.eod_id]
            for text in texts
        ]


@pytest.fixture(scope="module")
def tokenizer(data) -> Tokenizer:
    rows = [json.dumps({"text": f"{head(name)}    return {BODIES[name]}\n"}) for name in NAMES]
    (data / "texts.jsonl").write_text("\n".join(rows) + "\n")
    train_bpe([data / "texts.jsonl"], 280, data / "tokenizer")
    return Tokenizer.load(data / "tokenizer")


def score(data: Path, tokenizer: Tokenizer, name: str, answer: Any):
    ranks = Scripted(tokenizer, answer)
    lm = NativeLM(ranks, tokenizer, 4096, Answers(None, {}))

    def load():
        with _from_folder(data):
            return load_code_task(name)

    return run_task(lm, name, load, bootstrap=0), ranks.prompts


def asked(prompt: str) -> str:
    """Which function a prompt is about: the last that it names."""
    return max(NAMES, key=lambda name: prompt.rfind(f"Write {name}."))


@pytest.mark.parametrize(
    "name",
    [
        "mbpp",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("humaneval", "humaneval_plus", "mbpp_plus")
        ),
    ],
)
def test_right_answers_pass_and_wrong_ones_do_not(name, data, tokenizer):
    indented = "humaneval" in name

    def answer(prompt: str) -> str:
        about = asked(prompt)
        body = "0" if about == "double" else BODIES[about]  # one of the four is wrong
        return (
            f"    return {body}\n\ndef left_out"
            if indented
            else f"{head(about)}    return {body}\n[DONE]\nmore"
        )

    result, prompts = score(data, tokenizer, name, answer)
    assert result.problem is None and result.metrics == {"pass@1,sandbox": 0.75}
    assert (result.items, result.shots, result.troubles) == (4, CODE_TASKS[name].shots, {})
    outcomes = [row["answers"][0][0]["outcome"] for row in result.samples[name]]
    assert sorted(outcomes) == ["passed", "passed", "passed", "wrong"]
    if indented:
        assert sorted(prompts) == sorted(human_eval(n, name)["prompt"] for n, name in enumerate(NAMES))
    else:
        # Three examples, MBPP's own, then the item.
        assert [part.split("\n")[0] for part in prompts[0].split("[BEGIN]\n")[1:]][:3] == [
            head(NAMES[number % 4]).strip() for number in (2, 3, 4)
        ]
        assert prompts[0].count("[DONE]") == 3 and prompts[0].endswith("[BEGIN]\n")


def test_an_answer_that_attacks_is_counted_and_no_crash_and_no_silent_zero(data, tokenizer):
    bodies = {
        "add": "    return a + b",
        "double": "    import os\n    os._exit(0)",  # exit code 0, before its tests
        "length": "    import ctypes\n    ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
        "largest": "    while True: print('x' * 100000)",
    }
    result, _ = score(data, tokenizer, "humaneval", lambda prompt: bodies[asked(prompt)])
    assert result.problem is None and result.metrics == {"pass@1,sandbox": 0.25}
    assert result.troubles == {
        "code that ended before its tests did": 1,
        "code that made a forbidden system call": 1,
        "code that printed without end": 1,
    }
    assert result.record()["troubles"] == result.troubles


def test_malformed_items_are_named_before_anything_is_run(data, tokenizer):
    bad = [
        human_eval(0, "add"),
        human_eval(1, "double") | {"test": ""},
        human_eval(2, "length") | {"entry_point": None},
    ]
    write(data / "bad/openai/openai_humaneval", test=bad)
    result, prompts = score(data / "bad", tokenizer, "humaneval", lambda prompt: "")
    assert prompts == [] and result.metrics == {}
    assert "2 of 3 items of humaneval are malformed" in result.problem
    assert "item 1: test is ''" in result.problem and "item 2: entry_point is None" in result.problem


def test_too_few_examples_are_said(data, tokenizer):
    write(data / "few/google-research-datasets/mbpp", test=[mbpp(1, "add")], train=[mbpp(2, "add")])
    result, prompts = score(data / "few", tokenizer, "mbpp", lambda prompt: "")
    assert prompts == [] and result.metrics == {} and "too few examples" in result.problem


def test_without_a_sandbox_it_is_said_and_nothing_is_run(data, tokenizer, monkeypatch):
    for way in sandbox.WAYS:
        monkeypatch.setitem(sandbox._tried, (way, "denied"), "not on this machine")
    planned = {one.label: one.problem for one in davinci19(data)}
    assert "nothing here keeps that in" in planned["HumanEval"] and planned["PIQA"] is None
    (one,) = by_name(["mbpp"], [], None, None)
    assert "landlock: not on this machine" in one.problem
    result, _ = score(data, tokenizer, "humaneval", lambda prompt: "    return 0")
    assert result.metrics == {} and "nothing keeps the model's code in" in result.problem


def test_what_came_of_a_program_is_told_apart():
    tests = "assert f(1) == 1"
    expected = {
        "def f(a): return a": "passed",
        "def f(a): return 2": "wrong",
        "def f(a) return": "error",
        "def f(a): raise KeyError(a)": "error",
        "def f(a): raise SystemExit(0)": "early",
        "import sys\nsys.stdout = None\ndef f(a): return a": "passed",
    }
    assert {program: run_with_tests(program, tests, LIMITS).outcome for program in expected} == expected
    assert run_with_tests("def f(a): raise KeyError(a)", tests, LIMITS) == Trial("error", "KeyError: 1")


def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one():
    for tried, right in itertools.product(range(1, 7), range(7)):
        if right > tried:
            continue
        for k in range(1, tried + 1):
            choices = list(itertools.combinations([1] * right + [0] * (tried - right), k))
            assert pass_at_k(tried, right, k) == pytest.approx(np.mean([max(one) for one in choices]))
            assert pass_at_k(tried, right, k) == pytest.approx(
                1 - math.comb(tried - right, k) / math.comb(tried, k)
            )
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_several_answers_an_item_give_pass_at_k(data):
    with _from_folder(data):
        (task,) = load_code_task("humaneval", repeats=12)["tasks"].values()
    run = partial(task.config.process_results, {})
    rows = [[{"outcome": "passed"}] * 3 + [{"outcome": "wrong"}] * 9]
    assert run(rows) == {"pass@1": pytest.approx(0.25), "pass@10": pytest.approx(1.0)}
