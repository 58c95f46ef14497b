"""A weight's gradient in fp32, added to Megatron-Core's `main_grad` where there is one, without apex's extension."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_davinci.platform.weight_gradient import add_weight_gradient, mark_zero, take_zero


class MainGradient:
    """A weight's gradient, summed in fp32: in its `main_grad`, or in a sum of its own.

    Args:
        weight: [out, in]. Where it has an fp32 `main_grad`, as in Megatron-Core's DistributedDataParallel, products
            are added to that.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        main = getattr(weight, "main_grad", None)
        self._is_main = isinstance(main, Tensor) and main.dtype == torch.float32
        if isinstance(main, Tensor) and self._is_main:
            self._sum = main
        else:
            self._sum = torch.empty(weight.shape, device=weight.device)
            mark_zero(self._sum)  # as good as zero: the first product writes it

    def add(self, by_out: Tensor, inputs: Tensor) -> None:
        """Add `by_out.t() @ inputs`.

        Args:
            by_out: [rows, out] bf16 or fp32.
            inputs: [rows, in] of the same dtype.
        """
        add_weight_gradient(inputs, by_out, self._sum)

    def add_product(self, made: Tensor) -> None:
        """Add what was multiplied elsewhere.

        Args:
            made: [out, in].
        """
        if (total := self.take_zero()) is not None:
            total.copy_(made)
        else:
            self._sum.add_(made)

    def take_zero(self) -> Tensor | None:
        """The sum, where nothing has been added to it: who takes it must write all of it. None where it is not zero.

        Returns:
            [out, in] fp32.
        """
        return self._sum if take_zero(self._sum) else None

    def gradient(self) -> Tensor:
        """What autograd gets: nothing that counts where `main_grad` has it already, as Megatron-Core does it."""
        if not self._is_main:
            if (total := self.take_zero()) is not None:
                total.zero_()
            return self._sum.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # An embedding that is tied adds its own gradient to what is returned here.
        make = torch.zeros_like if getattr(self._weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self._weight, requires_grad=False)
