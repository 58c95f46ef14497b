"""HumanEval, MBPP and their EvalPlus versions, with the programs run in the sandbox.

lm-eval has these tasks, and runs what a model wrote in a process beside its own, with all its rights, once
HF_ALLOW_CODE_EVAL says so. Prompts, ends and examples here are lm-eval's; what runs the programs is ours.

HumanEval: Chen et al., arXiv 2107.03374. MBPP: Austin et al., arXiv 2108.07732. EvalPlus: Liu et al., arXiv
2305.01210.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import ConfigurableTask

from megatron_davinci.errors import DataError
from megatron_davinci.evaluate.code_runs import pass_at_k, run_all

FILTER = "sandbox"
_MBPP = ("google-research-datasets/mbpp", "full")
_SHOWN = (2, 3, 4)  # the examples that the authors show, of MBPP's split `prompt`
_KS = (1, 10, 100)
Item = Mapping[str, Any]


@dataclass(frozen=True)
class CodeTask:
    """A benchmark of code.

    Attributes:
        name: As lm-eval has it.
        data: The data set and its configuration, on the hub.
        fields: What an item must have, as text or, where it ends with `[]`, as a list of texts.
        prompt: What a model is given.
        program: What is run of an answer.
        tests: What raises where that is wrong.
        until: What ends an answer.
        shots: Examples before an item.
    """

    name: str
    data: tuple[str, str | None]
    fields: tuple[str, ...]
    prompt: Callable[[Item], str]
    program: Callable[[Item, str], str]
    tests: Callable[[Item], str]
    until: tuple[str, ...]
    shots: int


def _mbpp_prompt(item: Item) -> str:
    tests = "\n".join(item["test_list"][:3])
    asked = item["prompt"] if "prompt" in item else item["text"]
    return (
        f"You are an expert Python programmer, and here is your task: {asked} Your code should pass these tests:\n\n"
        f"{tests}\n[BEGIN]\n"
    )


def _human_eval(name: str, data: str) -> CodeTask:
    return CodeTask(
        name,
        (data, None),
        ("prompt", "test", "entry_point"),
        prompt=lambda item: str(item["prompt"]),
        program=lambda item, answer: item["prompt"] + answer,
        tests=lambda item: f"{item['test']}\ncheck({item['entry_point']})",
        until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        shots=0,
    )


CODE_TASKS = {
    task.name: task
    for task in (
        _human_eval("humaneval", "openai/openai_humaneval"),
        _human_eval("humaneval_plus", "evalplus/humanevalplus"),
        CodeTask(
            "mbpp",
            _MBPP,
            ("text", "code", "test_list[]"),
            prompt=_mbpp_prompt,
            program=lambda item, answer: f"{item.get('test_setup_code') or ''}\n{answer}",
            tests=lambda item: "\n".join(item["test_list"]),
            until=("[DONE]",),
            shots=3,
        ),
        CodeTask(
            "mbpp_plus",
            ("evalplus/mbppplus", None),
            ("prompt", "code", "test_list[]", "test"),
            prompt=_mbpp_prompt,
            program=lambda item, answer: "\n".join([*(item.get("test_imports") or []), answer]),
            tests=lambda item: str(item["test"]),
            until=("[DONE]",),
            shots=3,
        ),
    )
}


def load_code_task(name: str, repeats: int = 1) -> dict[str, Any]:
    """A task as `TaskManager.load` gives one, with its data from where `datasets` finds it.

    Args:
        name: Of `CODE_TASKS`.
        repeats: Answers of each item, for pass@k; a model must sample for them to differ.

    Raises:
        DataError: An item is not of the data set's form.
    """
    task = CODE_TASKS[name]
    data = _load(*task.data)
    _check(task, data["test"])
    examples = data if "prompt" in data or "train" in data or not task.shots else _load(*_MBPP)
    shown = _examples(examples) if task.shots else []
    settings: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: data,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": task.prompt,
        "doc_to_target": task.tests,
        "target_delimiter": "",
        "num_fewshot": task.shots,
        "repeats": repeats,
        "generation_kwargs": {
            "until": list(task.until),
            "do_sample": False,
            **({} if task.shots else {"max_gen_toks": 1024}),
        },
        "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": _runner(task)}]}],
        "process_results": _score,
        "metric_list": [
            {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True}
            for k in _KS
            if k <= repeats
        ],
        "metadata": {"version": 1.0},
    }
    if task.shots:
        settings["fewshot_config"] = {
            "sampler": "first_n",
            "samples": shown,
            "doc_to_text": _mbpp_prompt,
            "doc_to_target": lambda item: f"{item['code']}\n[DONE]",
        }
    return {"tasks": {name: ConfigurableTask(config=settings)}, "groups": {}}


def _load(path: str, configuration: str | None) -> Any:
    import datasets  # looked up when it is called: where data lies may have been said meanwhile

    return datasets.load_dataset(path=path, name=configuration)


def _examples(data: Any) -> list[Item]:
    """MBPP's own three examples; where a copy has no split for them, the first three to train on."""
    if "prompt" in data:
        chosen = [item for item in data["prompt"] if item.get("task_id") in _SHOWN]
        return chosen or list(data["prompt"])[: len(_SHOWN)]
    return [data["train"][number] for number in range(min(len(_SHOWN), len(data["train"])))]


def _check(task: CodeTask, items: Sequence[Item]) -> None:
    bad = []
    for number, item in enumerate(items):
        for name in task.fields:
            value = item.get(name.removesuffix("[]"))
            parts = value if name.endswith("[]") else [value]
            if (
                not isinstance(parts, list)
                or not parts
                or not all(isinstance(one, str) and one for one in parts)
            ):
                bad.append(f"item {number}: {name} is {value!r:.60}")
                break
    if bad:
        raise DataError(
            f"{len(bad)} of {len(items)} items of {task.name} are malformed.",
            where=task.data[0],
            found="; ".join(bad[:5]),
            expected=f"the fields {', '.join(task.fields)}, with text",
        )


def _runner(
    task: CodeTask,
) -> Callable[[Sequence[Sequence[str]], Sequence[Item]], list[list[dict[str, str]]]]:
    def run(answers: Sequence[Sequence[str]], items: Sequence[Item]) -> list[list[dict[str, str]]]:
        items = list(items)
        programs = [
            (task.program(item, answer), task.tests(item))
            for of, item in zip(answers, items, strict=True)
            for answer in of
        ]
        runs = iter(run_all(programs))
        return [
            [
                {"answer": answer, "outcome": (run := next(runs)).outcome, "detail": run.detail}
                for answer in of
            ]
            for of in answers
        ]

    return run


def _score(item: Item, results: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, float]:
    outcomes = [one["outcome"] for one in results[0]]
    right = outcomes.count("passed")
    return {f"pass@{k}": pass_at_k(len(outcomes), right, k) for k in _KS if k <= len(outcomes)}
