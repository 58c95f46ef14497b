"""PTX as C++: what nvcc made of a kernel, for the emulator to run (`csrc/kernels/ptx.h` has what instructions do).

A register becomes a variable of its bits, an instruction a call of the function of its name. Jumps and instructions
of memory and of threads that meet are written here; of all others only ptx.h knows what they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_davinci.kernels.ptx import Entry, Instruction, Module, read, unknown
from megatron_davinci.kernels.table import Kernel

Spot = tuple[str, int, str]
"""A source's file and line, and the name of an instruction that was made of it."""

_SPECIAL = {
    "%tid.x": "emulator::state().current->index.x",
    "%ctaid.x": "emulator::state().block.x",
    "%ntid.x": "emulator::state().threads.x",
    "%nctaid.x": "emulator::state().blocks.x",
    "%dynamic_smem_size": "ptx::shared_memory().added",
}
_SHUFFLES = {"up": "kUp", "down": "kDown", "bfly": "kButterfly", "idx": "kIndex"}
_TYPE = re.compile(r"([usbf](8|16|32|64)|pred|u16x2|bf16|bf16x2|e4m3x2|e5m2x2)$")
_C_TYPES = {"p": "const void*", "l": "long long", "f": "float"}  # of `Kernel.arguments`


class _Writer:
    """Writes one kernel. `places` collects where instructions come from, `blocks` which ones are run together."""

    def __init__(self, module: Module, entry: Entry, offsets: dict[str, int], known: set[str]) -> None:
        self._module, self._entry, self._offsets, self._known = module, entry, offsets, known
        self.places: list[Spot] = []
        self.blocks: list[Counter[Spot]] = []

    def body(self, first_place: int, first_block: int) -> Iterator[str]:
        """The lines of the function's body, its braces among them."""
        self._first_place = first_place
        fresh = False  # whether a run of instructions begins
        depth = 0
        for one in self._entry.body:
            if isinstance(one, str):
                yield one
                depth += {"{": 1, "}": -1}.get(one, 0)
                fresh = fresh or one.endswith(":;") or (one == "{" and depth == 1)
                continue
            if fresh:
                yield f"ptx::ran({first_block + len(self.blocks)});"
                self.blocks.append(Counter())
                fresh = False
            self.blocks[-1][self._spot(one)] += 1
            text = self._known_instruction(one)
            yield f"if ({_predicate(one.guard)}) {{ {text} }}" if one.guard else text
            fresh = one.name.startswith("bra")

    def _known_instruction(self, it: Instruction) -> str:
        try:
            return self._instruction(it)
        except (KeyError, IndexError, ValueError):
            raise unknown(f"{it.name} {', '.join(it.operands)}") from None

    def _instruction(self, it: Instruction) -> str:
        base, *rest = it.name.split(".")
        operands = it.operands
        if base == "bra":
            return f"goto {operands[0].replace('$', '')};"
        if base in ("ret", "exit"):
            return "return;"
        if it.name == "bar.sync" and operands == ("0",):
            return f"ptx::barrier({self._place(it)});"
        if it.name == "bar.warp.sync":
            return f"ptx::votes({self._place(it)}, 0, {self._value(operands[0])});"
        if base in ("ld", "st") and rest[0] == "param":
            number = int(operands[1].strip("[]").rsplit("_", 1)[1])
            return f"{_register(operands[0])} = a{number};"
        if base in ("ld", "st"):
            return self._memory(it, base, rest)
        if base == "mov" and any("{" in operand for operand in operands):
            return self._packed(operands[0], operands[1], int(rest[-1][1:]))
        if base == "shfl":
            found, _, ok = operands[0].partition("|")
            given = ", ".join(self._value(one) for one in operands[1:])
            call = f"ptx::shuffle(ptx::To::{_SHUFFLES[rest[1]]}, {self._place(it)}, ok, {given})"
            return f"{{ Bits ok; {_register(found)} = {call}; {f'{_register(ok)} = ok;' if ok else ''} }}"
        if base == "vote":
            mask = self._value(operands[2])
            votes = f"ptx::votes({self._place(it)}, {self._value(operands[1])}, {mask})"
            whole = {"ballot": votes, "any": f"{votes} != 0", "all": f"{votes} == (uint32_t){mask}"}[rest[1]]
            return f"{_register(operands[0])} = {whole};"
        if it.name.startswith(("cp.async.commit_group", "cp.async.wait_group")):
            return f"emulator::wait_but({operands[0]});" if operands else "emulator::end_group();"
        if it.name.startswith("cp.async") and operands[2:] == ("16",):
            to, of = (self._address(one) for one in operands[:2])
            place = self._place(it)
            self.places.append((*self._spot(it)[:2], "st.shared, of cp.async"))
            return f"ptx::copy({place}, {to}, {of});"
        if base == "prefetch":
            return ";"
        if base in ("atom", "red"):
            space, change, kind = rest
            if space != "global" or f"atom_{change}" not in self._known:
                raise ValueError(it.name)
            call = f"op_atom_{change}<ptx::{kind}>({self._place(it)}, {self._address(operands[-2])}, "
            call = f"ptx::{call}{self._value(operands[-1])});"
            return call if base == "red" else f"{_register(operands[0])} = {call}"
        return self._computed(it, base, rest)

    def _computed(self, it: Instruction, base: str, rest: list[str]) -> str:
        name = "_".join(["op", base, *(part for part in rest if not _TYPE.match(part))])
        types = ", ".join(f"ptx::{part}" for part in rest if _TYPE.match(part))
        if name[3:] not in self._known:
            raise ValueError(it.name)
        given = ", ".join(self._value(one) for one in it.operands[1:])
        return f"{_register(it.operands[0])} = ptx::{name}<{types}>({given});"

    def _memory(self, it: Instruction, base: str, rest: list[str]) -> str:
        space = "kShared" if "shared" in rest else "kGlobal"
        if {"local", "const"} & set(rest):
            raise ValueError(it.name)
        what, where = it.operands if base == "ld" else reversed(it.operands)
        names = [one.strip() for one in what.strip("{}").split(",")]
        count = len(names)
        kind = f"<ptx::Space::{space}, ptx::{rest[-1]}, {count}>"
        call = f"{kind}({self._place(it)}, {self._address(where)}, v);"
        if base == "ld":
            taken = " ".join(f"{_register(name)} = v[{n}];" for n, name in enumerate(names))
            return f"{{ Bits v[{count}]; ptx::load{call} {taken} }}"
        return f"{{ const Bits v[] = {{{', '.join(map(self._value, names))}}}; ptx::store{call} }}"

    def _packed(self, to: str, of: str, bits: int) -> str:
        """Several registers as one, or one as several; the first is the lowest."""
        parts = [one.strip() for one in (to if "{" in to else of).strip("{}").split(",")]
        width = bits // len(parts)
        if "{" in to:
            return " ".join(
                f"{_register(one)} = {self._value(of)} >> {width * n};" for n, one in enumerate(parts)
            )
        ones = f"{hex((1 << width) - 1)}u"
        whole = " | ".join(
            f"((Bits){self._value(one)} & {ones}) << {width * n}" for n, one in enumerate(parts)
        )
        return f"{_register(to)} = {whole};"

    def _address(self, operand: str) -> str:
        inside = operand.strip("[]")
        base, sign, offset = re.match(r"([^+]+)(\+?)(-?\d*)$", inside).groups()  # type: ignore[union-attr]
        return f"{self._value(base)} + {offset}" if sign else self._value(base)

    def _value(self, operand: str) -> str:
        """An operand's bits."""
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand in self._offsets:
            return f"{self._offsets[operand]}u"
        if match := re.match(r"0[fd]([0-9A-Fa-f]+)$", operand):
            return f"0x{match[1]}u"
        if re.match(r"-?\d+$|0x[0-9A-Fa-f]+$", operand):
            return f"(Bits)({operand}ll)"
        return _register(operand)

    def _spot(self, it: Instruction) -> Spot:
        return self._module.files.get(it.file, self._entry.name), it.line, it.name

    def _place(self, it: Instruction) -> int:
        self.places.append(self._spot(it))
        return self._first_place + len(self.places) - 1


def _register(operand: str) -> str:
    """A register's variable: of kernels they are numbered, of inline assembly they have names of their own.

    Raises:
        ValueError: It is no register: a special one that is not known, or something of more than one.
    """
    if not re.match(r"%(p|rs|r|rd|f|fd)\d+$|[A-Za-z_]\w*$", operand.strip()):
        raise ValueError(operand)
    return operand.strip().lstrip("%")


def _predicate(operand: str) -> str:
    return operand.replace("%", "")


@dataclass
class Translated:
    """C++ of a file of PTX.

    Attributes:
        text: It.
        places: Each instruction that touches memory or meets others.
        blocks: Of each run of instructions without a jump, those that it has.
    """

    text: str
    places: list[Spot]
    blocks: list[Counter[Spot]]


def translate(text: str, kernels: Sequence[Kernel], header: str) -> Translated:
    """Write C++ that does what PTX says, with the launchers that a library of kernels has.

    Args:
        text: PTX of one source.
        kernels: Those that it has.
        header: The text of ptx.h.

    Raises:
        EnvironmentProblem: There is something in it that ptx.h has no function for.
    """
    module = read(text)
    known = set(re.findall(r"(?:op_|DAVINCI_PTX_[12]\()(\w+)", header))
    known |= {f"setp_{name}" for name in re.findall(r"DAVINCI_PTX_COMPARE\((\w+)", header)}
    entries = {entry.name: entry for entry in module.entries}
    whole = ['#include "ptx.h"', "using ptx::Bits;"]
    places: list[Spot] = []
    blocks: list[Counter[Spot]] = []
    for kernel in kernels:
        for symbol in kernel.symbols:
            entry = entries[symbol]
            offsets, named = _layout(module, entry)
            writer = _Writer(module, entry, offsets, known)
            parameters = ", ".join(f"Bits a{n}" for n in range(len(kernel.arguments)))
            whole.append(f"static void {symbol}({parameters})")
            whole += writer.body(len(places), len(blocks))
            places += writer.places
            blocks += writer.blocks
            whole.append(_launcher(kernel, symbol, named))
    whole.append(_tables(places, len(blocks)))
    return Translated("\n".join(whole) + "\n", places, blocks)


def _layout(module: Module, entry: Entry) -> tuple[dict[str, int], int]:
    """Where each name of shared memory that a kernel uses begins, what a launch adds last; and bytes with a name."""
    operands = {operand for one in entry.body if isinstance(one, Instruction) for operand in one.operands}
    used = {name for operand in operands for name in re.findall(r"[\w$]+", operand)} & module.shared.keys()
    offsets: dict[str, int] = {}
    at = 0
    for name in sorted(used, key=lambda one: (module.shared[one][0] == 0, one)):
        size, alignment = module.shared[name]
        at = -(-at // max(alignment, 16)) * max(alignment, 16)
        offsets[name] = at
        at += size
    return offsets, at


def _launcher(kernel: Kernel, symbol: str, named: int) -> str:
    taken = ", ".join(f"{_C_TYPES[letter]} a{n}" for n, letter in enumerate(kernel.arguments))
    given = ", ".join(
        f"ptx::bits(a{n})" if letter == "f" else f"(Bits)a{n}" for n, letter in enumerate(kernel.arguments)
    )
    a_slot = 16 * kernel.threads if kernel.slots else 0
    return f"""extern "C" __attribute__((visibility("default")))
int davinci_{symbol}(long long blocks, {taken}, void*) {{
  return ptx::launch(blocks, {kernel.threads}, {named}, {kernel.slots * a_slot}, {a_slot},
                     [=] {{ {symbol}({given}); }});
}}
extern "C" __attribute__((visibility("default"))) int davinci_threads_{symbol}() {{ return {kernel.threads}; }}
extern "C" __attribute__((visibility("default"))) int davinci_slots_{symbol}() {{ return {kernel.slots}; }}"""


def _tables(places: Sequence[Spot], blocks: int) -> str:
    rows = ",\n".join(f'  {{"{file}", {line}}}' for file, line, _ in places)
    names = ",\n".join(f'  "shared memory at {file}:{line}"' for file, line, _ in places)
    return f"""namespace ptx {{
extern const Place kPlaces[] = {{
{rows}}};
extern const char* const kNames[] = {{
{names}}};
extern const int kPlaceCount = {len(places)}, kBlockCount = {blocks};
}}
extern "C" __attribute__((visibility("default"))) const char* davinci_kernels_digest() {{ return DAVINCI_DIGEST; }}"""
