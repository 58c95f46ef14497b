"""One update of AdamW for many tensors in one launch: moments in fp32, or in 8 bits.

Loshchilov and Hutter, 2019, "Decoupled weight decay regularization", arXiv 1711.05101. Gradients are multiplied by a
factor on the way, so that clipping reads and writes nothing. The kernels are in `csrc/kernels/adamw.cu`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from megatron_davinci.kernels import moments, spans
from megatron_davinci.kernels.table import KERNELS
from megatron_davinci.kernels.ways import way_of

OP = "adamw"
_OF_A_THREAD = 8  # elements of a tile of fp32 moments, as the kernel has them


@dataclass(frozen=True)
class Update:
    """The numbers of an update.

    Attributes:
        learning_rate: After any schedule.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
        weight_decay: Decoupled.
        step: 1 for the first update; for the correction of moments that begin as zeros.
        gradient_scale: What gradients are multiplied by: a clip coefficient.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    step: int = 1
    gradient_scale: float = 1.0

    def factors(self) -> tuple[float, ...]:
        """What kernels take, in their order."""
        return (
            self.gradient_scale,
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.epsilon,
            self.learning_rate / (1 - self.beta1**self.step),
            1 / math.sqrt(1 - self.beta2**self.step),
            self.learning_rate * self.weight_decay,
        )


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    update: Update,
    copies: Sequence[Tensor] = (),
) -> None:
    """Update parameters and fp32 moments in place.

    Args:
        parameters: Of any shapes, fp32, contiguous, on one device.
        gradients: Of the same shapes, fp32.
        first: First moments, fp32.
        second: Second moments, fp32.
        update: What the update is made with.
        copies: Of the same shapes, bf16: the new parameters are written here too. Empty for none.

    Raises:
        ValueError: Tensors do not go together; the first that does not is named.
    """
    wanted = {"gradients": torch.float32, "first": torch.float32, "second": torch.float32}
    given = {"gradients": gradients, "first": first, "second": second}
    _check(parameters, given, wanted, copies)
    if parameters:
        full_(*map(list, (parameters, gradients, first, second, copies)), *astuple(update))


def adamw_fp8_moments_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    ranges: Sequence[Tensor],
    update: Update,
    copies: Sequence[Tensor] = (),
) -> None:
    """Update parameters, and moments in 8 bits (`kernels.moments`), in place.

    The update is made with moments that are decoded, moved on in fp32, and only then encoded again. Groups are
    counted from the beginning of each tensor.

    Args:
        parameters: Of any shapes, fp32, contiguous, on one device.
        gradients: Of the same shapes, fp32.
        first: Codes of the first moments, uint8.
        second: Codes of the second moments, uint8.
        ranges: [groups, 4] fp32 for each: top and bottom of the first moments, then of the second.
        update: What the update is made with.
        copies: Of the same shapes, bf16: the new parameters are written here too. Empty for none.

    Raises:
        ValueError: Tensors do not go together; the first that does not is named.
    """
    wanted = {"gradients": torch.float32, "first": torch.uint8, "second": torch.uint8}
    given = {"gradients": gradients, "first": first, "second": second}
    _check(parameters, given, wanted, copies)
    if len(ranges) != len(parameters):
        raise ValueError(f"{len(ranges)} ranges for {len(parameters)} parameters")
    for number, (one, parameter) in enumerate(zip(ranges, parameters, strict=True)):
        shape = [moments.groups(parameter.numel()), 4]
        if list(one.shape) != shape or one.dtype != torch.float32:
            raise ValueError(f"ranges[{number}] is {list(one.shape)} {one.dtype}, not {shape} torch.float32")
    if parameters:
        eight_bits_(*map(list, (parameters, gradients, first, second, ranges, copies)), *astuple(update))


def _check(
    parameters: Sequence[Tensor],
    given: dict[str, Sequence[Tensor]],
    wanted: dict[str, torch.dtype],
    copies: Sequence[Tensor],
) -> None:
    if len(copies):
        given, wanted = {**given, "copies": copies}, {**wanted, "copies": torch.bfloat16}
    for number, parameter in enumerate(parameters):
        if parameter.dtype != torch.float32:
            raise ValueError(f"parameters[{number}] is {parameter.dtype}, not torch.float32")
    for name, tensors in given.items():
        if len(tensors) != len(parameters):
            raise ValueError(f"{len(tensors)} {name} for {len(parameters)} parameters")
        for number, (one, parameter) in enumerate(zip(tensors, parameters, strict=True)):
            if one.shape != parameter.shape:
                raise ValueError(f"{name}[{number}] is {list(one.shape)}, not {list(parameter.shape)}")
            if one.dtype != wanted[name]:
                raise ValueError(f"{name}[{number}] is {one.dtype}, not {wanted[name]}")


_NUMBERS = (
    "float learning_rate, float beta1, float beta2, float epsilon, float weight_decay, int step, "
    "float gradient_scale"
)


@torch.library.custom_op(
    "davinci::adamw_",
    mutates_args={"parameters", "first", "second", "copies"},
    schema="(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, "
    f"Tensor(d!)[] copies, {_NUMBERS}) -> ()",
)
def full_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    copies: Sequence[Tensor],
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    gradient_scale: float,
) -> None:
    """`adamw_` as an operator of torch; `copies` may be empty."""
    update = Update(learning_rate, beta1, beta2, epsilon, weight_decay, step, gradient_scale)
    way = way_of(OP, *parameters, *gradients, *first, *second, *copies)
    if way.has_kernels:
        rows = spans.table([(parameters, 4), (gradients, 4), (first, 4), (second, 4), ((), 0), (copies, 2)])
        tiles = -(-spans.ELEMENTS // (_OF_A_THREAD * KERNELS["adamw"].threads))
        if len(rows):
            most = spans.ELEMENTS
            way.launch("adamw", len(rows) * tiles, parameters[0], rows, len(rows), most, *update.factors())
        return
    for number, parameter in enumerate(parameters):
        _move(parameter, gradients[number], first[number], second[number], update)
        if copies:
            copies[number].copy_(parameter)


@torch.library.custom_op(
    "davinci::adamw_fp8_moments_",
    mutates_args={"parameters", "first", "second", "ranges", "copies"},
    schema="(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, "
    f"Tensor(d!)[] ranges, Tensor(e!)[] copies, {_NUMBERS}) -> ()",
)
def eight_bits_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    ranges: Sequence[Tensor],
    copies: Sequence[Tensor],
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    gradient_scale: float,
) -> None:
    """`adamw_fp8_moments_` as an operator of torch; `copies` may be empty."""
    update = Update(learning_rate, beta1, beta2, epsilon, weight_decay, step, gradient_scale)
    way = way_of(OP, *parameters, *gradients, *first, *second, *ranges, *copies)
    if way.has_kernels:
        of_range = 16 / moments.GROUP
        columns = [(parameters, 4), (gradients, 4), (first, 1), (second, 1), (ranges, of_range), (copies, 2)]
        rows = spans.table(columns)
        if len(rows):
            turn = rows.new_zeros(1, dtype=torch.int32)  # runs that have been drawn
            way.launch(
                "adamw_fp8_moments", len(rows), parameters[0], rows, len(rows), turn, *update.factors()
            )
        return
    for number, parameter in enumerate(parameters):
        of_first, of_second = ranges[number].split(2, 1)
        m = moments.decode(first[number].view(-1), of_first).view_as(parameter)
        v = moments.decode(second[number].view(-1), of_second).view_as(parameter)
        _move(parameter, gradients[number], m, v, update)
        codes, of_first[:] = moments.encode(m.view(-1), second=False)
        first[number].copy_(codes.view_as(parameter))
        codes, of_second[:] = moments.encode(v.view(-1), second=True)
        second[number].copy_(codes.view_as(parameter))
        if copies:
            copies[number].copy_(parameter)


for _op in (full_, eight_bits_):
    _op.register_fake(lambda *arguments: None)


def _move(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, update: Update) -> None:
    """One update of one tensor, fp32."""
    scale, beta1, rest1, beta2, rest2, epsilon, step, correction, decay = update.factors()
    if scale != 1.0:
        gradient = gradient * scale
    first.mul_(beta1).add_(gradient, alpha=rest1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=rest2)
    parameter.add_(parameter, alpha=-decay)
    parameter.addcdiv_(first, second.sqrt().mul_(correction).add_(epsilon), value=-step)
