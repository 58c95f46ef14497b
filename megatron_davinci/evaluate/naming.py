"""How one task is called when it is asked in several ways: `NAME_generation`, `NAME@FORMAT`."""

from __future__ import annotations

LIKELIHOOD = "likelihood"
GENERATION = "generation"
AT = "@"


def stem_of(name: str) -> str:
    """What a task is called in all its ways."""
    stem = name.partition(AT)[0]
    return stem.removesuffix(f"_{LIKELIHOOD}").removesuffix(f"_{GENERATION}")


def otherwise(name: str, words: str) -> str:
    """A task that was asked in a way that `words` say; in all its ways it is called alike."""
    stem = stem_of(name)
    return f"{stem} ({words.replace(AT, '_')}){name.removeprefix(stem)}"


def generated(name: str) -> str:
    """A task by likelihood, turned into one of generation."""
    return f"{name}_{GENERATION}"


def formatted(name: str, form: str) -> str:
    """A task in another format."""
    return f"{name}{AT}{form}"


def format_of(name: str) -> str | None:
    """The format in a task's name; None for the task as it is."""
    _, _, form = name.partition(AT)
    return form or None
