"""This package's AdamW inside Megatron-Core's optimizers: moments in fp32 or in 8 bits, clipping in the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.kernels import moments
from megatron_davinci.kernels.adamw import Update, adamw_, adamw_fp8_moments_


class DavinciAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on `kernels.adamw`, with its step in the parameter group as `GroupAdamW`.

    State of a parameter: `exp_avg` and `exp_avg_sq` of its shape, fp32; or uint8, and beside them `exp_range`,
    [groups, 4] fp32 (`kernels.moments`).

    Args:
        params: fp32 parameters or groups; in the distributed optimizer, flat shards.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        adam_w_mode: Must be True; there for FusedAdam's signature.

    Attributes:
        fp8_moments: Whether moments are in 8 bits.
        gradient_scale: What the next update multiplies gradients by: the clip coefficient, by the number of tokens.
        copies: By parameter, a bf16 tensor of its shape that each update writes it to.
    """

    fp8_moments = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("DavinciAdamW has decoupled weight decay only (adam_w_mode=True)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.gradient_scale = 1.0
        self.copies: dict[Tensor, Tensor] = {}

    def make_states(self) -> None:
        """Make the state that parameters do not have yet: zeros."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("DavinciAdamW takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            # Those with a bf16 copy and those without are two launches.
            for copied in (True, False):
                self._update([p for p in params if (p in self.copies) == copied], group, copied)

    def _update(self, params: list[Tensor], group: dict[str, Any], copied: bool) -> None:
        if not params:
            return
        states = [self._state_of(p) for p in params]
        update = Update(
            learning_rate=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            step=group["step"],
            gradient_scale=self.gradient_scale,
        )
        given = [p.detach() for p in params], [p.grad for p in params if p.grad is not None]
        both = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        copies = [self.copies[p] for p in params] if copied else []
        if self.fp8_moments:
            adamw_fp8_moments_(*given, *both, [state["exp_range"] for state in states], update, copies)
        else:
            adamw_(*given, *both, update, copies)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            dtype = torch.uint8 if self.fp8_moments else torch.float32
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            if self.fp8_moments:
                state["exp_range"] = torch.zeros(moments.groups(p.numel()), 4, device=p.device)
        return state

    def moments_of(self, p: Tensor) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq` of a parameter as fp32 numbers; those that are not fp32 are copies."""
        state = self._state_of(p)
        if not self.fp8_moments:
            return dict(state)
        parts = zip(("exp_avg", "exp_avg_sq"), state["exp_range"].split(2, 1), strict=True)
        return {name: moments.decode(state[name].view(-1), part).view_as(p) for name, part in parts}

    @torch.no_grad()
    def set_moments(self, p: Tensor, values: dict[str, Tensor]) -> None:
        """Take moments over from fp32 numbers; what `moments_of` gave comes back to the bit."""
        state = self._state_of(p)
        for number, name in enumerate(("exp_avg", "exp_avg_sq")):
            if not self.fp8_moments:
                state[name].copy_(values[name])
                continue
            codes, ranges = moments.encode(values[name].to(p.device).reshape(-1), second=number == 1)
            state[name].copy_(codes.view_as(p))
            state["exp_range"][:, 2 * number : 2 * number + 2] = ranges

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that tensors keep their dtypes: torch would turn codes into fp32 numbers.

        Raises:
            ValueError: It is of the other kind of moments.
        """
        stored = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        wanted = torch.uint8 if self.fp8_moments else torch.float32
        for group, of in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, number in zip(group["params"], of["params"], strict=True):
                if number not in stored:
                    continue
                found = stored[number]["exp_avg"].dtype
                if found != wanted:
                    raise ValueError(f"moments are {found} in the state that is loaded, and {wanted} here")
                self.state[p] = {name: value.to(p.device) for name, value in stored[number].items()}


class DavinciAdamWFP8Moments(DavinciAdamW):
    """The same with moments in 8 bits."""

    fp8_moments = True
