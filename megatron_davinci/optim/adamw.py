"""AdamW as Megatron-Core's distributed optimizer expects it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GroupAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) that counts steps in the parameter group, on torch's fused kernel.

    This is the contract of Transformer Engine's and Apex's FusedAdam, for which Megatron-Core's distributed
    optimizer is written; `platform.megatron_patches.use_adam` says what goes wrong with a plain torch AdamW.
    State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and dtype.

    Args:
        params: Parameters or groups; in the distributed optimizer, flat shards.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        adam_w_mode: Must be True; there for FusedAdam's signature.
    """

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
            raise ValueError("GroupAdamW has decoupled weight decay only (adam_w_mode=True)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("GroupAdamW takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move parameters of a group, all of which have gradients."""
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        step = torch.tensor(float(group["step"]), device=params[0].device)
        torch._fused_adamw_(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
