"""Operators of torch that cost little where nothing but the kernel is wanted.

What torch does around an operator that Python defines takes 60 to 100 µs a call, more than many kernels run. It is
for whoever looks at calls: the compiler, fake tensors, dispatch modes. Where nobody looks, the function is called as
it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Operator:
    """A function on plain tensors, which is an operator besides: `torch.ops.davinci.NAME`.

    It has no gradient of its own: whoever calls it does so inside a `torch.autograd.Function`, or without gradients.

    Args:
        function: What it computes.
        made: The operator.
        mutated: Places of the arguments that it writes to.

    Attributes:
        made: The operator, for `torch.library.opcheck`.
    """

    def __init__(self, function: Callable[..., Any], made: Any, mutated: tuple[int, ...]) -> None:
        functools.update_wrapper(self, function)
        self.register_fake = made.register_fake
        self._function, self.made, self._mutated = function, made, mutated

    def __call__(self, *arguments: Any) -> Any:
        """Compute; arguments by place only."""
        if (
            torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None
            or any(isinstance(one, Tensor) and type(one) not in _PLAIN for one in arguments)
        ):
            return self.made(*arguments)
        result = self._function(*arguments)
        for place in self._mutated:
            if arguments[place] is not None:
                increment_version(arguments[place])  # so that autograd sees who kept what is no more
        return result


_PLAIN = (Tensor, torch.nn.Parameter)


def operator(
    name: str, *, mutates_args: Iterable[str], schema: str
) -> Callable[[Callable[..., Any]], Operator]:
    """`torch.library.custom_op` of a function whose calls are to be cheap.

    Args:
        name: `davinci::NAME`.
        mutates_args: Names of the arguments that it writes to.
        schema: Of its arguments and results, in torch's words.
    """

    def decorate(function: Callable[..., Any]) -> Operator:
        made = torch.library.custom_op(name, function, mutates_args=mutates_args, schema=schema)
        names = list(inspect.signature(function).parameters)
        return Operator(function, made, tuple(names.index(one) for one in mutates_args))

    return decorate
