"""The same items of multiple choice in several formats, all by likelihood.

A score is of a model and of the words around a question. How much the second does is measured by asking in formats
that say the same: how a question is introduced, and whether its options are scored by their text or by a label
(OLMES, Gu et al., arXiv 2406.08446, calls these cloze and multiple-choice formulation; that harmless changes of
format move scores is Sclar et al.'s finding, arXiv 2310.11324). The formats are ours, the same for every task.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import ConfigurableTask

from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.both_ways import LETTERS, answer_of
from megatron_davinci.evaluate.naming import formatted

_HEAD = re.compile(r"^(Question|Q)\s*:\s*")
_TAIL = re.compile(r"\s*(Answer|A)\s*:\s*$")


@dataclass(frozen=True)
class Format:
    """How an item is put.

    Attributes:
        name: Of the format.
        text: What stands around the question, with `{question}` and, where options are listed, `{options}`.
        delimiter: Between the text and what is scored.
        label: How an option is labelled in the list, with `{letter}` or `{number}`; None where its text is scored.
    """

    name: str
    text: str
    delimiter: str = " "
    label: str | None = None

    def put(self, question: str, options: list[str]) -> tuple[str, list[str]]:
        """A question's text, and what is scored for each option.

        Args:
            question: As the task has it.
            options: Likewise, at most 26.
        """
        bare = _TAIL.sub("", _HEAD.sub("", question.strip()))
        said = [option.strip() for option in options]
        if self.label is None:
            return self.text.format(question=bare), said
        labels = [
            self.label.format(letter=letter, number=number)
            for number, letter in enumerate(LETTERS[: len(said)], 1)
        ]
        listed = "\n".join(f"{label} {option}" for label, option in zip(labels, said, strict=True))
        return self.text.format(question=bare, options=listed), [label.strip("().") for label in labels]


FORMATS = (
    Format("question", "Question: {question}\nAnswer:"),
    Format("short", "Q: {question}\nA:"),
    Format("lines", "{question}", delimiter="\n"),
    Format("letters", "{question}\n{options}\nAnswer:", label="{letter}."),
    Format("numbers", "{question}\n{options}\nAnswer:", label="({number})"),
)


def in_format(loaded: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """What `TaskManager.load` gave, in another format.

    Raises:
        ConfigError: One of its tasks is not of multiple choice, or its questions are what differs between options.
    """
    return {
        **loaded,
        "tasks": {
            formatted(name, form.name): _put(name, task, form) for name, task in loaded["tasks"].items()
        },
        "groups": {},
    }


def _put(name: str, task: Any, form: Format) -> ConfigurableTask:
    first = next(iter(task.eval_docs), None)
    if task.OUTPUT_TYPE != "multiple_choice" or (
        first is not None and isinstance(task.doc_to_text(first), int)
    ):
        raise ConfigError(
            "A task has no other formats: they are for a question with options.",
            where=name,
            found=str(task.OUTPUT_TYPE) if task.OUTPUT_TYPE != "multiple_choice" else "contexts as options",
        )
    settings = copy.copy(task.config.to_dict(keep_callable=True))
    for key in ("process_results", "repeats", "should_decontaminate"):
        settings.pop(key, None)
    fewshot = dict(settings.get("fewshot_config") or {})
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter"):
        fewshot.pop(key, None)

    def parts(item: dict[str, Any]) -> tuple[str, list[str]]:
        return form.put(str(task.doc_to_text(item)), [str(option) for option in task.doc_to_choice(item)])

    settings |= {
        "task": formatted(name, form.name),
        "doc_to_text": lambda item: parts(item)[0],
        "doc_to_choice": lambda item: parts(item)[1],
        "doc_to_target": lambda item: answer_of(task, item),
        "target_delimiter": form.delimiter,
        "fewshot_config": fewshot or None,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return ConfigurableTask(config={key: value for key, value in settings.items() if value is not None})
