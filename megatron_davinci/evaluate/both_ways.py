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

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FILTER = "letter"
MOST = 16  # tokens of an answer


def as_generation(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """What `TaskManager.load` gave, with its tasks of multiple choice turned into generation.

    A group's own metrics are left out: they name those of the other protocol.
    """
    tasks = {
        name: _generative(task) if task.OUTPUT_TYPE == "multiple_choice" else task
        for name, task in loaded["tasks"].items()
    }
    return {**loaded, "tasks": tasks, "groups": {}}


def listed(question: str, options: list[str]) -> str:
    """A question and its options, a line each, up to where the answer's letter belongs."""
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _generative(task: Any) -> ConfigurableTask:
    settings = copy.copy(task.config.to_dict(keep_callable=True))
    for name in ("doc_to_choice", "process_results", "repeats", "should_decontaminate"):
        settings.pop(name, None)
    fewshot = dict(settings.get("fewshot_config") or {})
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        fewshot.pop(name, None)
    settings |= {
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
    def letter(item: dict[str, Any]) -> str:
        answer = task.doc_to_text(item)
        if not isinstance(answer, int):
            answer = task.doc_to_target(item)
        if isinstance(answer, str):
            answer = int(answer) if answer.isdecimal() else list(task.doc_to_choice(item)).index(answer)
        return LETTERS[answer]

    return letter
