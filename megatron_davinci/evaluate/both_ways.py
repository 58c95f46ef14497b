"""A task of multiple choice as one of generation: the same items, with the options listed, answered by a letter.

lm-eval scores options by their likelihood where a task is of multiple choice. How a model does at that and how it
does when it has to write the answer are two things, and may rank models differently (daVinci-LLM, arXiv 2603.27164,
section 4.4). The listing, the letters and the expression that finds the answer are ours, the same for every task.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask

from megatron_davinci.evaluate.naming import generated

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FILTER = "letter"
MOST = 16  # tokens of an answer


def as_generation(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """What `TaskManager.load` gave, with its tasks of multiple choice turned into generation.

    A turned task has another name, so that what is kept of either does not lie over the other. A group's own metrics
    are left out: they name those of the other protocol.
    """
    tasks = {}
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "multiple_choice":
            tasks[generated(name)] = _generative(name, task)
        else:
            tasks[name] = task
    return {**loaded, "tasks": tasks, "groups": {}}


def has_options(loaded: Mapping[str, Any]) -> bool:
    """Whether any of these tasks is of multiple choice."""
    return any(task.OUTPUT_TYPE == "multiple_choice" for task in loaded["tasks"].values())


def answer_of(task: Any, item: dict[str, Any]) -> int:
    """The number of the right option of an item of multiple choice.

    Raises:
        ValueError: It has several, or one that is none of its options.
    """
    answer = task.doc_to_text(item)
    if not isinstance(answer, int):
        answer = task.doc_to_target(item)
    if isinstance(answer, list):  # as AGIEval has it, of one
        if len(answer) != 1:
            raise ValueError(f"{len(answer)} right options, where one is asked for")
        [answer] = answer
    if isinstance(answer, str):
        # An option's text first, as lm-eval has it: "2" is the option that says so, wherever that stands.
        options = list(task.doc_to_choice(item))
        return int(answer) if answer.isdecimal() and answer not in options else options.index(answer)
    return int(answer)


def listed(question: str, options: list[str]) -> str:
    """A question and its options, a line each, up to where the answer's letter belongs."""
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _generative(name: str, task: Any) -> ConfigurableTask:
    settings = copy.copy(task.config.to_dict(keep_callable=True))
    for key in ("doc_to_choice", "process_results", "repeats", "should_decontaminate"):
        settings.pop(key, None)
    fewshot = dict(settings.get("fewshot_config") or {})
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter"):
        fewshot.pop(key, None)
    settings |= {
        "task": generated(name),
        "output_type": "generate_until",
        "doc_to_text": _text(task),
        "doc_to_target": _letter(task),
        "target_delimiter": " ",
        "fewshot_config": fewshot or None,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": MOST, "do_sample": False},
        "filter_list": [
            {
                "name": FILTER,
                "filter": [
                    {"function": "regex", "regex_pattern": r"^\s*\(?([A-Z])\b", "fallback": ""},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return ConfigurableTask(config={key: value for key, value in settings.items() if value is not None})


def _text(task: Any) -> Callable[[dict[str, Any]], str]:
    def text(item: dict[str, Any]) -> str:
        options = [str(option) for option in task.doc_to_choice(item)]
        question = task.doc_to_text(item)
        if isinstance(question, int):
            # The options are what stands before a common end, as in WinoGrande.
            end = str(task.doc_to_target(item))
            return listed("Which is right?", [f"{option} {end}" for option in options])
        return listed(str(question).removesuffix("Answer:"), options)

    return text


def _letter(task: Any) -> Callable[[dict[str, Any]], str]:
    return lambda item: LETTERS[answer_of(task, item)]
