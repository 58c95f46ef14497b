"""The launch command in a script: which words are Megatron-LM's arguments, cut into flags and their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_davinci.convert import megatron_flags
from megatron_davinci.convert.shell_expand import Field
from megatron_davinci.convert.shell_script import Script, Unread, read_script
from megatron_davinci.errors import ConfigError

LARGEST_SCRIPT = 256_000
"""Characters; launch scripts have a few thousand."""

_SAYING = frozenset({"echo", "printf"})  # many scripts show the command before they start it


def printable(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


@dataclass(frozen=True)
class Occurrence:
    """A flag where it stands in the command.

    Attributes:
        flag: Its name.
        values: What follows it, up to the next flag.
        line: Of the script.
        unknown: Expansions in the values that the script alone does not say.
    """

    flag: str
    values: tuple[str, ...]
    line: int
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return printable(" ".join((self.flag, *self.values)))


@dataclass
class Command:
    """A launch command.

    Attributes:
        launcher: Flags before the training script.
        flags: Flags of Megatron-LM, in order.
        stray: Words that belong to no flag.
        unread: Passages of the script that were not understood.
        whole: False if the script starts nothing, and the flags are those of its variables.
        because: Of variables that are not known, the expansions that would decide them.
    """

    launcher: list[Occurrence] = field(default_factory=list)
    flags: list[Occurrence] = field(default_factory=list)
    stray: list[Field] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    whole: bool = True
    because: dict[str, str] = field(default_factory=dict)

    def ranks(self) -> int | None:
        """Processes that the launcher starts in all, if it says how many."""
        said: dict[str, int] = {}
        for occurrence in self.launcher:
            name = occurrence.flag.replace("_", "-")
            if occurrence.values and occurrence.values[0].isdecimal() and len(occurrence.values[0]) < 9:
                said[name] = int(occurrence.values[0])
        if "--nproc-per-node" not in said:
            return None
        return said["--nproc-per-node"] * said.get("--nnodes", 1)


def find_command(text: str, where: str, given: Mapping[str, str]) -> Command:
    """Find the launch command.

    Args:
        text: A shell script that starts Megatron-LM, or its arguments alone.
        where: Its name, for messages.
        given: See `shell_script.read_script`.

    Raises:
        ConfigError: There is none, there are several, or the script cannot be read.
    """
    if len(text) > LARGEST_SCRIPT:
        raise ConfigError(
            "This is no launch script.",
            where=where,
            found=f"{len(text):,} characters",
            expected=f"at most {LARGEST_SCRIPT:,}",
        )
    script = read_script(text, where, given)
    found = [words for command in script.commands if (words := _launch(command))]
    # Programs that prepare data or convert take some of the flags; training alone must say how many layers.
    found = [words for words in found if any(_name(word) == "--num-layers" for word in words)] or found
    bare = [w for command in script.commands if command[0].text.startswith("--") for w in command]
    if len(found) + bool(bare) > 1:
        lines = sorted([words[0].line for words in found] + [w.line for w in bare[:1]])
        raise ConfigError(
            "The script has several launch commands.",
            where=where,
            found="lines " + ", ".join(str(line) for line in lines),
            expected="one",
            do="copy the one that you mean into a file of its own, with the variables that it uses",
        )
    command = Command(unread=script.unread, whole=bool(found or bare), because=script.because)
    words = found[0] if found else bare or script.flags
    if not words:
        raise ConfigError(
            "There is no launch command of Megatron-LM here.",
            where=where,
            found=_seen(script),
            expected="torchrun ... pretrain_gpt.py --num-layers ...; or the flags alone",
        )
    program = next((i for i, word in enumerate(words) if _is_program(word.text)), -1)
    command.launcher = list(_occurrences(words[:program], [])) if program > 0 else []
    command.flags = list(_occurrences(words[program + 1 :], command.stray))
    return command


def _launch(words: list[Field]) -> list[Field]:
    """The words of a command that starts training, also where a shell is to start it; empty for any other."""
    if words[0].text in _SAYING:
        return []
    for word in words:
        if ".py" in word.text and " --" in word.text:  # sh -c "python pretrain_gpt.py --num-layers ..."
            inner = read_script(word.text.replace("\n", " "), "the command", {}).commands
            words = [Field(f.text, word.line, f.unknown) for f in inner[0]] if inner else words
            break
    program = next((i for i, word in enumerate(words) if _is_program(word.text)), None)
    if program is None or words[0].text.startswith("--"):
        return []
    return words if any(_name(word) in megatron_flags.FLAGS for word in words[program:]) else []


def _name(word: Field) -> str:
    return word.text.partition("=")[0]


def _is_program(word: str) -> bool:
    return word.endswith(".py") and not word.startswith("-")


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _occurrences(words: list[Field], stray: list[Field]) -> Iterator[Occurrence]:
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not _is_flag(word.text):
            stray.append(word)
            continue
        name, equals, value = word.text.partition("=")
        values = [Field(value, word.line, word.unknown)] if equals else []
        while at < len(words) and not _is_flag(words[at].text):
            values.append(words[at])
            at += 1
        row = megatron_flags.row(name)
        if row and row.values != megatron_flags.MANY and len(values) > row.values:
            stray += values[row.values :]
            values = values[: row.values]
        yield Occurrence(
            name,
            tuple(_without_quotes(v.text) for v in values),
            word.line,
            tuple(written for v in values for written in v.unknown),
        )


def _without_quotes(text: str) -> str:
    # Quotes inside an array's quoted element reach the program; nobody means them.
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _seen(script: Script) -> str:
    first = [command[0].text for command in script.commands][:5]
    return printable(f"commands {', '.join(first)}") if first else "no command and no variable with flags"
