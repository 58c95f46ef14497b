"""Pickles from outside, read without running anything that they name.

A pickle is a program: it may name any function of any module and call it. This reads the program with the standard
library's disassembler (`pickletools`, which runs nothing) and carries out the steps that build plain data. A name is
never imported. What it stands for is looked up in a table that the caller gives; what is not there is an error, or
becomes a `Named`, which remembers what it was called with and does nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any


class NotPlain(ValueError):
    """A pickle holds something that may not be built, or is damaged."""


@dataclass
class Named:
    """Something that a pickle names and that was not looked up: a class, a function, or what calling one gave.

    Attributes:
        name: `module.name`.
        arguments: What it was called with; None if it was not called.
        state: What its attributes were to be set to.
    """

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __hash__(self) -> int:
        return hash(self.name)


Build = Callable[..., Any]
_MARK = object()
_MAKES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_CONSTANTS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_NOTHING = frozenset(["PROTO", "FRAME"])


def read_plain(
    file: IO[bytes] | bytes,
    known: Mapping[str, Build] | None = None,
    states: Mapping[type, Callable[[Any, Any], None]] | None = None,
    inert: Callable[[str], bool] = lambda name: False,
) -> Any:
    """The value that a pickle describes.

    Args:
        file: The pickle.
        known: What names stand for, as `module.name`, whether they are called, or stand for themselves.
        states: How the attributes of an object of a class are set from its state, for classes of `known`.
        inert: Which names that are not known become a `Named`; any other is an error.

    Raises:
        NotPlain: A name is not known, an object is none that can be given attributes, or the bytes are no pickle.
    """
    machine = _Machine(known or {}, states or {}, inert)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        return machine.result
    except NotPlain:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        raise NotPlain(f"not a pickle, or a damaged one: {type(error).__name__}: {error}") from error


class _Machine:
    def __init__(
        self,
        known: Mapping[str, Build],
        states: Mapping[type, Callable[[Any, Any], None]],
        inert: Callable[[str], bool],
    ) -> None:
        self._known, self._states, self._inert = known, states, inert
        self._names = {id(value): name for name, value in known.items()}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _MAKES:
            self._stack.append(_MAKES[name]())
        elif name in _CONSTANTS:
            self._stack.append(argument)
        elif name not in _NOTHING:
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise NotPlain(f"the instruction {name}")
            method(argument)

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _look_up(self, name: str) -> Any:
        if name in self._known:
            return self._known[name]
        if not self._inert(name):
            raise NotPlain(f"the name {name}")
        return Named(name)

    def _call(self, what: Any, arguments: Any) -> Any:
        if isinstance(what, Named) and what.arguments is None:
            return Named(what.name, tuple(arguments))
        if id(what) not in self._names:
            raise NotPlain(f"a call of something that is no name: {type(what).__name__}")
        return what(*arguments)

    def _stop(self, _: Any) -> None:
        self.result = self._stack.pop()

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, number: Any) -> None:
        self._memo[int(number)] = self._stack[-1]

    _binput = _long_binput = _put

    def _get(self, number: Any) -> None:
        self._stack.append(self._memo[int(number)])

    _binget = _long_binget = _get

    def _tuple(self, _: Any) -> None:
        values = self._to_mark()
        self._stack.append(tuple(values))

    def _last(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(values)

    def _tuple1(self, _: Any) -> None:
        self._last(1)

    def _tuple2(self, _: Any) -> None:
        self._last(2)

    def _tuple3(self, _: Any) -> None:
        self._last(3)

    def _list(self, _: Any) -> None:
        self._stack.append(self._to_mark())

    def _dict(self, _: Any) -> None:
        values = self._to_mark()
        self._stack.append(dict(zip(values[::2], values[1::2], strict=True)))

    def _frozenset(self, _: Any) -> None:
        self._stack.append(frozenset(self._to_mark()))

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Named):
            target.items.extend(values)
        elif type(target) is list:
            target.extend(values)
        else:
            raise NotPlain(f"values appended to a {type(target).__name__}")

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def _additems(self, _: Any) -> None:
        values = self._to_mark()
        if type(self._stack[-1]) is not set:
            raise NotPlain(f"values added to a {type(self._stack[-1]).__name__}")
        self._stack[-1].update(values)

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Named):
            target.items.extend(zip(values[::2], values[1::2], strict=True))
        elif type(target) is dict:
            target.update(zip(values[::2], values[1::2], strict=True))
        else:
            raise NotPlain(f"items set of a {type(target).__name__}")

    def _setitem(self, _: Any) -> None:
        values = self._stack[-2:]
        del self._stack[-2:]
        self._set(values)

    def _setitems(self, _: Any) -> None:
        self._set(self._to_mark())

    def _global(self, argument: str) -> None:
        # The disassembler gives module and name with a space between.
        self._stack.append(self._look_up(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        module, name = self._stack[-2:]
        del self._stack[-2:]
        if not isinstance(module, str) or not isinstance(name, str):
            raise NotPlain("a name that is no text")
        self._stack.append(self._look_up(f"{module}.{name}"))

    def _reduce(self, _: Any) -> None:
        arguments = self._stack.pop()
        self._stack.append(self._call(self._stack.pop(), arguments))

    def _newobj(self, _: Any) -> None:
        arguments = self._stack.pop()
        what = self._stack.pop()
        if isinstance(what, Named):
            self._stack.append(self._call(what, arguments))
        elif what in self._states and arguments == ():
            self._stack.append(object.__new__(what))
        else:
            raise NotPlain(f"a new object of {self._names.get(id(what), type(what).__name__)}")

    def _newobj_ex(self, _: Any) -> None:
        named = self._stack.pop()
        arguments = self._stack.pop()
        what = self._stack.pop()
        if not isinstance(what, Named):
            raise NotPlain("a new object with arguments by name")
        self._stack.append(self._call(what, (*arguments, named)))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Named):
            target.state = state
        elif type(target) in self._states:
            self._states[type(target)](target, state)
        else:
            raise NotPlain(f"attributes set of a {type(target).__name__}")

    def _binpersid(self, _: Any) -> None:
        # A tensor's storage, which torch keeps beside the pickle.
        stored = self._stack.pop()
        self._stack.append(self._call(self._look_up("persistent"), (stored,)))
