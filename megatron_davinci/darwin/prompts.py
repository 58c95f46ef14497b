"""Prompt files: what a model is told, with a name, a version and slots; ours lie beside this module, yours anywhere.

A prompt file is YAML: `name`, `version`, `task`, `system`, `user`, and for shared wording `base`, another prompt
file whose `{{guidance}}` slot it fills. The document stands in `user` at `{{passage}}`, inside a mark that the
document does not contain: text that says "ignore the above" stays text between two marks, and gates judge what
comes back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from megatron_davinci.config.load import one_screen, problems_of, read_settings
from megatron_davinci.config.section import Section
from megatron_davinci.darwin.choices import SLOT, Choice
from megatron_davinci.errors import ConfigError

FOLDER = Path(__file__).parent / "prompt_files"
Task = Literal[
    "purify", "reorganise", "edit", "complete", "pairs", "judge_alone", "judge_support", "contextualise", "quote",
    "agent", "choose", "judge_dialogue", "answer", "checks", "calls", "transcribe", "rate",
    "world", "judge_law", "act",
]  # fmt: skip
# The slots that the user's message of each task must have.
SLOTS: dict[str, set[str]] = {
    "purify": {"passage", "mark"},
    "reorganise": {"passage", "mark"},
    "edit": {"passage", "mark"},
    "complete": {"passage", "mark"},
    "pairs": {"passage", "mark"},
    "judge_alone": {"question"},
    "answer": {"question"},
    "checks": {"passage", "mark"},
    "calls": {"passage", "mark", "function"},
    "judge_support": {"passage", "mark", "question", "answer"},
    "contextualise": {"passage", "mark", "related"},
    "quote": {"passage", "mark", "related"},
    "agent": {"passage", "mark", "dialogue", "speaker"},
    "choose": {"passage", "mark", "dialogue", "speaker"},
    "judge_dialogue": {"passage", "mark", "dialogue"},
    "transcribe": {"mark"},
    "rate": {"passage", "mark"},
    "world": {"passage", "mark"},
    "judge_law": {"passage", "mark", "quotation"},
    "act": {"mark", "aim", "actions"},
}
# And those that it may have.
MORE_SLOTS = {"choose": {"forms"}, "act": {"passage", "state"}}


class PromptFile(Section):
    """A prompt file.

    Attributes:
        name: What documents' histories call it.
        version: Raised with every change of wording.
        task: What is asked for: `purify` deletes and repairs, `reorganise` regroups too, `edit` says which lines go
            and what is replaced, `complete` spells out what is left unsaid, `pairs` asks for questions with answers;
            `judge_alone` and `judge_support` judge a pair; `contextualise` adds from related passages, `quote` says
            which of their sentences to quote; `agent` says the next turn of a dialogue, `choose` chooses what it is
            composed of, `judge_dialogue` judges one; `answer` asks a question, `checks` for a program's tests,
            `calls` for calls of one function of it; `transcribe` asks for the text of a page that goes along as a
            picture, `rate` for a grade; `world` for a world that goes by a text, `judge_law` judges one of its laws,
            `act` asks for one of the actions that a world leaves.
        domain: What it is for, for a reader.
        base: Name of the prompt file that it gives its guidance to.
        guidance: What is peculiar to the domain.
        system: The system's message.
        user: The user's message, with the task's slots.
        choice: What turns are composed of, for the task `choose`.
    """

    name: str
    version: int
    task: Task
    domain: str = "general"
    base: str | None = None
    guidance: str = ""
    system: str = ""
    user: str = ""
    choice: Choice | None = None

    @model_validator(mode="after")
    def _chooses(self) -> PromptFile:
        if (self.choice is None) != (self.task != "choose"):
            wrong = "has none: add choice.forms" if self.choice is None else f"has one; found {self.task}"
            raise ValueError(f"the task choose, and no other, should have a choice; this {wrong}")
        return self


class Prompt:
    """A prompt, ready to be filled.

    Attributes:
        name: Of its file.
        version: Likewise.
        task: What it asks for.
        system: The system's message, with guidance filled in.
        user: The user's message, with slots.
        choice: What turns are composed of; None where the model writes them.
    """

    def __init__(
        self,
        name: str,
        version: int,
        task: str,
        system: str,
        user: str,
        choice: Choice | dict[str, Any] | None = None,
    ) -> None:
        self.name, self.version, self.task = name, version, task
        self.system, self.user = system, user
        self.choice = None if choice is None else Choice.model_validate(choice)

    @property
    def described(self) -> dict[str, Any]:
        """All of it: what a corpus's manifest says, from which it can be made again."""
        return {
            "name": self.name,
            "version": self.version,
            "task": self.task,
            "system": self.system,
            "user": self.user,
            **({} if self.choice is None else {"choice": self.choice.model_dump()}),
        }

    @property
    def mark(self) -> str:
        """Name, version and a hash of the wording, for histories."""
        wording = f"{self.system}\0{self.user}"
        if self.choice is not None:
            wording += f"\0{self.choice.model_dump_json()}"
        digest = hashlib.blake2b(wording.encode(), digest_size=4).hexdigest()
        return f"{self.name} {self.version} ({digest})"

    def messages(self, **slots: str) -> list[dict[str, Any]]:
        """The chat with its slots filled; what fills one is never looked through for slots."""
        said = [{"role": "user", "content": SLOT.sub(lambda slot: slots[slot[1]], self.user)}]
        if self.system:
            said.insert(0, {"role": "system", "content": SLOT.sub(lambda slot: slots[slot[1]], self.system)})
        return said


def mark_for(*texts: str) -> str:
    """A word for the tags around a text, that no text has as a tag; the same for the same texts."""
    mark, number = "passage", 1
    while any(f"{mark}>" in text for text in texts):
        number += 1
        mark = f"passage{number}"
    return mark


def names() -> list[str]:
    """Our prompt files."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_prompt(given: str, base: Path, tasks: frozenset[str]) -> Prompt:
    """Read a prompt.

    Args:
        given: Name of one of ours, or a path that ends in `.yaml`.
        base: The folder that a path counts from.
        tasks: One of which it must be for.

    Raises:
        ConfigError: There is none, it is for another task, or lacks a slot: every problem of the file at once.
    """
    path = base / given if given.endswith((".yaml", ".yml")) else FOLDER / f"{given}.yaml"
    if path.parent == FOLDER and not path.is_file():
        raise ConfigError(
            "There is no such prompt.",
            found=given,
            expected=", ".join(name for name in names() if _read(FOLDER / f"{name}.yaml").task in tasks),
            do="name one of these, or a file that ends in .yaml",
        )
    file = _read(path)
    system, user = file.system, file.user
    if file.base is not None:
        parent = _read(
            path.parent / f"{file.base}.yaml"
            if (path.parent / f"{file.base}.yaml").is_file()
            else FOLDER / f"{file.base}.yaml"
        )
        guided = [
            text.replace("{{guidance}}", file.guidance.strip()) for text in (parent.system, parent.user)
        ]
        system, user = (own or given_ for own, given_ in zip((system, user), guided, strict=True))
    problems = []
    if file.task not in tasks:
        problems.append(f"task: should be {' or '.join(sorted(tasks))}; found {file.task}")
    found, wanted = set(SLOT.findall(user)), SLOTS[file.task]
    problems += [f"user: has no slot {{{{{slot}}}}}" for slot in sorted(wanted - found)]
    problems += [
        f"{place}: there is no slot {{{{{slot}}}}} for the task {file.task}; there are "
        f"{', '.join(sorted(wanted | MORE_SLOTS.get(file.task, set())))}"
        for place, slots in (("user", found), ("system", set(SLOT.findall(system))))
        for slot in sorted(slots - wanted - MORE_SLOTS.get(file.task, set()))
    ]
    if user.count("{{passage}}") > 1:
        problems.append("user: has {{passage}} more than once")
    if problems:
        raise ConfigError(
            "A prompt file cannot be used.", where=path, found="\n".join(problems), do="mend the file"
        )
    return Prompt(file.name, file.version, file.task, system.strip(), user.strip(), file.choice)


def _read(path: Path) -> PromptFile:
    settings, lines = read_settings(path, "name, version, task, system, user")
    try:
        return PromptFile.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(
            "A prompt file has a problem.",
            where=path,
            found=one_screen(problems_of(error, PromptFile, lines)),
        ) from None
