"""A few steps of a tiny model on random tokens, on the ranks of the pool: what a lever must not change."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch

STEPS = 3


class Taken(NamedTuple):
    """What a run of steps came to on one rank.

    Attributes:
        losses: Of each step.
        norms: The gradient's, of each step.
        z_losses: Of each step; None without one.
        weights: A digest of this rank's weights after the last, which are gathered for it.
    """

    losses: list[float]
    norms: list[float]
    z_losses: list[float | None]
    weights: str


def start(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The configuration and the platform, with the process groups of its layout up."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    config, platform = validate(settings, "tests/stepping.py"), choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups, timeout_seconds=60)
    return config, platform


def built(config: Any, platform: Any) -> tuple[Any, Any, Any]:
    """The model chunks of this rank, their optimizer, and what takes its steps."""
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.train.step import Stepper, wrap_model

    chunks = build_model(config, platform)
    wrapped = wrap_model(chunks, config)
    optimizer = build_optimizer(config, wrapped)
    set_hyperparameters(optimizer, learning_rate=1e-2, weight_decay=config.optimizer.weight_decay)
    return chunks, optimizer, Stepper(wrapped, optimizer, config, platform)


def tokens_of(config: Any, step: int, batch: int = 8) -> torch.Tensor:
    """This rank's rows of the global batch of a step: the same batch on every layout."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(
        config.model.vocab_size, (batch, config.data.sequence_length + 1), generator=generator
    )
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    micro = config.train.micro_batch_size
    return rows.unflatten(0, (-1, ranks, micro))[:, rank].flatten(0, 1)


def take(config: Any, platform: Any, *, documents: bool = False, masked: bool = False) -> Taken:
    """Build, and take `STEPS` steps of 8 sequences."""
    from megatron_davinci.model.documents import DocumentMask
    from megatron_davinci.platform import distributed

    chunks, _, stepper = built(config, platform)
    losses, norms, z_losses = [], [], []
    for step in range(STEPS):
        distributed.seed_ranks(step)
        tokens = tokens_of(config, step)
        mask = DocumentMask(eod_id=0, reset_positions=True) if documents else None
        # What a label weighs follows from its token, so that every rank weighs it alike.
        weights = tokens[:, 1:] % 3 if masked else None
        result = stepper.train(tokens, len(tokens) // config.train.micro_batch_size, weights, mask)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        z_losses.append(result.z_loss)
    stepper.gather_weights()
    digest = hashlib.sha256()
    for chunk in chunks:
        for _, parameter in sorted(chunk.named_parameters()):
            digest.update(parameter.detach().float().numpy().tobytes())
    return Taken(losses, norms, z_losses, digest.hexdigest())


def take_all(whole: dict[str, dict[str, Any]], **options: Any) -> dict[str, Taken]:
    """`take` for each of several settings of one layout, one after the other on the same ranks."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed

    _, platform = start(next(iter(whole.values())))
    taken = {
        name: take(validate(settings, "tests/stepping.py"), platform, **options)
        for name, settings in whole.items()
    }
    distributed.stop()
    return taken
