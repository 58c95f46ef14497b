"""PTX as nvcc writes it, read: the kernels of a file, with registers as C++ declares them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_davinci.errors import EnvironmentProblem

_ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
_SHARED = re.compile(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(.*)")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_PLACE = re.compile(r"\.loc\s+(\d+) (\d+) \d+(?:.* inlined_at (\d+) (\d+))?")


@dataclass(frozen=True)
class Instruction:
    """One of a kernel.

    Attributes:
        name: With its modifiers and types.
        operands: As they are written.
        guard: The predicate that it depends on, `!` before it where it must not hold, or nothing.
        file: Of the source, its number in the PTX.
        line: There.
    """

    name: str
    operands: tuple[str, ...]
    guard: str
    file: int
    line: int


@dataclass
class Entry:
    """A kernel as PTX has it: labels (`str`), instructions, and what opens and closes a scope."""

    name: str
    body: list[Instruction | str] = field(default_factory=list)


@dataclass
class Module:
    """A file of PTX.

    Attributes:
        entries: Its kernels.
        shared: Bytes of shared memory by name, with their alignment; 0 bytes: what the launch adds.
        files: The sources' names by number.
    """

    entries: list[Entry] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)


def read(text: str) -> Module:
    """Read PTX as nvcc writes it: an instruction or a directive a line.

    Raises:
        EnvironmentProblem: There is something in it that is not known here.
    """
    module, entry, place = Module(), None, (0, 0)
    for number, path in re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', text, re.MULTILINE):
        module.files[int(number)] = path.rsplit("/", 1)[-1]
    for line in (raw.split("//")[0].strip() for raw in text.splitlines()):
        if match := _ENTRY.match(line):
            entry = Entry(match[1])
            module.entries.append(entry)
        elif line.startswith((".func", ".visible .func", ".weak .func")):
            raise unknown(f"a function that is called: {line}")
        elif match := _SHARED.search(line):
            module.shared[match[2]] = (int(match[3] or 0), int(match[1]))
        elif entry is None or not line or line.startswith(".param"):
            continue
        elif match := _PLACE.match(line):
            # Of one of CUDA's own functions, where it was called.
            theirs = module.files.get(int(match[1]), "").endswith(".hpp") and match[3]
            found = (match[3], match[4]) if theirs else (match[1], match[2])
            if int(found[1]):
                place = int(found[0]), int(found[1])
        elif match := re.match(r"(\$?\w+):$", line):
            entry.body.append(_label(match[1]))
        else:
            entry.body += _statements(line, place)
            if line == "}" and _is_closed(entry.body):
                entry = None
    return module


def _label(name: str) -> str:
    return name.replace("$", "") + ":;"


def _is_closed(body: list[Instruction | str]) -> bool:
    return body.count("{") == body.count("}")


def _statements(line: str, place: tuple[int, int]) -> Iterator[Instruction | str]:
    """What a line has: one statement, or a scope with several."""
    if line in ("{", "}"):
        yield line
    elif line.startswith("{"):
        yield "{"
        for part in line[1 : line.rindex("}")].split(";"):
            yield from _statements(part.strip(), place)
        yield "}"
    elif match := _REGISTERS.match(line):
        yield _declared(match[1], match[2].rstrip(";"))
    elif not line or line.startswith((".maxntid", ".minnctapersm", ".pragma", ")")):
        return
    else:
        match = re.match(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*?);?$", line)
        if match is None or ";" in match[3]:
            raise unknown(line)
        yield Instruction(match[2], tuple(_OPERANDS.findall(match[3])), match[1] or "", *place)


def _declared(kind: str, names: str) -> str:
    """Declare registers: a variable of its bits for each."""
    match = re.match(r"%(\w+)<(\d+)>", names)
    listed = [f"{match[1]}{n}" for n in range(int(match[2]))] if match else names.replace(" ", "").split(",")
    bits = "bool" if kind == "pred" else f"uint{kind.lstrip('usbf')}_t"
    return f"{bits} {', '.join(listed)};"


def unknown(what: str) -> EnvironmentProblem:
    """The error that says so of a line or an instruction."""
    return EnvironmentProblem(
        "nvcc made something that the emulator of PTX does not know.",
        where="csrc/kernels/ptx.h",
        found=what,
        do="use nvcc 13.0, or say there what the instruction does",
    )
