"""Policies by name: one small file each, chosen by `controller.policy`. None of them needs torch."""

from __future__ import annotations

from megatron_davinci.config.controller import ControllerConfig
from megatron_davinci.train.policies.domain_upsampling import DomainUpsamplingPolicy
from megatron_davinci.train.policies.fixed import FixedPolicy
from megatron_davinci.train.policies.loss_weighted import LossWeightedPolicy
from megatron_davinci.train.policies.saturation import SaturationPolicy
from megatron_davinci.train.policies.situation import Policy
from megatron_davinci.train.policies.specialised import SpecialisedPolicy

_POLICIES: dict[str, type[Policy]] = {
    "fixed": FixedPolicy,
    "saturation": SaturationPolicy,
    "domain_upsampling": DomainUpsamplingPolicy,
    "specialised": SpecialisedPolicy,
    "loss_weighted": LossWeightedPolicy,
}


def make_policy(config: ControllerConfig) -> Policy:
    """The policy that a configuration names."""
    return _POLICIES[config.policy](config)  # type: ignore[call-arg]
